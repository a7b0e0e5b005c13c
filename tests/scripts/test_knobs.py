import json

import knobs
import pytest
from helpers import ROOT


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, str]]:
    """What docs/knobs.json holds, for a test to change."""
    content: dict[str, dict[str, str]] = json.loads((ROOT / "docs" / "knobs.json").read_text(encoding="utf-8"))
    monkeypatch.setattr(knobs, "meanings", lambda: content)
    return content


def test_the_pages_of_the_bundles_say_what_configs_rules_and_meanings_say() -> None:
    knobs.main("all", check=True)


def test_a_knob_without_a_meaning_is_named(
    written: dict[str, dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    del written["meanings"]["patience"]
    with pytest.raises(
        SystemExit, match=r"^error: docs/knobs.json has no meaning of patience of cxr_classify/train.json"
    ):
        knobs.main("cxr_classify")
    assert not capsys.readouterr().out


def test_a_meaning_of_no_knob_is_named(written: dict[str, dict[str, str]]) -> None:
    written["hssl_multidomain"]["patchsize"] = "a knob that there is not"
    with pytest.raises(SystemExit, match="has a meaning of patchsize, which no rule knows: remove it"):
        knobs.main("all", check=True)


@pytest.mark.parametrize(
    ("section", "knob", "words"),
    [
        ("pretrain_vq_ssl/train", "max_epochs", ("| `300` | `20` |", "a whole number of at least 1")),
        ("pretrain_vq_ssl/train", "fusion", ("| `replace` |  |", "one of attention, add, concat, replace")),
        ("pretrain_vq_ssl/paper", "objective", ("| `byol` |",)),
        ("pretrain_vq_ssl/volumes", "image_size", ("| refused |",)),
        ("cxr_classify/evaluate", "image_size", ("| that of the weights |",)),
        ("cxr_classify/inference", "dataset_dir", ("| `None` |", "a single file")),  # not what it means in training
        ("seg_finetune_btcv/train", "init_filters", ("| that of `pretrained`, else `16` | `8` |",)),
    ],
)
def test_a_line_has_default_default_on_phantoms_rule_and_meaning(
    section: str, knob: str, words: tuple[str, ...]
) -> None:
    bundle, _, config = section.partition("/")
    (line,) = [line for line in knobs.table(ROOT / "bundles" / bundle, config) if line.startswith(f"| `{knob}` ")]
    for word in words:
        assert word in line


def test_a_stale_page_is_found(written: dict[str, dict[str, str]]) -> None:
    written["meanings"]["output_dir"] = "another meaning"
    with pytest.raises(SystemExit, match=r"knobs.md is not what the configs say: run `make results`"):
        knobs.main("all", check=True)
