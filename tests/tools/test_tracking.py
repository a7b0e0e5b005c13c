"""`--tracking mlflow`: parameters, metrics and the executed config of a run of each bundle, in a local store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, Recipe

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
