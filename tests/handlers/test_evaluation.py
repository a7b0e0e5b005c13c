from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from monai.networks.nets import resnet10
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import nn

from dissect_monai.data.datalists import SPLITS, Datalist, label_matrix
from dissect_monai.handlers.image_probes import ProbeHandler, refuse_unlabelled
from dissect_monai.handlers.validation import KNNHandler
from dissect_monai.metrics.probes import extract_features, knn_scores
from dissect_monai.networks.encoders import feature_maps

NAMES = ["Opacity", "Nodule", "Rare"]
SIZES = {"training": 40, "validation": 24, "test": 30}


def decoded(items: list[dict[str, Any]], images: Any) -> Dataset:
    """Images that come with their data list, as `cached_dataset` gives them."""
    by_name = {item["image"]: torch.as_tensor(image).float() for item, image in zip(items, images, strict=True)}
    return Dataset(items, lambda item: {"image": by_name[item["image"]]})


def make_datalist() -> tuple[Datalist, dict[str, DataLoader]]:
    """Two images a subject; opacities are bright, nodules small and bright, and no test image has the rare finding."""
    rng = np.random.default_rng(0)
    splits, loaders = {}, {}
    for split, size in SIZES.items():
        labels = np.stack([rng.random(size) < 0.5, rng.random(size) < 0.4, rng.random(size) < 0.2], axis=1).astype(
            float
        )
        if split == "test":
            labels[:, 2] = 0
        views = rng.integers(0, 2, size)
        images = rng.random((size, 1, 32, 32)) * 0.6 + 0.1 * labels[:, :1, None, None]
        images[:, 0, 8:14, 8:14] += 0.25 * labels[:, 1, None, None]
        images[:, 0, :4, :4] = views[:, None, None]
        labels[::7, 1] = np.nan
        splits[split] = [
            {
                "image": f"{split}{i}",
                "label": label.tolist(),
                "subject": f"{split}{i // 2}",
                "view": ["AP", "PA"][view],
            }
            for i, (label, view) in enumerate(zip(labels, views, strict=True))
        ]
        loaders[split] = DataLoader(decoded(splits[split], images), batch_size=8)
    return Datalist(**splits, label_names=NAMES), loaders


def encoder(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return resnet10(spatial_dims=2, n_input_channels=1, conv1_t_stride=2, feed_forward=False, widen_factor=0.125)


def evaluate(handler: Any, loader: DataLoader, network: nn.Module) -> dict[str, float]:
    evaluator = SupervisedEvaluator(
        device="cpu", val_data_loader=loader, network=network, val_handlers=[handler], decollate=False
    )
    evaluator.logger.setLevel(logging.ERROR)
    evaluator.run()
    return evaluator.state.metrics


def probe(folder: Path, encoders: dict[str, nn.Module] | None = None, **kwargs: Any) -> dict[str, float]:
    _, loaders = make_datalist()
    for split in SPLITS if "datalist" in kwargs else ():
        loaders[split].dataset.data = getattr(kwargs["datalist"], split)
    kwargs.pop("datalist", None)
    encoders = encoders or {"pretrained": encoder(0), "random": encoder(1)}
    handler = ProbeHandler(encoders, loaders, NAMES, folder, num_samples=40, **kwargs)
    return evaluate(handler, loaders["test"], encoders["pretrained"])


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def pick(rows: Sequence[dict[str, str]], **wanted: str) -> dict[str, str]:
    (row,) = (row for row in rows if all(row[key] == value for key, value in wanted.items()))
    return row


class Probed:
    """One evaluation on the given splits, looked at by several tests."""

    def __init__(self, folder: Path, **kwargs: Any) -> None:
        self.metrics = probe(folder, **kwargs)
        self.findings = table(folder / "findings.csv")
        self.differences = table(folder / "differences.csv")
        with np.load(folder / "scores.npz") as arrays:
            self.arrays = dict(arrays)


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> Probed:
    return Probed(tmp_path_factory.mktemp("probe") / "new", shortcut="view", findings=[*NAMES, "No finding"])


# ---- k-NN while training -----------------------------------------------------------------------------------------


def knn_handler(network: nn.Module) -> tuple[KNNHandler, dict[str, DataLoader], Datalist]:
    datalist, loaders = make_datalist()
    handler = KNNHandler(network, loaders["training"], loaders["validation"], NAMES, k=5)
    return handler, loaders, datalist


def test_knn_leaves_its_metrics_with_the_evaluator() -> None:
    handler, loaders, _ = knn_handler(network := encoder())
    metrics = evaluate(handler, loaders["validation"], network)
    assert set(metrics) == {"knn_auroc", "knn_auroc_stages", "embedding_collapse"}
    assert all(0 <= value <= 1 for value in metrics.values())


def test_knn_is_the_mean_over_the_findings_of_what_sklearn_says() -> None:
    handler, loaders, datalist = knn_handler(network := encoder())
    metrics = evaluate(handler, loaders["validation"], network)
    train, val = (extract_features(network, loaders[each], "cpu", feature_maps) for each in ("training", "validation"))
    scores = knn_scores(train.last, label_matrix(datalist.training, NAMES), val.last, k=5)
    truth = label_matrix(datalist.validation, NAMES)
    known = ~np.isnan(truth)
    expected = [roc_auc_score(truth[known[:, i], i], scores[known[:, i], i]) for i in range(3)]
    assert metrics["knn_auroc"] == pytest.approx(np.mean(expected))


def test_knn_says_when_the_embedding_has_collapsed() -> None:
    class Constant(nn.Module):
        def encode(self, images: torch.Tensor) -> tuple[None, list[torch.Tensor]]:
            return None, [images, images[:, :, :1, :1] * 0 + torch.arange(4.0).view(1, 4, 1, 1)]

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images

    handler, loaders, _ = knn_handler(network := Constant())
    collapsed = evaluate(handler, loaders["validation"], network)
    handler, loaders, _ = knn_handler(network := encoder())
    assert collapsed["embedding_collapse"] > evaluate(handler, loaders["validation"], network)["embedding_collapse"]


# ---- the tables --------------------------------------------------------------------------------------------------


def test_judges_every_encoder_and_the_pixels_by_both_probes(probed: Probed) -> None:
    judged = {(row["source"], row["features"], row["probe"]) for row in probed.findings}
    sources = [(name, kind) for name in ("pretrained", "random") for kind in ("last", "stages")] + [("pixels", "pca")]
    assert judged == {(*source, kind) for source in sources for kind in ("linear", "knn")}


def test_findings_have_a_value_and_an_interval_around_it(probed: Probed) -> None:
    assert list(probed.findings[0]) == [
        "source", "features", "probe", "question", "finding", "auroc", "auroc_low", "auroc_high", "ap", "ap_low",
        "ap_high", "n", "positives",
    ]  # fmt: skip
    for row in probed.findings:
        for metric in ("auroc", "ap"):
            assert 0 <= float(row[f"{metric}_low"]) <= float(row[metric]) <= float(row[f"{metric}_high"]) <= 1


def test_a_finding_without_positives_is_left_out(probed: Probed, tmp_path: Path, caplog: Any) -> None:
    assert {row["finding"] for row in probed.findings} == {"macro", "Opacity", "Nodule", "No finding", "view=AP"}
    probe(tmp_path)
    assert [record.message for record in caplog.records if "Left out, for lack of" in record.message] == [
        "Left out, for lack of positives or negatives: Rare."
    ]


def test_every_row_names_its_question(probed: Probed) -> None:
    questions = {(row["finding"], row["question"]) for row in probed.findings}
    assert questions == {("view=AP", "shortcut")} | {
        (name, "findings") for name in ("macro", "Opacity", "Nodule", "No finding")
    }


def test_macro_is_the_mean_over_the_findings(probed: Probed) -> None:
    of_one = [
        row for row in probed.findings if (row["source"], row["features"], row["probe"]) == ("pixels", "pca", "knn")
    ]
    values = [float(row["auroc"]) for row in of_one if row["finding"] in ("Opacity", "Nodule", "No finding")]
    assert float(pick(of_one, finding="macro")["auroc"]) == pytest.approx(np.mean(values), abs=1e-4)


def test_values_are_those_of_sklearn(probed: Probed) -> None:
    datalist, loaders = make_datalist()
    train, test = (extract_features(encoder(0), loaders[each], "cpu", feature_maps) for each in ("training", "test"))
    scores = knn_scores(train.last, label_matrix(datalist.training, NAMES), test.last)[:, 1]
    truth = label_matrix(datalist.test, NAMES)[:, 1]
    known = ~np.isnan(truth)
    row = pick(probed.findings, source="pretrained", features="last", probe="knn", finding="Nodule")
    assert float(row["auroc"]) == pytest.approx(roc_auc_score(truth[known], scores[known]), abs=1e-4)
    assert float(row["ap"]) == pytest.approx(average_precision_score(truth[known], scores[known]), abs=1e-4)
    assert int(row["n"]) == known.sum() == 25
    assert int(row["positives"]) == np.nansum(truth)


def test_scores_are_kept_for_later_comparisons(probed: Probed) -> None:
    assert len(probed.arrays["subjects"]) == SIZES["test"]
    label, score = (probed.arrays[name] for name in ("labels/shortcut", "scores/pixels/pca/knn/shortcut"))
    row = pick(probed.findings, source="pixels", probe="knn", finding="view=AP")
    assert float(row["auroc"]) == pytest.approx(roc_auc_score(label[:, 0], score[:, 0]), abs=1e-4)


def test_no_finding_is_known_where_one_finding_is(probed: Probed) -> None:
    truth = label_matrix(make_datalist()[0].test, NAMES)
    clear, ill = (truth == 0).all(1).sum(), (truth == 1).any(1).sum()
    row = pick(probed.findings, source="pixels", probe="knn", finding="No finding")
    assert (int(row["n"]), int(row["positives"])) == (clear + ill, clear)
    assert clear + ill < len(truth)  # some are unknown


def test_the_shortcut_is_asked_of_the_same_features(probed: Probed) -> None:
    row = pick(probed.findings, source="pretrained", features="stages", probe="linear", finding="view=AP")
    assert float(row["auroc"]) > 0.9
    assert int(row["n"]) == SIZES["test"]
    assert "shortcut" in {row["task"] for row in probed.differences}


def test_every_auroc_is_left_with_the_evaluator(probed: Probed) -> None:
    for row in probed.findings:
        name = f"{row['source']}_{row['features']}_{row['probe']}_auroc_{row['finding'].replace(' ', '_')}"
        for suffix in ("", "_low", "_high"):
            assert probed.metrics[name + suffix] == pytest.approx(float(row[f"auroc{suffix}"]), abs=1e-4)


def test_compares_the_first_encoder_with_every_baseline(probed: Probed) -> None:
    assert list(probed.differences[0]) == ["task", "features", "probe", "baseline", "difference", "low", "high"]
    compared = [tuple(row.values())[:4] for row in probed.differences]
    assert len(compared) == len(set(compared)) == 2 * 2 * 2 * 2  # tasks, features, probes, baselines
    for row in probed.differences:
        task = "macro" if row["task"] == "findings" else "view=AP"
        features = "pca" if row["baseline"] == "pixels" else row["features"]
        ours = pick(probed.findings, source="pretrained", features=row["features"], probe=row["probe"], finding=task)
        theirs = pick(probed.findings, source=row["baseline"], features=features, probe=row["probe"], finding=task)
        expected = float(ours["auroc"]) - float(theirs["auroc"])
        assert float(row["difference"]) == pytest.approx(expected, abs=2e-4)
        assert float(row["low"]) <= float(row["high"])


def test_a_difference_from_itself_is_zero_in_every_resample(tmp_path: Path) -> None:
    same = encoder()
    rows = Probed(tmp_path, encoders={"pretrained": same, "copy": same}).differences
    for row in rows:
        if row["baseline"] == "copy":
            assert [float(row[key]) for key in ("difference", "low", "high")] == [0, 0, 0]


# ---- other splits, labels and images -----------------------------------------------------------------------------


def test_folds_score_every_labelled_image_by_the_linear_probe(tmp_path: Path) -> None:
    rows = Probed(tmp_path, num_folds=3).findings
    assert {row["probe"] for row in rows} == {"linear"}
    row = pick(rows, source="pixels", finding="Opacity")
    assert int(row["n"]) == sum(SIZES.values())
    assert "Rare" in {row["finding"] for row in rows}  # the training images have it


def test_one_finding_has_no_macro(tmp_path: Path) -> None:
    probed = Probed(tmp_path, findings=["Opacity"])
    assert {row["finding"] for row in probed.findings} == {"Opacity"}
    assert {row["task"] for row in probed.differences} == {"findings"}


def test_one_positive_has_an_interval_although_resamples_lack_it(tmp_path: Path) -> None:
    datalist, _ = make_datalist()
    for index, item in enumerate(datalist.test):
        item["label"][0] = float(index == 3)
    row = pick(Probed(tmp_path, datalist=datalist, findings=["Opacity"]).findings, source="pixels", probe="knn")
    assert int(row["positives"]) == 1
    assert 0 <= float(row["auroc_low"]) <= float(row["auroc_high"]) <= 1


def test_no_finding_can_be_left_out_too(tmp_path: Path) -> None:
    probed = Probed(tmp_path, findings=["Rare"])
    assert probed.findings == probed.differences == []


def test_volumes_are_judged_without_pixels(tmp_path: Path) -> None:
    datalist, _ = make_datalist()
    volumes = {split: decoded(getattr(datalist, split), torch.rand(SIZES[split], 1, 16, 16, 16)) for split in SPLITS}
    loaders = {split: DataLoader(volumes[split], batch_size=8) for split in SPLITS}
    network = resnet10(spatial_dims=3, n_input_channels=1, conv1_t_stride=2, feed_forward=False, widen_factor=0.125)
    evaluate(ProbeHandler({"only": network}, loaders, NAMES, tmp_path, num_samples=2), loaders["test"], network)
    assert {row["source"] for row in table(tmp_path / "findings.csv")} == {"only"}
    assert table(tmp_path / "differences.csv") == []


def test_leaves_the_encoder_in_its_mode(tmp_path: Path) -> None:
    network = encoder().train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    _, loaders = make_datalist()
    handler = ProbeHandler({"only": network}, loaders, NAMES, tmp_path, num_samples=2)
    engine = SupervisedEvaluator(device="cpu", val_data_loader=loaders["test"], network=nn.Identity(), decollate=False)
    handler(engine)
    assert all(module.training for module in network.modules())
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


# ---- errors ------------------------------------------------------------------------------------------------------


def handler_of(**kwargs: Any) -> ProbeHandler:
    return ProbeHandler({"only": encoder()}, make_datalist()[1], NAMES, "nowhere", **kwargs)


def test_rejects_an_unknown_finding() -> None:
    with pytest.raises(ValueError, match="`findings` must be among Opacity, Nodule, Rare, No finding, got Mass"):
        handler_of(findings=["Mass", "Nodule"])


def test_one_finding_may_be_a_text() -> None:
    assert handler_of(findings="Opacity").questions[0].columns == ["Opacity"]


@pytest.mark.parametrize("key", ["subject", "age"])
def test_rejects_a_shortcut_without_two_values(key: str) -> None:
    with pytest.raises(ValueError, match=f"`shortcut` must name a key of the items with two values, got '{key}' with"):
        handler_of(shortcut=key)


def test_refuses_an_evaluation_without_labels() -> None:
    with pytest.raises(ValueError, match="needed in training, validation, test; validation, test has none"):
        refuse_unlabelled(make_datalist()[0]._replace(validation=[], test=[]))


def test_refuses_an_evaluation_with_nothing_to_score() -> None:
    datalist, _ = make_datalist()
    refuse_unlabelled(datalist)
    refuse_unlabelled(datalist, "Opacity")
    with pytest.raises(ValueError, match=r"no finding \(Rare\) has both a 1 and a 0 in training and in test"):
        refuse_unlabelled(datalist, "Rare")
