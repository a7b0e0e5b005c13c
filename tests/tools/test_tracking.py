"""`--tracking mlflow`: parameters, metrics and the executed config of a run of each bundle, in a local store."""

from pathlib import Path
from typing import Any

import pytest
from helpers import BUNDLES, Recipes

pytestmark = pytest.mark.usefixtures("_in_root")
METRICS = {
    "pretrain_vq_ssl": {"train_loss"},
    "cxr_classify": {"train_loss", "auroc"},
    "hssl_multidomain": {"train_loss", "accuracy_task"},
    "seg_finetune_btcv": {"train_loss", "dice_mean", "dice_liver"},
}


def tracked_runs(folder: Path, experiment: str) -> tuple[Any, list[Any]]:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlruns.db'}")
    return client, client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


@pytest.mark.slow
def test_runs_show_their_settings_losses_scores_and_config(recipe_of: Recipes, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path / 'mlruns.db'}"  # to make a store takes longer than a run
    assert METRICS.keys() == {bundle.name for bundle in BUNDLES}
    for bundle, metrics in METRICS.items():
        recipe, tracked = recipe_of(bundle), {"tracking_uri": store, "experiment_name": bundle, "tracking": "mlflow"}
        recipe.train(tmp_path / bundle, **tracked)
        client, (run,) = tracked_runs(tmp_path, bundle)
        assert run.info.status == "FINISHED"
        assert run.data.params["batch_size"] == str(recipe.knobs["batch_size"])
        assert run.data.metrics.keys() >= metrics
        (config,) = client.list_artifacts(run.info.run_id)
        assert config.path.startswith("config_")
        recipe.run("evaluate", tmp_path / bundle, num_samples=5, **tracked)
        _, runs = tracked_runs(tmp_path, bundle)
        assert len(runs) == 2
        assert all(each.data.metrics for each in runs)


def test_every_start_is_a_run_of_its_own_in_the_store(recipe_of: Recipes, tmp_path: Path) -> None:
    """A process that was killed leaves its run open: MLflow refuses other parameters for it."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlruns.db'}")
    killed = client.create_run(client.create_experiment("monai_experiment", (tmp_path / "artifacts").as_uri()))
    client.log_param(killed.info.run_id, "batch_size", "999")
    recipe_of("hssl_multidomain").train(tmp_path, tracking="mlflow")
    _, runs = tracked_runs(tmp_path, "monai_experiment")
    assert sorted(run.data.params["batch_size"] for run in runs) == ["4", "999"]
