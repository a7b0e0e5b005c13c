"""`--tracking mlflow`: parameters, metrics and the executed config of a run of each bundle, in a local store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, Recipe, refused
from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS

from dissect_monai.bundle import (
    LONGEST_PARAMETER,
    OF_DECOLLATED,
    TRACKING_OPTIONS,
    _completed,
    complete_tracking,
    parameters,
)

pytestmark = pytest.mark.usefixtures("_in_root")
METRICS = {
    "pretrain_vq_ssl": {"train_loss"},
    "cxr_classify": {"train_loss", "auroc"},
    "hssl_multidomain": {"train_loss", "accuracy_task"},
    "seg_finetune_btcv": {"train_loss", "dice_mean", "dice_liver"},
}


def tracked_runs(folder: Path) -> tuple[Any, list[Any]]:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlruns.db'}")
    return client, client.search_runs([each.experiment_id for each in client.search_experiments()])


@pytest.mark.slow
@pytest.mark.parametrize("bundle", sorted(path.name for path in ROOT.glob("bundles/*")))
def test_a_run_shows_its_settings_losses_scores_and_config(
    bundle: str, recipe_of: Callable[[str], Recipe], tmp_path: Path
) -> None:
    recipe = recipe_of(bundle)
    recipe.train(tmp_path, tracking="mlflow")
    client, (run,) = tracked_runs(tmp_path)
    assert run.info.status == "FINISHED"
    assert run.data.params["batch_size"] == str(recipe.knobs["batch_size"])
    assert run.data.metrics.keys() >= METRICS[bundle]
    (config,) = client.list_artifacts(run.info.run_id)
    assert config.path.startswith("config_")
    recipe.run("evaluate", tmp_path, num_samples=5, tracking="mlflow")
    _, runs = tracked_runs(tmp_path)
    assert len(runs) == 2
    assert all(each.data.metrics for each in runs)


def test_every_start_is_a_run_of_its_own_with_the_name_and_store_that_it_is_given(
    recipe_of: Callable[[str], Recipe], tmp_path: Path
) -> None:
    """A process that was killed leaves its run open: MLflow refuses other parameters for it."""
    import mlflow

    store = f"sqlite:///{tmp_path / 'mine.db'}"
    client = mlflow.MlflowClient(store)
    killed = client.create_run(client.create_experiment("mine", (tmp_path / "artifacts").as_uri()))
    client.log_param(killed.info.run_id, "batch_size", "999")
    recipe_of("hssl_multidomain").train(
        tmp_path / "output", tracking="mlflow", tracking_uri=store, experiment_name="mine"
    )
    runs = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert sorted(run.data.params["batch_size"] for run in runs) == ["4", "999"]


def test_without_mlflow_one_line_says_what_to_install(
    recipe_of: Callable[[str], Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dissect_monai.bundle.find_spec", lambda name: None)
    with refused("needs MLflow: pip install mlflow"):
        recipe_of("hssl_multidomain").train(tmp_path / "output", tracking="mlflow")


def test_what_a_file_of_settings_says_stays() -> None:
    own = {"_target_": "monai.handlers.MLFlowHandler", "output_transform": "$mine", "iteration_log": True}
    assert _completed(own, has_settings=True) == own
    of_monai = {"_target_": "MLFlowHandler", "output_transform": OF_DECOLLATED, "experiment_param": "@mine"}
    assert _completed(of_monai, has_settings=True)["experiment_param"] == "@mine"
    assert DEFAULT_MLFLOW_SETTINGS["configs"]["trainer"]["output_transform"] == OF_DECOLLATED
    assert {*TRACKING_OPTIONS} <= {*DEFAULT_MLFLOW_SETTINGS["configs"]}


def test_long_settings_are_no_parameters() -> None:
    assert parameters({"pixdim": [1, 2], "long": "x" * (LONGEST_PARAMETER + 1)}) == {"pixdim": "[1, 2]"}


def test_nothing_happens_without_a_workflow() -> None:
    complete_tracking()
