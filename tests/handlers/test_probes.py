import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Decoded, evaluated, pick, small_resnet, table
from monai.data import DataLoader
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import nn

from dissect_monai.data.datalists import SPLITS, Datalist, label_matrix
from dissect_monai.handlers.probes import ProbeHandler, VolumeProbeHandler, check_probe_data, refuse_unlabelled
from dissect_monai.metrics.probes import extract_features, knn_scores
from dissect_monai.networks.encoders import feature_maps

pytestmark = pytest.mark.usefixtures("_images_are_nowhere")
NAN = float("nan")
NAMES = ["Opacity", "Nodule", "Rare"]
IMAGES = {"training": 40, "validation": 24, "test": 30}
PATCHES = {"training": 24, "validation": 12, "test": 16}  # of each task
GROUPS = {"btcv": "abdomen", "chaos": "abdomen", "brats": "head"}


class Probed:
    """One evaluation, looked at by several tests."""

    def __init__(self, folder: Path, handler: Any) -> None:
        self.metrics = evaluated(nn.Identity(), handler.loaders["test"], handler).state.metrics
        self.findings, self.differences = (table(folder / f"{name}.csv") for name in ("findings", "differences"))
        with np.load(folder / "scores.npz") as arrays:
            self.arrays = dict(arrays)

    def of(self, key: str) -> set[str]:
        return {row[key] for row in self.findings}


# ---- images ------------------------------------------------------------------------------------------------------


def make_datalist() -> tuple[Datalist, dict[str, DataLoader]]:
    """Two images a subject; opacities are bright, nodules small and bright, and no test image has the rare finding."""
    rng = np.random.default_rng(0)
    splits, loaders = {}, {}
    for split, size in IMAGES.items():
        labels = np.stack([rng.random(size) < share for share in (0.5, 0.4, 0.2)], axis=1).astype(float)
        if split == "test":
            labels[:, 2] = 0
        views = rng.integers(0, 2, size)
        images = rng.random((size, 1, 32, 32)) * 0.6 + 0.1 * labels[:, :1, None, None]
        images[:, 0, 8:14, 8:14] += 0.25 * labels[:, 1, None, None]
        images[:, 0, :4, :4] = views[:, None, None]
        labels[::7, 1] = NAN
        splits[split] = [
            {"image": f"{split}{i}", "label": label.tolist(), "subject": f"{split}{i // 2}", "view": ["AP", "PA"][view]}
            for i, (label, view) in enumerate(zip(labels, views, strict=True))
        ]
        loaders[split] = DataLoader(Decoded(splits[split], images.astype(np.float32)), batch_size=8)
    return Datalist(**splits, label_names=NAMES), loaders


def probe_images(folder: Path, encoders: dict[str, nn.Module] | None = None, **kwargs: Any) -> Probed:
    _, loaders = make_datalist()
    encoders = encoders or {"pretrained": small_resnet(0), "random": small_resnet(1)}
    handler = ProbeHandler(encoders, loaders, NAMES, folder, num_samples=40, **kwargs)
    return Probed(folder, handler)


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> Probed:
    folder = tmp_path_factory.mktemp("probe") / "new"
    return probe_images(folder, shortcut="view", findings=[*NAMES, "No finding"])


def test_judges_every_encoder_and_the_pixels_by_both_probes(probed: Probed) -> None:
    judged = {(row["source"], row["features"], row["probe"]) for row in probed.findings}
    sources = [(name, kind) for name in ("pretrained", "random") for kind in ("last", "stages")] + [("pixels", "pca")]
    assert judged == {(*source, kind) for source in sources for kind in ("linear", "knn")}
    questions = {(row["finding"], row["question"]) for row in probed.findings}
    names = ("macro", "Opacity", "Nodule", "No finding")  # none of the test images has the rare one
    assert questions == {("view=AP", "shortcut")} | {(name, "findings") for name in names}


def test_findings_have_a_value_an_interval_around_it_and_a_metric(probed: Probed) -> None:
    assert list(probed.findings[0]) == [
        "source", "features", "probe", "question", "finding", "auroc", "auroc_low", "auroc_high", "ap", "ap_low",
        "ap_high", "n", "positives",
    ]  # fmt: skip
    for row in probed.findings:
        for metric in ("auroc", "ap"):
            assert 0 <= float(row[f"{metric}_low"]) <= float(row[metric]) <= float(row[f"{metric}_high"]) <= 1
        name = f"{row['source']}_{row['features']}_{row['probe']}_auroc_{row['finding'].replace(' ', '_')}"
        for end in ("", "_low", "_high"):
            assert probed.metrics[name + end] == pytest.approx(float(row[f"auroc{end}"]), abs=1e-4)


def test_a_finding_without_positives_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    probed = probe_images(tmp_path, findings=["Rare"])
    assert "Left out, for lack of positives or negatives: Rare." in caplog.messages
    assert probed.findings == probed.differences == []


def test_values_are_those_of_sklearn_and_scores_are_kept_for_later_comparisons(probed: Probed) -> None:
    datalist, loaders = make_datalist()
    train, test = (
        extract_features(small_resnet(0), loaders[each], "cpu", feature_maps) for each in ("training", "test")
    )
    scores = knn_scores(train.last, label_matrix(datalist.training, NAMES), test.last)[:, 1]
    np.testing.assert_allclose(probed.arrays["scores/pretrained/last/knn/findings"][:, 1], scores)
    labels = label_matrix(datalist.test, NAMES)
    known = ~np.isnan(truth := labels[:, 1])
    row = pick(probed.findings, source="pretrained", features="last", probe="knn", finding="Nodule")
    assert float(row["auroc"]) == pytest.approx(roc_auc_score(truth[known], scores[known]), abs=1e-4)
    assert float(row["ap"]) == pytest.approx(average_precision_score(truth[known], scores[known]), abs=1e-4)
    assert (int(row["n"]), int(row["positives"])) == (known.sum(), np.nansum(truth)) == (25, np.nansum(truth))
    clear, ill = (labels == 0).all(1).sum(), (labels == 1).any(1).sum()  # of others it is unknown
    row = pick(probed.findings, source="pixels", probe="knn", finding="No finding")
    assert (int(row["n"]), int(row["positives"])) == (clear + ill, clear)
    assert clear + ill < len(labels) == len(probed.arrays["subjects"])
    row = pick(probed.findings, source="pretrained", features="stages", probe="linear", finding="view=AP")
    label, score = (probed.arrays[name] for name in ("labels/shortcut", "scores/pretrained/stages/linear/shortcut"))
    assert float(row["auroc"]) == pytest.approx(roc_auc_score(label[:, 0], score[:, 0]), abs=1e-4)
    assert float(row["auroc"]) > 0.9


def test_compares_the_first_encoder_with_every_baseline(probed: Probed) -> None:
    assert list(probed.differences[0]) == ["task", "features", "probe", "baseline", "difference", "low", "high"]
    compared = [tuple(row.values())[:4] for row in probed.differences]
    assert len(compared) == len(set(compared)) == 2 * 2 * 2 * 2  # questions, features, probes, baselines
    for row in probed.differences:
        finding = "macro" if row["task"] == "findings" else "view=AP"
        features = "pca" if row["baseline"] == "pixels" else row["features"]
        ours = pick(probed.findings, source="pretrained", features=row["features"], probe=row["probe"], finding=finding)
        theirs = pick(probed.findings, source=row["baseline"], features=features, probe=row["probe"], finding=finding)
        expected = float(ours["auroc"]) - float(theirs["auroc"])
        assert float(row["difference"]) == pytest.approx(expected, abs=2e-4)
        assert float(row["low"]) <= float(row["high"])


def test_a_difference_from_itself_is_zero_in_every_resample(tmp_path: Path) -> None:
    same = small_resnet()
    probed = probe_images(tmp_path, encoders={"pretrained": same, "copy": same}, findings="Opacity")
    assert probed.of("finding") == {"Opacity"}  # one finding has no macro
    for row in probed.differences:
        if row["baseline"] == "copy":
            assert [float(row[key]) for key in ("difference", "low", "high")] == [0, 0, 0]


def test_folds_score_every_labelled_image_by_the_linear_probe(tmp_path: Path) -> None:
    probed = probe_images(tmp_path, {"only": small_resnet()}, num_folds=3)
    assert probed.of("probe") == {"linear"}
    row = pick(probed.findings, source="pixels", finding="Opacity")
    assert int(row["n"]) == sum(IMAGES.values())
    assert "Rare" in probed.of("finding")  # the training images have it


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"findings": ["Mass", "Nodule"]}, "the labels must include the `findings` Mass, got Opacity, Nodule, Rare"),
        (
            {"shortcut": "subject"},
            "`shortcut` must name a key of the items in dataset.json with two values, got 'subject' with",
        ),
        ({"num_folds": 48}, "`num_folds` must be at most the 47 subjects, got 48"),
    ],
)
def test_rejects_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProbeHandler({"only": small_resnet()}, make_datalist()[1], NAMES, "nowhere", **kwargs)


def test_refuses_data_without_labels_or_with_nothing_to_score() -> None:
    datalist, _ = make_datalist()
    refuse_unlabelled(datalist)
    refuse_unlabelled(datalist, "Opacity")
    with pytest.raises(ValueError, match="needed in training, validation, test; validation, test has none"):
        refuse_unlabelled(datalist._replace(validation=[], test=[]))
    with pytest.raises(ValueError, match=r"no finding \(Rare\) has both a 1 and a 0 in training and in test"):
        refuse_unlabelled(datalist, "Rare")


# ---- patches of volumes ------------------------------------------------------------------------------------------


class Means(nn.Module):
    """Features of patches of a hand-made set: their mean, and their first three voxels."""

    def encode(self, images: torch.Tensor) -> tuple[None, list[torch.Tensor]]:
        mean, first = images.mean((2, 3, 4), keepdim=True), images[:, 0, 0, 0, :3].view(-1, 3, 1, 1, 1)
        return None, [mean, torch.cat([mean, first], 1)]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images


def hand_made(groups: dict[str, str] = GROUPS) -> dict[str, DataLoader]:
    """The first voxels tell the task, the mean within it whether a liver is there; gallbladders look like nothing."""
    rng = np.random.default_rng(0)
    loaders = {}
    for split, size in PATCHES.items():
        items, images = [], []
        for number, task in enumerate(groups):
            for index in range(size):
                liver, gallbladder = float(index % 2), float(rng.random() < 0.5)
                structures = {"liver": NAN if index == 3 else liver, "gallbladder": gallbladder, "uterus": NAN}
                item = {"image": f"{task}{split}{index}", "subject": f"{task}{split}{index // 4}", "task": task}
                item |= {"group": groups[task], **({} if task == "brats" else {"structures": structures})}
                items.append(item)
                image = rng.random((1, 4, 4, 4)) * 0.2 + 0.3 * liver + 0.2 * number
                image[0, 0, 0, :3] = np.eye(3)[number]
                images.append(torch.as_tensor(image, dtype=torch.float32))
        loaders[split] = DataLoader(Decoded(items, torch.stack(images)), batch_size=7)
    return loaders


def probe_volumes(folder: Path, loaders: dict[str, DataLoader], **kwargs: Any) -> Probed:
    encoders = {"pretrained": Means(), **kwargs.pop("others", {})}
    names = kwargs.pop("label_names", [])
    return Probed(folder, VolumeProbeHandler(encoders, loaders, names, folder, num_samples=10, **kwargs))


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Probed:
    return probe_volumes(tmp_path_factory.mktemp("probe"), hand_made(), others={"random": Means()})


def test_every_question_has_its_columns(volumes: Probed) -> None:
    columns: dict[str, set[str]] = {}
    for row in volumes.findings:
        columns.setdefault(row["question"], set()).add(row["finding"])
    structures = {f"{task}/{name}" for task in ("btcv", "chaos") for name in ("liver", "gallbladder")}
    assert [*columns.items()] == [
        ("structures", {"macro", *structures}),
        ("domains", {"macro", "btcv", "chaos", "brats"}),
        ("domains_in_group", {"macro", "btcv", "chaos"}),
    ]


def test_a_structure_is_asked_of_patches_of_its_task_only(volumes: Probed) -> None:
    labels, size = volumes.arrays["labels/structures"], PATCHES["test"]  # liver and gallbladder of btcv, then chaos
    known = ~np.isnan(labels)
    assert known.reshape(3, size, 4).sum(1).tolist() == [[size - 1, size, 0, 0], [0, 0, size - 1, size], [0] * 4]
    row = pick(volumes.findings, source="intensity", probe="knn", finding="btcv/liver")
    assert (int(row["n"]), int(row["positives"])) == (size - 1, int(np.nansum(labels[:, 0])))
    score = volumes.arrays["scores/intensity/histogram/knn/structures"]
    expected = roc_auc_score(labels[known[:, 0], 0], score[known[:, 0], 0])
    assert float(row["auroc"]) == pytest.approx(expected, abs=1e-4)


def test_domains_are_asked_of_all_patches_and_within_a_group_of_its_patches(volumes: Probed) -> None:
    task = np.repeat([1, 2, 0], PATCHES["test"])  # btcv, chaos, brats
    np.testing.assert_array_equal(volumes.arrays["labels/domains"], np.eye(3)[task])
    within = np.array([[NAN, NAN], [1, 0], [0, 1]])[task]
    np.testing.assert_array_equal(volumes.arrays["labels/domains_in_group"], within)


def test_every_row_has_a_metric_of_its_own_and_macro_is_the_mean_of_its_question(volumes: Probed) -> None:
    places = {(row["source"], row["features"], row["probe"], row["question"]) for row in volumes.findings}
    names = {
        f"{row['source']}_{row['features']}_{row['probe']}_auroc_{row['question']}_{row['finding']}"
        for row in volumes.findings
    }
    assert len(places) == 5 * 2 * 3  # kinds of features, probes, questions
    assert len(names) == len(volumes.findings)
    assert {f"{name}{end}" for name in names for end in ("", "_low", "_high")} == set(volumes.metrics)
    for place in places:
        wanted = dict(zip(("source", "features", "probe", "question"), place, strict=True))
        rows = [row for row in volumes.findings if wanted.items() <= row.items()]
        values = [float(row["auroc"]) for row in rows if row["finding"] != "macro"]
        assert float(pick(rows, finding="macro")["auroc"]) == pytest.approx(np.mean(values), abs=1e-4)
    compared = [tuple(row.values())[:4] for row in volumes.differences]
    assert len(compared) == len(set(compared)) == 3 * 2 * 2 * 2  # questions, features, probes, baselines


def test_knowing_the_task_does_not_help_with_its_structures(tmp_path: Path) -> None:
    loaders = hand_made({"btcv": "abdomen", "chaos": "abdomen"})
    for loader in loaders.values():
        for item in loader.dataset.data:  # a liver in all of one set and in none of the other
            item["structures"]["liver"] = float(item["task"] == "btcv")
    handler = VolumeProbeHandler({"only": Means()}, loaders, [], tmp_path)
    (structures,) = (question for question in handler.questions if question.name == "structures")
    assert structures.columns == ["btcv/gallbladder", "chaos/gallbladder"]


def test_the_probes_of_a_task_see_no_other(tmp_path: Path) -> None:
    both, alone = (hand_made(groups) for groups in ({"btcv": "a", "chaos": "b"}, {"btcv": "a"}))
    for split in SPLITS:  # the same patches of btcv, whatever else there is
        size = PATCHES[split]
        alone[split].dataset.data = both[split].dataset.data[:size]
        alone[split].dataset.images = both[split].dataset.images[:size]
    ours, theirs = (probe_volumes(tmp_path, loaders) for loaders in (both, alone))
    for key in ("scores/pretrained/last/linear/structures", "scores/intensity/histogram/knn/structures"):
        np.testing.assert_allclose(ours.arrays[key][: PATCHES["test"], :2], theirs.arrays[key], rtol=1e-6)
    assert theirs.of("question") == {"structures"}  # one task is no shortcut


def test_the_log_names_what_lacks_a_class_and_every_macro(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dissect_monai"):
        assert probe_volumes(tmp_path, hand_made(), pixels=False).of("source") == {"pretrained"}
    assert [record.message for record in caplog.records if "Left out" in record.message] == [
        "Left out of structures, for lack of patches with it or without it in training or in test: btcv/uterus, "
        "chaos/uterus."
    ]
    lines = [record.message for record in caplog.records if "AUROC" in record.message]
    assert len(lines) == 3 * 2 * 2  # questions, kinds of features, probes
    assert all("_macro" in line for line in lines)


def test_labels_of_whole_volumes_are_findings(tmp_path: Path) -> None:
    loaders = hand_made()
    for loader in loaders.values():
        for index, item in enumerate(loader.dataset.data):
            if index % 5:
                item["label"] = [float(index // 4 % 2)]
    probed = probe_volumes(tmp_path, loaders, label_names=["Fracture"])
    row = pick(probed.findings, source="intensity", probe="knn", question="findings")
    assert int(row["n"]) == sum(1 for index in range(3 * PATCHES["test"]) if index % 5)
    assert probed.metrics["intensity_histogram_knn_auroc_Fracture"] == pytest.approx(float(row["auroc"]), abs=1e-4)


def test_an_empty_split_or_one_task_without_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is nothing to ask of the features"):
        VolumeProbeHandler({"only": Means()}, hand_made({"brats": "head"}), [], tmp_path)
    mapped = [{"image": "a.nii", "label": "b.nii", "labels": {"liver": [1]}}]
    datalist = Datalist(mapped, mapped, mapped, task_names=["one"])
    check_probe_data(datalist, "/data")
    with pytest.raises(ValueError, match=r"are needed in .*; test has none in /data.*Add the list `test`"):
        check_probe_data(datalist._replace(test=[]), "/data")
    bare = datalist._replace(test=[{"image": "a.nii"}])
    with pytest.raises(ValueError, match=r"nothing to ask of the features: give label maps .* got neither in /data"):
        check_probe_data(bare, "/data")
    check_probe_data(bare._replace(label_names=["Fracture"]), "/data")
    check_probe_data(bare._replace(task_names=["a", "b"]), "/data")
