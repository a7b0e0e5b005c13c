"""Each command that a run ends with is run as it stands, from the first training to the last prediction."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fire
import pytest
from helpers import Recipe, Recipes, read, run_config, tiny_knobs
from monai.bundle import ConfigWorkflow

CHAINS = {
    "pretrain_vq_ssl": [
        ("pretrain_vq_ssl", "evaluate"), ("cxr_classify", "train"), ("cxr_classify", "evaluate"),
        ("cxr_classify", "inference"),
    ],
    "pretrain_vq_ssl_volumes": [("hssl_multidomain", "evaluate")],
    "hssl_multidomain": [
        ("hssl_multidomain", "evaluate"), ("seg_finetune_btcv", "train"), ("seg_finetune_btcv", "evaluate"),
        ("seg_finetune_btcv", "inference"),
    ],
}  # fmt: skip
NAMES = {"Result", "Weights", "TensorBoard", "Next"}


def last_lines(text: str) -> dict[str, str]:
    lines = [line.partition(":") for line in text.splitlines()[-5:]]
    return {name: said.strip() for name, _, said in lines}


def followed(first: dict[str, str], capsys: pytest.CaptureFixture[str]) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Bundle, config and last lines of all that follows."""
    said = first
    while said.get("Next"):
        _, *words = shlex.split(said["Next"])
        assert words[:3] == ["-m", "monai.bundle", "run"]
        knobs: dict[str, Any] = fire.Fire(lambda **named: named, command=words[3:], serialize=lambda _: None)
        config = Path(knobs.pop("config_file"))
        known = read(config)
        small = {"num_samples": 5, "num_workers": 0, **(tiny_knobs(config.parts[-3]) if config.stem == "train" else {})}
        run_config(config, **{**{name: value for name, value in small.items() if name in known}, **knobs})
        text = capsys.readouterr().out
        said = last_lines(text) if config.stem != "inference" else {}
        assert ("\nNext:" in text) == (config.stem != "inference")
        yield config.parts[-3], config.stem, said


@pytest.mark.slow
@pytest.mark.usefixtures("_in_root")
@pytest.mark.parametrize("name", CHAINS)
def test_every_next_command_runs_as_it_stands(
    name: str, recipe_of: Recipes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe: Recipe = recipe_of(name)
    recipe.train(tmp_path / "my run")
    said = last_lines(capsys.readouterr().out)
    assert said.keys() >= NAMES
    assert said["Weights"] == shlex.quote(str(tmp_path / "my run" / "models" / "model.pt"))
    steps = []
    for (bundle, config, found), _ in zip(followed(said, capsys), CHAINS[name], strict=False):
        steps.append((bundle, config))
        if config != "inference":
            assert found.keys() >= NAMES
            listed = shlex.split((found.get("Report") or found["Tables"]).replace(", ", " "))
            assert config == "train" or all(Path(path).is_file() for path in listed)
            assert found["Result"].startswith(("AUROC ", "mean Dice ", "nothing could be scored"))
    assert steps == CHAINS[name]


@pytest.mark.usefixtures("_in_root")
def test_nothing_is_said_where_nobody_has_typed_a_command(
    recipe_of: Recipes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of("cxr_classify")
    workflow = ConfigWorkflow(
        [str(config) for config in recipe.configs], logging_file=False, output_dir=str(tmp_path), **recipe.knobs
    )
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    assert "Next:" not in capsys.readouterr().out
