import base64
import io
import logging
import re
from collections.abc import Iterator, Sequence
from datetime import date
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from helpers import evaluated as run
from helpers import table
from monai.data import DataLoader, Dataset
from monai.handlers import MetricsSaver
from sklearn.metrics import average_precision_score, confusion_matrix, roc_auc_score, roc_curve
from torch import Tensor, nn

from dissect_monai.common import __version__
from dissect_monai.handlers.calibration import Calibration, read_calibration, write_calibration
from dissect_monai.handlers.classifier import (
    METRICS,
    ClassifierEvaluation,
    FindingRow,
    finding_metrics,
    finding_rows,
)
from dissect_monai.metrics.intervals import wilson_interval

pytestmark = pytest.mark.usefixtures("_images_are_nowhere")
NAMES = ["Opacity", "Pleural Thickening", "Rare"]


class Quadrants(nn.Module):
    """Logit i is `scale` times the mean of stripe i less 1."""

    def __init__(self, scale: float = 4.0) -> None:
        super().__init__()
        self.layer4 = nn.Identity()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * (4 * self.layer4(images)[:, 0].unflatten(1, (3, 4)).mean((2, 3)) - 2)


class Set(Dataset):
    """Images whose stripes answer to their labels, more or less; `data` holds the items, as in a cached data set."""

    def __init__(self, size: int, seed: int, rare: bool) -> None:
        rng = np.random.default_rng(seed)
        labels = (rng.random((size, 3)) < [0.5, 0.4, 0.3]).astype(np.float32)
        labels[:, 2] *= rare
        answers = np.clip(rng.normal(0.4 + 0.25 * labels, 0.15), 0, 1)
        labels[::7, 1] = np.nan
        self.data = [
            {"image": f"folder/{seed}_{index}.png", "label": label.tolist(), "subject": index // 2}
            for index, label in enumerate(labels)
        ]
        self.images = torch.from_numpy(answers).float().repeat_interleave(4, 1)[:, None, :, None].expand(-1, -1, -1, 8)
        self.labels = torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self.images[index].clone(), "label": self.labels[index]}


class Evaluated:
    """One evaluation, looked at by several tests."""

    def __init__(
        self, folder: Path, scale: float = 4.0, test: Set | None = None, validation: Set | None = None, **kwargs: Any
    ) -> None:
        self.network = Quadrants(scale)
        self.test, self.validation = test or Set(60, 1, rare=False), validation or Set(50, 0, rare=True)
        arguments = {
            "num_samples": 50,
            "facts": {"data": "/home/me/made up", "weights": "/home/me/run/models/model.pt"},
            **kwargs,
        }
        for item, image in zip(self.test.data, self.test.images, strict=True):
            item["image"] = str(folder / item["image"])
            Path(item["image"]).parent.mkdir(parents=True, exist_ok=True)
            large = image[0].T.repeat_interleave(50, 0).repeat_interleave(50, 1)  # the network sees a small copy
            PIL.Image.fromarray((255 * large.numpy()).astype(np.uint8)).save(item["image"])
        handler = ClassifierEvaluation(DataLoader(self.validation, batch_size=8), NAMES, folder, **arguments)
        logging.getLogger("ignite").setLevel(logging.ERROR)
        saver = MetricsSaver(folder, metrics="*")
        self.metrics = run(self.network, DataLoader(self.test, batch_size=8), handler, saver).state.metrics
        self.findings, self.predictions = table(folder / "findings.csv"), table(folder / "cases.csv")
        self.folder = folder

    def logits(self, split: Set) -> np.ndarray:
        with torch.no_grad():
            return self.network(split.images).double().numpy()


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def numbers(row: dict[str, str], names: Sequence[str]) -> list[float]:
    return [float(row[name]) for name in names]


def judged(evaluated: Evaluated, split: Set) -> Iterator[tuple[dict[str, str], np.ndarray, np.ndarray]]:
    """Of the two findings that have metrics: their line, the known labels and the probabilities of these."""
    for index, row in enumerate(evaluated.findings[1:3]):
        label = split.labels.numpy()[:, index]
        known = ~np.isnan(label)
        yield row, label[known], sigmoid(evaluated.logits(split))[known, index]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    return Evaluated(tmp_path_factory.mktemp("evaluated"), num_worst=4)


def test_findings_are_those_of_sklearn(evaluated: Evaluated) -> None:
    assert [row["finding"] for row in evaluated.findings] == ["macro", *NAMES]
    for row, label, probability in judged(evaluated, evaluated.test):
        tn, fp, fn, tp = confusion_matrix(label, probability >= float(row["threshold"])).ravel()
        areas = [roc_auc_score(label, probability), average_precision_score(label, probability)]
        assert numbers(row, METRICS[:4]) == pytest.approx([*areas, tp / (tp + fn), tn / (tn + fp)], abs=1e-4)
        assert numbers(row, ("n", "positives")) == [len(label), label.sum()]


def test_thresholds_come_from_validation_alone(evaluated: Evaluated) -> None:
    for row, label, probability in judged(evaluated, evaluated.validation):
        fpr, tpr, _ = roc_curve(label, probability)
        called = probability >= float(row["threshold"])
        assert called[label == 1].mean() - called[label == 0].mean() == pytest.approx((tpr - fpr).max())


def test_findings_without_positives_are_named_with_their_counts_and_have_no_metrics(evaluated: Evaluated) -> None:
    rare = dict(evaluated.findings[-1])
    assert (rare.pop("n"), rare.pop("positives"), float(rare.pop("threshold")) > 0) == ("60", "0", True)
    assert set(rare.values()) == {"Rare", ""}
    assert {"auroc", "auroc_low", "auroc_high", "ece_Pleural_Thickening", "temperature"} <= set(evaluated.metrics)
    assert not [name for name in evaluated.metrics if "Rare" in name]
    assert "sensitivity_Pleural_Thickening_high" in (evaluated.folder / "metrics.csv").read_text()


def test_predictions_and_scores_hold_every_image_and_the_network_stays(evaluated: Evaluated) -> None:
    row, probability = evaluated.predictions[7], sigmoid(evaluated.logits(evaluated.test))[7]
    assert Path(row["image"]).name == "1_7.png"
    said = [each["subject"] for each in evaluated.predictions]
    assert len({*said}) == len({*zip(said, (item["subject"] for item in evaluated.test.data), strict=True)}) == 30
    assert numbers(row, [f"{name} probability" for name in NAMES]) == pytest.approx(probability, abs=1e-6)
    assert (row["Pleural Thickening label"], row["Rare label"], len(evaluated.predictions)) == ("", "0", 60)
    with np.load(evaluated.folder / "scores.npz") as arrays:
        assert set(arrays) == {"subjects", "labels/findings", "scores/classifier/-/finetune/findings"}
        np.testing.assert_array_equal(arrays["labels/findings"], evaluated.test.labels.numpy())
        assert arrays["subjects"].tolist() == said
    assert evaluated.network.training
    assert evaluated.network.scale.grad is None
    assert evaluated.network.scale.item() == 4


def test_temperature_repairs_overconfidence_and_moves_no_rank(tmp_path: Path) -> None:
    plain = Evaluated(tmp_path / "plain", scale=15.0)
    scaled = Evaluated(tmp_path / "scaled", scale=15.0, temperature_scaling=True)
    assert plain.metrics["temperature"] == 1
    assert scaled.metrics["temperature"] > 2
    assert scaled.metrics["ece"] < plain.metrics["ece"]
    assert [scaled.metrics[name] for name in ("auroc", "ap")] == [plain.metrics[name] for name in ("auroc", "ap")]


def test_without_a_class_in_validation_there_is_no_threshold(tmp_path: Path) -> None:
    test, validation = Set(60, 1, rare=True), Set(50, 0, rare=False)
    row = Evaluated(tmp_path, test=test, validation=validation).findings[-1]
    assert row["finding"] == "Rare"
    assert {row[name] for name in ("threshold", "sensitivity", "specificity_low")} == {""}
    assert float(row["auroc"]) > 0.5


def test_the_report_shows_curves_facts_and_the_worst_cases(evaluated: Evaluated) -> None:
    page = (evaluated.folder / "report.html").read_text(encoding="utf-8")
    facts = {"Data": "made up", "Test images": "60", "Validation images": "50", "Bootstrap resamples": "50"}
    facts |= {"Weights": "run/models/model.pt"}  # of a long path
    facts |= {"Date": date.today().isoformat(), "Software": f"dissect_monai {__version__}"}
    for name, value in facts.items():
        assert f"<dt>{name}</dt><dd>{value}</dd>" in page
    assert "<td>60</td><td>0</td>" in page
    assert len(re.findall('<svg role="img" aria-label="(ROC on the test split|Reliability)', page)) == 2
    assert [
        len(re.findall(f'<td class="text">{start}{name}</td>', page))
        for start, name in zip(("<svg .*?</svg>", "<svg .*?</svg>", ""), NAMES, strict=True)
    ] == [1, 1, 1]  # the last has no curve
    assert page.count("data:image/jpeg;base64,") == 2 * 4
    wrong = evaluated.logits(evaluated.test)[:, :2].copy()
    labels = evaluated.test.labels.numpy()[:, :2]
    thresholds = np.array([float(row["threshold"]) for row in evaluated.findings[1:3]])
    wrong -= np.log(thresholds / (1 - thresholds))
    missed, alarm = np.where(labels == 1, wrong, np.inf), np.where(labels == 0, wrong, -np.inf)
    for place in (missed.argmin(), alarm.argmax()):
        assert f"<dt>Line of cases.csv</dt><dd>{place // 2 + 2}</dd>" in page
        index, column = divmod(int(place), 2)
        assert f"<dt>Threshold</dt><dd>{thresholds[column]:.3f}</dd>" in page
        subject = evaluated.predictions[index]["subject"]
        outcome = "missed" if labels[index, column] == 1 else "false alarm"
        assert f"<h3>{NAMES[column]}, {outcome}: {subject}, image {index % 2 + 1} of 2</h3>" in page
    assert ".png" not in page


def test_the_worst_cases_are_shown_as_their_files_have_them_with_finding_and_probability(evaluated: Evaluated) -> None:
    page = (evaluated.folder / "report.html").read_text(encoding="utf-8")
    pictures = re.findall(r"data:image/jpeg;base64,([^\"]+)\" alt=\"([^\"]+)\"", page)
    for (plain, _), (overlay, caption) in zip(pictures[::2], pictures[1::2], strict=True):
        small, large = (PIL.Image.open(io.BytesIO(base64.b64decode(each))) for each in (plain, overlay))
        assert small.size == (600, 400)
        assert large.width == 600
        assert large.height > 450  # the caption stands above
        assert re.fullmatch(r".+: (Opacity|Pleural Thickening): probability [\d.e-]+, threshold [\d.e-]+\.", caption)


def test_the_report_says_where_saliency_is_empty(tmp_path: Path) -> None:
    Evaluated(tmp_path, scale=-4.0, num_worst=4)  # every image lowers every output
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("No saliency: nothing raised the output.") == 4
    assert page.count("data:image/jpeg;base64,") == 4


def test_nothing_to_judge_leaves_predictions_and_no_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    test = Set(20, 1, rare=False)
    test.labels[:] = 0
    (tmp_path / "report.html").touch()
    evaluated = Evaluated(tmp_path, test=test)
    assert f"Left out, for lack of positives or negatives in the test split: {', '.join(NAMES)}." in caplog.messages
    assert {row["auroc"] for row in evaluated.findings} == {""}
    assert "auroc" not in evaluated.metrics
    assert len(evaluated.predictions) == 20
    assert not (tmp_path / "report.html").exists()  # nor that of the evaluation before


def test_a_calibration_survives_its_file_and_no_other_weights_or_findings_may_read_it(tmp_path: Path) -> None:
    path, network = tmp_path / "calibration.json", Quadrants()
    thresholds = {NAMES[0]: 0.25, NAMES[1]: 0.5, NAMES[2]: float("nan")}
    write_calibration(path, Calibration(1.5, thresholds), network)
    found = read_calibration(path, NAMES, network)
    assert found.temperature == 1.5
    assert [*found.thresholds.values()] == pytest.approx([*thresholds.values()], nan_ok=True)
    assert read_calibration(None, NAMES, network) == Calibration(1.0, {})
    with pytest.raises(ValueError, match=r"other findings \(Opacity, Pleural Thickening, Rare\)"):
        read_calibration(path, NAMES[::-1], network)
    with torch.no_grad():
        network.scale += 0.1
    with pytest.raises(ValueError, match="other weights: evaluate these weights"):
        read_calibration(path, NAMES, network)
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        read_calibration(tmp_path / "none.json", NAMES, network)
    for content in ("{", "[]", '{"temperature": 1}', '{"temperature": 1, "weights": "", "thresholds": {"x": "y"}}'):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=r"must be the calibration\.json of an evaluation"):
            read_calibration(path, NAMES, network)


FINDINGS = ["Mass", "Large Hernia", "Never", "Always", "Unlabelled"]
SUBJECTS = [f"s{index // 2}" for index in range(40)]


def study() -> tuple[np.ndarray, np.ndarray]:
    """Two images of each of 20 subjects; the hernia is in both images of the last three, and always scores lowest."""
    rng = np.random.default_rng(0)
    labels = (rng.random((40, 5)) < 0.4).astype(float)
    labels[:, 1] = np.arange(40) >= 34
    labels[:, 2], labels[:, 3], labels[:, 4] = 0, 1, np.nan
    labels[:3, 0] = np.nan
    probabilities = np.clip(0.3 + 0.2 * np.nan_to_num(labels) + 0.2 * rng.random(labels.shape), 0, 1)
    probabilities[:, 1] = np.where(labels[:, 1], 0.1, 0.2)
    return labels, probabilities


def rows(threshold: float = 0.5, **changes: np.ndarray) -> list[FindingRow]:
    labels, probabilities = study()
    thresholds = [threshold] * 5
    return finding_rows(FINDINGS, labels, changes.get("probabilities", probabilities), thresholds, SUBJECTS, 200)


def test_every_finding_has_a_line_and_those_that_lack_a_class_have_counts_alone() -> None:
    macro, *singles = found = rows()
    assert [row.finding for row in singles] == FINDINGS
    assert (macro.finding, macro.n, macro.positives) == ("macro", None, None)
    assert [(row.n, row.positives) for row in singles[1:]] == [(40, 6), (40, 0), (40, 40), (0, 0)]
    assert singles[0].n == 37
    assert all(isnan(end) for row in singles[2:] for metric in METRICS for end in getattr(row, metric))
    for metric in METRICS:
        mean = np.mean([getattr(row, metric).value for row in singles[:2]])
        assert getattr(macro, metric).value == pytest.approx(mean)
        for interval in (getattr(row, metric) for row in found[:3]):
            assert isnan(interval.low) or interval.low <= interval.value <= interval.high
    metrics = finding_metrics(found)
    assert len(metrics) == 3 * 3 * len(METRICS)  # value, low and high of the mean and of two findings
    assert metrics["auroc_Large_Hernia_high"] == singles[1].auroc.high
    assert isnan(singles[1].ece.low)  # chance raises it
    assert metrics["auroc"] == macro.auroc.value


def test_a_proportion_at_0_or_1_claims_no_certainty() -> None:
    hernia = rows()[2]
    assert (hernia.sensitivity.value, hernia.specificity.value, hernia.auroc.value) == (0, 1, 0)
    # Three subjects have it and 17 do not, however many images they have.
    for interval, count in ((hernia.sensitivity, 3), (hernia.specificity, 17), (hernia.auroc, 3)):
        assert interval[1:] == pytest.approx([float(end) for end in wilson_interval(interval.value, count)])
        assert interval.high - interval.low > 0.18


def test_a_mean_of_certain_proportions_claims_no_certainty_either() -> None:
    macro, mass, hernia = rows(threshold=0)[:3]
    assert macro.sensitivity.value == mass.sensitivity.value == hernia.sensitivity.value == 1
    assert macro.sensitivity.high == 1
    assert macro.sensitivity.low == pytest.approx((mass.sensitivity.low + hernia.sensitivity.low) / 2)
    mass = rows(probabilities=np.nan_to_num(study()[0]))[1]
    assert mass.ap.value == mass.auroc.value == 1
    assert isnan(mass.ap.low)  # where nothing stands in
    assert mass.auroc.low < 0.9
