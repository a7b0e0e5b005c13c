"""Each command that a run ends with is run as it stands, from the first training to the last prediction."""

import shlex
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
from helpers import ROOT, Recipe, Recipes, read, started, tiny_knobs
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
TABLES = ("Report", "Tables")
COMPARED = ("95 % interval", "guessing: ", "their mean alone: ", "in iteration 1;", "too few for an interval")


def last_lines(text: str) -> dict[str, str]:
    lines = [line.partition(":") for line in text.splitlines()[-5:]]
    return {name: said.strip() for name, _, said in lines}


def is_whole(said: dict[str, str]) -> bool:
    """Five lines in one order, of which the result has an interval or what it is to be compared with."""
    names = ["Tables" if name in TABLES else name for name in said]
    compared = any(each in said["Result"] for each in COMPARED)
    return names == ["Result", "Weights", "Tables", "TensorBoard", "Next"] and compared


def followed(first: dict[str, str]) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Bundle, config and last lines of all that follows."""
    said = first
    while said.get("Next"):
        _, *words = shlex.split(said["Next"])
        assert words[:4] == ["-m", "monai.bundle", "run", "--config_file"]
        config = Path(words[4])
        known = read(config)
        small = {"num_samples": 5, **(tiny_knobs(config.parts[-3]) if config.stem == "train" else {})}
        added = [
            (f"--{name}", str(value)) for name, value in small.items() if name in known and f"--{name}" not in words
        ]
        ended = started([*words[1:], *chain.from_iterable(added)], ROOT)
        assert ended.returncode == 0, ended.stderr[-2000:]
        said = last_lines(ended.stdout) if config.stem != "inference" else {}
        assert ("\nNext:" in ended.stdout) == (config.stem != "inference")
        yield config.parts[-3], config.stem, said


@pytest.mark.slow
@pytest.mark.usefixtures("_in_root")
@pytest.mark.parametrize("name", CHAINS)
def test_every_next_command_runs_as_it_stands(
    name: str, recipe_of: Recipes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe: Recipe = recipe_of(name)
    folder = tmp_path / "my räun #1 & 2"
    recipe.train(folder)
    said = last_lines(capsys.readouterr().out)
    assert is_whole(said)
    assert said["Weights"] == shlex.quote(str(folder / "models" / "model.pt"))
    steps = []
    for (bundle, config, found), _ in zip(followed(said), CHAINS[name], strict=False):
        steps.append((bundle, config))
        if config != "inference":
            assert is_whole(found)
            listed = shlex.split((found.get("Report") or found["Tables"]).replace(", ", " "))
            assert config == "train" or all(Path(path).is_file() for path in listed)
            assert found["Result"].startswith(("AUROC ", "mean Dice "))
            assert (bundle, config) != ("seg_finetune_btcv", "evaluate") or "of the test split" in found["Result"]
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
