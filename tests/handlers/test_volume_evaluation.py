from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import patch_transform
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from monai.networks.nets import SegResNet
from sklearn.metrics import roc_auc_score
from test_evaluation import evaluate, pick, table
from torch import nn

from dissect_monai.data.datalists import SPLITS
from dissect_monai.data.domains import aggregate
from dissect_monai.data.patches import patch_dataset
from dissect_monai.handlers.reconstruction import ReconstructionHandler
from dissect_monai.handlers.volume_probes import VolumeProbeHandler, check_probe_data
from dissect_monai.phantoms.volumes import write_volume_phantoms
from dissect_monai.transforms.augment import Corrupt
from dissect_monai.transforms.views import MaskedImages

NAN = float("nan")
SIZES = {"training": 24, "validation": 12, "test": 16}  # of each task
GROUPS = {"btcv": "abdomen", "chaos": "abdomen", "brats": "head"}


def segresnet(seed: int = 0, spatial_dims: int = 3) -> SegResNet:
    torch.manual_seed(seed)
    return SegResNet(spatial_dims, init_filters=8, out_channels=1, blocks_down=(1, 1), blocks_up=(1,)).eval()


class Means(nn.Module):
    """Features of patches of a hand-made set: their mean, and their first three voxels."""

    def encode(self, images: torch.Tensor) -> tuple[None, list[torch.Tensor]]:
        mean, first = images.mean((2, 3, 4), keepdim=True), images[:, 0, 0, 0, :3].view(-1, 3, 1, 1, 1)
        return None, [mean, torch.cat([mean, first], 1)]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images


class Decoded(Dataset):
    """Patches that come with their data list, as `patch_dataset` gives them."""

    def __init__(self, items: list[dict[str, Any]], images: torch.Tensor) -> None:
        super().__init__(items)
        self.images = images

    def _transform(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index]}


def hand_made(groups: dict[str, str] = GROUPS, **changes: Any) -> dict[str, DataLoader]:
    """The first voxels tell the task, the mean within it whether a liver is there; gallbladders look like nothing."""
    rng = np.random.default_rng(0)
    loaders = {}
    for split, size in SIZES.items():
        items, images = [], []
        for number, task in enumerate(groups):
            for index in range(size):
                liver, gallbladder = float(index % 2), float(rng.random() < 0.5)
                structures = {"liver": liver, "gallbladder": gallbladder, "uterus": NAN}
                if index == 3:
                    structures["liver"] = NAN
                item = {"image": f"{task}{split}{index}", "subject": f"{task}{split}{index // 4}", "task": task}
                item |= {"group": groups[task], "structures": structures, **changes}
                if task == "brats":
                    del item["structures"]
                items.append(item)
                image = rng.random((1, 4, 4, 4)) * 0.2 + 0.3 * liver + 0.2 * number
                image[0, 0, 0, :3] = np.eye(3)[number]
                images.append(torch.as_tensor(image, dtype=torch.float32))
        loaders[split] = DataLoader(Decoded(items, torch.stack(images)), batch_size=7)
    return loaders


def probe(folder: Path, loaders: dict[str, DataLoader], **kwargs: Any) -> dict[str, float]:
    encoders = {"pretrained": Means(), "random": Means()}
    handler = VolumeProbeHandler(encoders, loaders, folder, num_samples=kwargs.pop("num_samples", 30), **kwargs)
    return evaluate(handler, loaders["test"], encoders["pretrained"])


class Probed:
    """One evaluation, looked at by several tests."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.loaders = hand_made(**changes)
        self.metrics = probe(folder, self.loaders)
        self.findings, self.differences = (table(folder / f"{name}.csv") for name in ("findings", "differences"))
        with np.load(folder / "scores.npz") as arrays:
            self.arrays = dict(arrays)

    def columns(self, question: str) -> set[str]:
        return {row["finding"] for row in self.findings if row["question"] == question} - {"macro"}


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> Probed:
    return Probed(tmp_path_factory.mktemp("probe"))


# --- the questions


def test_every_question_has_its_columns(probed: Probed) -> None:
    assert list(dict.fromkeys(row["question"] for row in probed.findings)) == [
        "structures", "domains", "domains_in_group"
    ]  # fmt: skip
    structures = {f"{task}/{name}" for task in ("btcv", "chaos") for name in ("liver", "gallbladder")}
    assert probed.columns("structures") == structures
    assert probed.columns("domains") == {"btcv", "chaos", "brats"}
    assert probed.columns("domains_in_group") == {"btcv", "chaos"}


def test_a_structure_is_asked_of_patches_of_its_task_only(probed: Probed) -> None:
    labels = probed.arrays["labels/structures"]  # btcv/liver, btcv/gallbladder, chaos/liver, chaos/gallbladder
    known, size = ~np.isnan(labels), SIZES["test"]
    assert known[:size, 0].sum() == size - 1  # one is unknown
    assert known[:size, 1].all()
    assert not known[size:, :2].any()
    assert not known[:size, 2:].any()
    assert not known[2 * size :].any()
    row = pick(probed.findings, source="intensity", probe="knn", finding="btcv/liver")
    assert (int(row["n"]), int(row["positives"])) == (size - 1, int(np.nansum(labels[:, 0])))


def test_domains_are_asked_of_all_patches_and_within_a_group_of_its_patches(probed: Probed) -> None:
    size = SIZES["test"]
    np.testing.assert_array_equal(probed.arrays["labels/domains"], np.eye(3)[[1] * size + [2] * size + [0] * size])
    within = probed.arrays["labels/domains_in_group"]
    np.testing.assert_array_equal(within[: 2 * size], np.eye(2)[[0] * size + [1] * size])
    assert np.isnan(within[2 * size :]).all()


def test_separable_features_are_told_apart(probed: Probed) -> None:
    for features, probe_name in (("last", "linear"), ("last", "knn"), ("stages", "linear"), ("stages", "knn")):
        name = f"pretrained_{features}_{probe_name}_auroc"
        for column in ("domains_macro", "domains_in_group_macro", "structures_btcv/liver", "structures_chaos/liver"):
            assert probed.metrics[f"{name}_{column}"] == pytest.approx(1)
        assert probed.metrics[f"{name}_structures_btcv/gallbladder"] < 0.9


def test_knowing_the_task_does_not_help_with_its_structures(tmp_path: Path) -> None:
    loaders = hand_made({"btcv": "abdomen", "chaos": "abdomen"})
    for loader in loaders.values():
        for item in loader.dataset.data:  # a liver in all of one set and hardly in the other
            item["structures"]["liver"] = float(item["task"] == "btcv")
    handler = VolumeProbeHandler({"only": Means()}, loaders, tmp_path)
    (structures,) = (question for question in handler.questions if question.name == "structures")
    assert structures.columns == ["btcv/gallbladder", "chaos/gallbladder"]


def test_the_probes_of_a_task_see_no_other(tmp_path: Path) -> None:
    both, alone = (hand_made(groups) for groups in ({"btcv": "a", "chaos": "b"}, {"btcv": "a"}))
    for split in SPLITS:  # the same patches of btcv, whatever else there is
        size = SIZES[split]
        alone[split].dataset.data = both[split].dataset.data[:size]
        alone[split].dataset.images = both[split].dataset.images[:size]
    for name, loaders in (("both", both), ("alone", alone)):
        probe(tmp_path / name, loaders)
    scores = [np.load(tmp_path / name / "scores.npz") for name in ("both", "alone")]
    for key in ("scores/pretrained/last/linear/structures", "scores/intensity/histogram/knn/structures"):
        np.testing.assert_allclose(scores[0][key][: SIZES["test"], :2], scores[1][key], rtol=1e-6)


def test_columns_without_both_classes_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    probe(tmp_path, hand_made())
    assert [record.message for record in caplog.records if "Left out" in record.message] == [
        "Left out of structures, for lack of patches with it or without it in training or in test: btcv/uterus, "
        "chaos/uterus."
    ]


def test_labels_of_whole_volumes_are_findings(tmp_path: Path) -> None:
    loaders = hand_made()
    for loader in loaders.values():
        for index, item in enumerate(loader.dataset.data):
            if index % 5:
                item["label"] = [float(index // 4 % 2)]
    metrics = probe(tmp_path, loaders, label_names=["Fracture"])
    row = pick(table(tmp_path / "findings.csv"), source="intensity", probe="knn", question="findings")
    assert int(row["n"]) == sum(1 for index in range(3 * SIZES["test"]) if index % 5)
    assert metrics["intensity_histogram_knn_auroc_Fracture"] == pytest.approx(float(row["auroc"]), abs=1e-4)


def test_one_task_is_no_shortcut(tmp_path: Path) -> None:
    probed = Probed(tmp_path, groups={"btcv": "abdomen"})
    assert {row["question"] for row in probed.findings} == {"structures"}
    assert {row["task"] for row in probed.differences} == {"structures"}
    assert "pretrained_last_linear_auroc_structures_macro" in probed.metrics


# --- the tables


def test_judges_encoders_and_intensities_by_both_probes(probed: Probed, tmp_path: Path) -> None:
    sources = [(name, kind) for name in ("pretrained", "random") for kind in ("last", "stages")]
    sources.append(("intensity", "histogram"))
    judged = {(row["source"], row["features"], row["probe"]) for row in probed.findings}
    assert judged == {(*source, kind) for source in sources for kind in ("linear", "knn")}
    compared = [tuple(row.values())[:4] for row in probed.differences]
    assert len(compared) == len(set(compared)) == 3 * 2 * 2 * 2  # questions, features, probes, baselines
    probe(tmp_path, hand_made(), intensity=False)
    assert {row["source"] for row in table(tmp_path / "findings.csv")} == {"pretrained", "random"}


def test_every_row_has_a_metric_of_its_own_and_an_interval_around_it(probed: Probed) -> None:
    names = {
        f"{row['source']}_{row['features']}_{row['probe']}_auroc_{row['question']}_{row['finding']}"
        for row in probed.findings
    }
    assert len(names) == len(probed.findings)
    assert {f"{name}{end}" for name in names for end in ("", "_low", "_high")} == set(probed.metrics)
    for row in probed.findings:
        for metric in ("auroc", "ap"):
            assert 0 <= float(row[f"{metric}_low"]) <= float(row[metric]) <= float(row[f"{metric}_high"]) <= 1


def test_macro_is_the_mean_over_the_columns_of_its_question(probed: Probed) -> None:
    for question in ("structures", "domains", "domains_in_group"):
        rows = [row for row in probed.findings if row["question"] == question and row["source"] == "intensity"]
        rows = [row for row in rows if row["probe"] == "linear"]
        values = [float(row["auroc"]) for row in rows if row["finding"] != "macro"]
        assert float(pick(rows, finding="macro")["auroc"]) == pytest.approx(np.mean(values), abs=1e-4)


def test_intensities_are_judged_by_their_histogram(probed: Probed) -> None:
    label, score = (
        probed.arrays[name][:, 0] for name in ("labels/structures", "scores/intensity/histogram/knn/structures")
    )
    known = ~np.isnan(label)
    row = pick(probed.findings, source="intensity", probe="knn", finding="btcv/liver")
    assert float(row["auroc"]) == pytest.approx(roc_auc_score(label[known], score[known]), abs=1e-4)


# --- volumes


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    tasks = ("abdomen_ct", "abdomen_mr", "heart_mr")
    return write_volume_phantoms(tmp_path_factory.mktemp("phantoms"), 3, 2, 2, image_size=24, tasks=tasks)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_phantoms_are_evaluated_from_their_folders(phantoms: list[Path], tmp_path: Path, spatial_dims: int) -> None:
    datalist = aggregate(phantoms)
    check_probe_data(datalist, phantoms)
    transform = patch_transform(spatial_dims, pixdim=12, size=8, num_samples=6)
    patches = {split: patch_dataset(getattr(datalist, split), transform) for split in SPLITS}
    assert [len(patches[split]) for split in SPLITS] == [54, 36, 36]
    loaders = {split: DataLoader(patches[split], batch_size=8) for split in SPLITS}
    networks = {"pretrained": segresnet(0, spatial_dims), "random": segresnet(1, spatial_dims)}
    handlers = [
        VolumeProbeHandler(networks, loaders, tmp_path, num_samples=10),
        ReconstructionHandler(patches["test"].data, tmp_path, num_samples=10),
    ]
    evaluator = SupervisedEvaluator(
        device="cpu", val_data_loader=loaders["test"], network=networks["pretrained"], val_handlers=handlers,
        prepare_batch=MaskedImages(Corrupt(0.5, mask_size=2)), decollate=False,
    )  # fmt: skip
    evaluator.run()
    metrics = evaluator.state.metrics
    assert all(metrics[f"reconstruction_error_{folder.name}"] > 0 for folder in phantoms)
    for question in ("structures", "domains", "domains_in_group"):
        assert 0 <= metrics[f"pretrained_last_linear_auroc_{question}_macro"] <= 1
    columns = {row["finding"] for row in table(tmp_path / "findings.csv")}
    assert {"abdomen_ct/liver", "abdomen_mr/liver", "heart_mr/myocardium"} & columns


# --- refusals


def test_nothing_to_ask_is_logged_and_nothing_is_probed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaders = hand_made({"brats": "head"})
    handler = VolumeProbeHandler({"only": Means()}, loaders, tmp_path)
    assert "No probe: there is nothing to ask of the features" in caplog.text
    assert not handler.questions


@pytest.mark.parametrize("split", SPLITS)
def test_an_empty_split_is_refused(phantoms: list[Path], split: str) -> None:
    datalist = aggregate(phantoms)._replace(**{split: []})
    with pytest.raises(ValueError, match=f"are needed in .*; {split} has none in {phantoms[0]}, .*Add the list"):
        check_probe_data(datalist, phantoms, reconstructs=True)


def test_one_task_without_labels_is_refused(phantoms: list[Path]) -> None:
    datalist = aggregate(phantoms[0])
    check_probe_data(datalist, phantoms[0])
    for item in datalist.test:
        del item["labels"]
    with pytest.raises(
        ValueError, match=f"nothing to ask of the features: give label maps .* got neither in {phantoms[0]}"
    ):
        check_probe_data(datalist, phantoms[0])
    check_probe_data(datalist._replace(label_names=["Fracture"]), phantoms[0])
    check_probe_data(datalist._replace(task_names=["a", "b"]), phantoms[0])


def test_the_log_has_a_line_for_every_macro(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dissect_monai"):
        probe(tmp_path, hand_made(), num_samples=2)
    lines = [record.message for record in caplog.records if "AUROC" in record.message]
    assert len(lines) == 3 * 5 * 2  # questions, kinds of features, probes
    assert all("_macro" in line for line in lines)
