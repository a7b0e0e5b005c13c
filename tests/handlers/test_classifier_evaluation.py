from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from monai.handlers import MetricsSaver
from sklearn.metrics import average_precision_score, confusion_matrix, roc_auc_score, roc_curve
from torch import Tensor, nn

from dissect_monai.handlers.classifier import ClassifierEvaluation

NAMES = ["Opacity", "Pleural Thickening", "Rare"]
METRICS = ("auroc", "ap", "sensitivity", "specificity", "ece")


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
        handler = ClassifierEvaluation(
            DataLoader(self.validation, batch_size=8),
            NAMES,
            folder,
            num_samples=50,
            facts={"data": "made up"},
            **kwargs,
        )
        evaluator = SupervisedEvaluator(
            device="cpu",
            val_data_loader=DataLoader(self.test, batch_size=8),
            network=self.network,
            val_handlers=[handler, MetricsSaver(folder, metrics="*")],
            decollate=False,
        )
        logging.getLogger("ignite").setLevel(logging.ERROR)
        evaluator.run()
        self.metrics = evaluator.state.metrics
        self.findings, self.predictions = table(folder / "findings.csv"), table(folder / "predictions.csv")
        with np.load(folder / "scores.npz") as arrays:
            self.arrays = dict(arrays)

    def logits(self, split: Set) -> np.ndarray:
        with torch.no_grad():
            return self.network(split.images).double().numpy()


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def numbers(row: dict[str, str], names: Sequence[str]) -> list[float]:
    return [float(row[name]) for name in names]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    return Evaluated(tmp_path_factory.mktemp("evaluated"))


def test_findings_are_those_of_sklearn(evaluated: Evaluated) -> None:
    probabilities, labels = sigmoid(evaluated.logits(evaluated.test)), evaluated.test.labels.numpy()
    for index, row in enumerate(evaluated.findings[1:3]):
        known = ~np.isnan(labels[:, index])
        label, probability = labels[known, index], probabilities[known, index]
        tn, fp, fn, tp = confusion_matrix(label, probability >= float(row["threshold"])).ravel()
        expected = [
            roc_auc_score(label, probability),
            average_precision_score(label, probability),
            tp / (tp + fn),
            tn / (tn + fp),
        ]
        assert row["finding"] == NAMES[index]
        assert numbers(row, METRICS[:4]) == pytest.approx(expected, abs=1e-4)
        assert numbers(row, ("n", "positives")) == [known.sum(), label.sum()]


def test_thresholds_come_from_validation_alone(evaluated: Evaluated) -> None:
    probabilities, labels = sigmoid(evaluated.logits(evaluated.validation)), evaluated.validation.labels.numpy()
    for index, row in enumerate(evaluated.findings[1:3]):
        known = ~np.isnan(labels[:, index])
        label, probability = labels[known, index], probabilities[known, index]
        fpr, tpr, _ = roc_curve(label, probability)
        called = probability >= float(row["threshold"])
        assert called[label == 1].mean() - called[label == 0].mean() == pytest.approx((tpr - fpr).max())


def test_the_macro_row_is_the_mean_and_intervals_hold_their_value(evaluated: Evaluated) -> None:
    macro, *singles = evaluated.findings[:3]
    assert macro["finding"] == "macro"
    assert macro["n"] == macro["positives"] == ""
    for metric in METRICS:
        mean = np.mean([float(row[metric]) for row in singles])
        assert float(macro[metric]) == pytest.approx(mean, abs=1e-4)
        for row in evaluated.findings[:3]:
            assert float(row[f"{metric}_low"]) <= float(row[metric]) <= float(row[f"{metric}_high"])


def test_findings_without_positives_are_named_with_their_counts_and_have_no_metrics(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evaluated = Evaluated(tmp_path)
    assert [row["finding"] for row in evaluated.findings] == ["macro", *NAMES]
    rare = evaluated.findings[-1]
    assert (rare.pop("n"), rare.pop("positives"), float(rare.pop("threshold")) > 0) == ("60", "0", True)
    assert set(rare.values()) == {"Rare", ""}
    assert not [name for name in evaluated.metrics if "Rare" in name]
    assert "Left out, for lack of positives or negatives in the test split: Rare." in caplog.text


def test_predictions_name_image_subject_probability_and_label(evaluated: Evaluated) -> None:
    row = evaluated.predictions[7]
    probability = sigmoid(evaluated.logits(evaluated.test))[7]
    assert row["image"] == "folder/1_7.png"
    assert row["subject"] == "3"
    assert numbers(row, [f"{name} probability" for name in NAMES]) == pytest.approx(probability, abs=1e-6)
    assert row["Pleural Thickening label"] == ""
    assert row["Rare label"] == "0"
    assert len(evaluated.predictions) == 60


def test_scores_are_laid_out_as_those_of_the_probes(evaluated: Evaluated) -> None:
    assert set(evaluated.arrays) == {"subjects", "labels/findings", "scores/classifier/-/finetune/findings"}
    np.testing.assert_array_equal(evaluated.arrays["labels/findings"], evaluated.test.labels.numpy())
    assert evaluated.arrays["subjects"].tolist() == [str(item["subject"]) for item in evaluated.test.data]


def test_metrics_are_left_for_the_saver(tmp_path: Path) -> None:
    metrics = Evaluated(tmp_path).metrics
    assert {"auroc", "auroc_low", "auroc_high", "ece_Pleural_Thickening", "temperature"} <= set(metrics)
    saved = (tmp_path / "metrics.csv").read_text()
    assert "sensitivity_Pleural_Thickening_high" in saved


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


def test_the_report_shows_curves_and_the_worst_cases(tmp_path: Path) -> None:
    evaluated = Evaluated(tmp_path, num_worst=4)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "made up" in page
    assert page.count("data:image/png;base64,") == 2 + 2 * 4
    wrong = evaluated.logits(evaluated.test)[:, :2].copy()
    labels = evaluated.test.labels.numpy()[:, :2]
    thresholds = np.array([float(row["threshold"]) for row in evaluated.findings[1:3]])
    wrong -= np.log(thresholds / (1 - thresholds))
    missed, alarm = np.where(labels == 1, wrong, np.inf), np.where(labels == 0, wrong, -np.inf)
    for place in (missed.argmin(), alarm.argmax()):
        assert f"1_{place // 2}.png" in page


def test_the_report_says_where_saliency_is_empty(tmp_path: Path) -> None:
    Evaluated(tmp_path, scale=-4.0, num_worst=4)  # every image lowers every output
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("No saliency: nothing raised the output.") == 4
    assert page.count("data:image/png;base64,") == 2 + 4


def test_the_report_says_what_it_rests_on(tmp_path: Path) -> None:
    Evaluated(tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    facts = {
        "Test images": "60",
        "Validation images": "50",
        "Bootstrap resamples": "50",
        "Date": date.today().isoformat(),
    }
    for name, value in facts.items():
        assert f"<dt>{name}</dt><dd>{value}</dd>" in page
    assert "<dt>Software</dt><dd>dissect_monai " in page
    assert "Rare (0 positives of 60)." in page
    assert "<td>60</td><td>0</td><td>–</td>" in page
    for caption in ("ROC curves on the test split: ", "Reliability on the test split: "):
        assert f"<figcaption>{caption}" in page


def test_the_report_is_written_from_a_package_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("dissect_monai.handlers.classifier.version", version)
    Evaluated(tmp_path)
    assert "<dd>dissect_monai not installed</dd>" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_nothing_to_judge_leaves_predictions_and_no_report(tmp_path: Path) -> None:
    test = Set(20, 1, rare=False)
    test.labels[:] = 0
    evaluated = Evaluated(tmp_path, test=test)
    assert [(row["finding"], row["positives"], row["auroc"]) for row in evaluated.findings[1:]] == [
        (name, "0", "") for name in NAMES
    ]
    assert evaluated.findings[0]["auroc"] == ""
    assert "auroc" not in evaluated.metrics
    assert len(evaluated.predictions) == 20
    assert not (tmp_path / "report.html").exists()


def test_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    evaluated = Evaluated(tmp_path)
    assert evaluated.network.training
    assert evaluated.network.scale.grad is None
    assert evaluated.network.scale.item() == 4
