"""`--tracking mlflow`: parameters, metrics and the executed config of a run of each bundle, in a local store."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import BUNDLES, Recipes, refused

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


def test_a_store_in_a_folder_with_a_blank_has_its_artifacts_and_the_facts_of_the_run(
    recipe_of: Recipes, tmp_path: Path
) -> None:
    recipe, folder = recipe_of("pretrain_vq_ssl"), tmp_path / "a b"
    recipe.train(folder, tracking="mlflow", max_epochs=2, resume="auto")
    client, (run,) = tracked_runs(folder, "monai_experiment")
    expected = {"max_epochs": "2", "dataset_dir": str(recipe.knobs["dataset_dir"]), "loss.objective": "nt_xent"}
    assert expected.items() <= run.data.params.items()
    assert "loss.reconstruction_weight" in run.data.params
    (config,) = client.list_artifacts(run.info.run_id)
    assert [path.parent.parent.parent for path in (folder / "mlruns").rglob(config.path)] == [folder / "mlruns"]
    assert [path.name for path in tmp_path.iterdir()] == ["a b"]
    recipe.train(folder, max_epochs=2, resume=True)  # without tracking it is the same run


def test_what_is_refused_leaves_no_file(recipe_of: Recipes, tmp_path: Path) -> None:
    recipe, folder = recipe_of("pretrain_vq_ssl"), tmp_path / "out"
    with refused("`--batch_size` must be at least 2"):
        recipe.train(folder, tracking="mlflow", batch_size=1)
    assert not [*tmp_path.iterdir()]
    shutil.copytree(recipe.finished, folder)
    events = {*(folder / "eval").iterdir()}
    with refused("is of a run with label_fraction"):
        recipe.train(folder, tracking="mlflow", resume=True, max_epochs=2, label_fraction=0.5)
    assert {*(folder / "eval").iterdir()} == events
    assert not [*folder.glob("config_*")]
