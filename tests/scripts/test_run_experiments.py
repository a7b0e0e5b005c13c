import json
import re
import shlex
from itertools import cycle
from pathlib import Path
from typing import Any

import fire
import pytest
import render_results
import run_experiments
from helpers import ROOT, read

from dissect_monai.data.splits import select_fraction

Study = dict[str, Any]
EXPERIMENTS = ROOT / "scripts" / "experiments"
STUDIES = sorted(EXPERIMENTS.glob("*.json"))
TWO_CONFIGS = [f"bundles/pretrain_vq_ssl/configs/{name}" for name in ("train.json", "multi_gpu_train.json")]


def test_every_recipe_and_seed_is_trained_once_and_evaluated_in_each_variant(stand: Any, evaluated: Study) -> None:
    stand.run(evaluated)
    trained = [(each["discrete_weight"], each["seed"]) for each in stand.trainings]
    assert trained == [("1", "0"), ("0", "0"), ("1", "1"), ("0", "1")]
    assert len(stand.calls) == 4 + 4 * 2
    baselines = [each["baselines"] for each in stand.calls if "baselines" in each]
    assert baselines == (["True"] * 2 + ["False"] * 2) * 2


def test_variants_that_change_training_are_trained_each(stand: Any, trained: Study) -> None:
    stand.run(trained)
    assert len(stand.trainings) == len(stand.calls) / 2 == 8
    assert [each["label_fraction"] for each in stand.trainings[:2]] == ["1.0", "0.1"]
    assert len({each["output_dir"] for each in stand.calls}) == 16


def test_a_run_fills_templates_and_records_its_command(stand: Any, evaluated: Study, tmp_path: Path) -> None:
    stand.run(evaluated)
    train, evaluate = stand.calls[:2]
    assert train["dataset_dir"] == json.dumps([str(tmp_path / "data" / "images")])
    assert evaluate["pretrained"] == str(tmp_path / "runs" / "study" / "ours" / "seed0" / "models" / "model.pt")
    done = read(tmp_path / "runs" / "study" / "ours" / "seed0" / "done.json")
    assert shlex.split(done["command"]) == stand.commands[0]
    assert stand.commands[0][:4] == ["python", "-m", "monai.bundle", "run"]
    assert (done["commit"], done["dirty"]) == ("c0ffee00", False)
    assert done["seconds"] >= 0


def test_finished_runs_are_kept_and_all_others_start_anew(stand: Any, evaluated: Study, tmp_path: Path) -> None:
    stand.run(evaluated)
    folder = tmp_path / "runs" / "study" / "theirs" / "seed1" / "labels_10" / "evaluation"
    (folder / "done.json").unlink()
    (folder / "left_over").touch()
    stand.commands.clear()
    stand.run(evaluated)
    assert [each["output_dir"] for each in stand.calls] == [str(folder)]
    assert not (folder / "left_over").exists()
    (tmp_path / "runs" / "study" / "ours" / "seed0" / "done.json").unlink()
    stand.commands.clear()
    stand.run(evaluated)
    assert len(stand.commands) == 3, "training anew evaluates anew"


def test_side_by_side_runs_have_one_thread_and_the_same_rows(stand: Any, evaluated: Study, tmp_path: Path) -> None:
    one = stand.run(evaluated)
    (tmp_path / "runs").rename(tmp_path / "before")
    stand.environments.clear()
    assert stand.run(evaluated, jobs=2) == one + one
    assert {each["OMP_NUM_THREADS"] for each in stand.environments} == {"1"}


def test_an_array_of_jobs_gives_the_rows_of_one_call(stand: Any, evaluated: Study, tmp_path: Path) -> None:
    rows = stand.run(evaluated)
    (tmp_path / "runs").rename(tmp_path / "before")
    stand.commands.clear()
    for number in (2, 0, 3, 1):
        assert stand.run(evaluated, only=number) == rows
    assert len(stand.trainings) == 4
    assert stand.run(evaluated) == rows + rows
    assert len(stand.calls) == 4 + 4 * 2
    with pytest.raises(SystemExit, match=r"--only must be 0 to 3, the trainings of .*, got 4"):
        stand.run(evaluated, only=4)


@pytest.mark.parametrize("states", [[("a1", False), ("b2", False)], [("a1", True)]])
def test_refuses_rows_of_several_commits_or_of_changed_code(
    stand: Any, evaluated: Study, monkeypatch: pytest.MonkeyPatch, states: list[tuple[str, bool]]
) -> None:
    queue = cycle(states)
    monkeypatch.setattr(run_experiments, "code_state", lambda: next(queue))
    before = run_experiments.TABLE.read_bytes()
    with pytest.raises(SystemExit, match=r"no row is written.*ours/seed0"):
        stand.run(evaluated)
    assert run_experiments.TABLE.read_bytes() == before


def test_a_failed_run_is_one_line_and_the_others_are_kept(stand: Any, evaluated: Study, tmp_path: Path) -> None:
    stand.fails = lambda knobs: knobs["seed"] == "1" and "train.json" in knobs["config_file"]
    message = r"^error: \S+ours/seed1 failed with status 1, see \S+/train.log: RuntimeError: loss is nan$"
    with pytest.raises(SystemExit, match=message):
        stand.run(evaluated)
    assert len(list(tmp_path.glob("runs/*/*/seed0/done.json"))) == 2
    assert not list(tmp_path.glob("runs/*/*/seed1/done.json"))


def test_a_recipe_may_train_with_configs_of_its_own(stand: Any, evaluated: Study) -> None:
    stand.run({**evaluated, "bundle": "cxr_classify", "configs": {"theirs": TWO_CONFIGS}})
    configs = "bundles/cxr_classify/configs"
    used = {Path(each["output_dir"]).parts[-2:]: each["config_file"] for each in stand.trainings}
    assert used["ours", "seed0"] == used["ours", "seed1"] == f"{configs}/train.json"
    assert used["theirs", "seed0"] == used["theirs", "seed1"] == json.dumps(TWO_CONFIGS)
    assert fire.Fire(lambda name: name, command=[used["theirs", "seed0"]]) == TWO_CONFIGS
    others = {each["config_file"] for each in stand.calls if each not in stand.trainings}
    assert others == {f"{configs}/evaluate.json"}


def test_finished_runs_are_kept_with_the_same_knobs_and_configs_alone(stand: Any, evaluated: Study) -> None:
    study = {**evaluated, "configs": {"theirs": TWO_CONFIGS}}
    stand.run(study)
    stand.commands.clear()
    stand.run(study)
    assert not stand.commands
    other_knobs = {"training": {"dataset_dir": ["{data}/images"], "max_epochs": 2}}
    for change in (other_knobs, {"configs": {}}, {"configs": {"theirs": TWO_CONFIGS[::-1]}}):
        with pytest.raises(SystemExit, match="was run with other knobs or configs than the study has now"):
            stand.run({**study, **change})


def test_a_study_may_only_train(
    stand: Any, segmented: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    only = {"variants_change": "evaluation", "variants": {}, "evaluation": {}, "training_subjects": None}
    assert stand.run({**segmented, **only}, "pretraining") == []
    folders = ["/".join(Path(each["output_dir"]).parts[-2:]) for each in stand.calls]
    assert folders == [f"{recipe}/seed{seed}" for seed in (0, 1, 2) for recipe in segmented["recipes"]]
    message = "9 runs are trained, of commit c0ffee0; no row is written, as the study has no variants"
    assert message in capsys.readouterr().out
    weights = "{runs}/../pretraining/HSSL/seed{seed}/models/model.pt"
    stand.run({**segmented, "recipes": {**segmented["recipes"], "HSSL": {"pretrained": weights}}})
    used = [each["pretrained"] for each in stand.trainings if "HSSL/seed2/4 subjects" in each["output_dir"]]
    assert Path(used[0]).resolve() == tmp_path / "runs" / "pretraining" / "HSSL" / "seed2" / "models" / "model.pt"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipies": {}}, "unexpected keyword argument 'recipies'. Its keys are bundle, dataset"),
        ({"seeds": [0, 1, 1]}, "`seeds` must hold different numbers, two or more of what is evaluated"),
        ({"variants_change": "labels"}, "`variants_change` must be training or evaluation"),
        ({"recipes": {"a/b": {}}, "compare": []}, "without a slash"),
        ({"bundle": "pretrain"}, "pretrain/configs/train.json, by `bundle` or `configs`, must be a file"),
        ({"configs": {"HSSL": []}}, "`configs` must give recipes files"),
        ({"training": {"pretrained": "{dta}/x"}}, r"'{dta}/x' holds {dta}: the templates are data, runs, seed, folder"),
        ({"training": {"dataset_dir": ["{data}/x"]}}, r"`dataset_dir` of .+ is \S+/x, .*give the right --data"),
        ({"training": {"pretrained": "{runs}/../x/model.pt"}}, "run the study that makes it first"),
        ({"variants": {}, "training_subjects": None}, "`variants` must name what is trained, or change evaluation"),
        ({"compare": [["HSSL", "HSSL"]]}, "`compare` must hold pairs of different recipes"),
        ({"compare": [["HSSL", "random"]]}, "`compare` must hold pairs of different recipes"),
        ({"variants_change": "evaluation"}, "`training_subjects` must be positive, where variants are trained"),
    ],
)
def test_refuses_a_bad_study_before_anything_runs(stand: Any, segmented: Study, change: Study, message: str) -> None:
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        stand.run({**segmented, **change})
    assert not stand.commands


@pytest.mark.parametrize("text", ["{", "[1]", None])
def test_refuses_a_file_that_is_no_study(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "study.json"
    if text:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match=r"error: \S+study.json is not a study file"):
        run_experiments.main(str(path), str(tmp_path))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_names_knobs_that_its_bundle_has_and_weights_that_another_trains(path: Path) -> None:
    study = run_experiments.read_study(path)
    for chain in run_experiments.plan(study, Path("data"), Path("runs")):
        for each in chain:
            known = set().union(*(read(ROOT / config) for config in each.configs))
            assert {knob.split("#")[0] for knob in each.knobs} <= known
            each.command()
    for knobs in study.recipes.values():
        if "pretrained" in knobs:
            found = re.fullmatch(r"{runs}/\.\./(\w+)/(.+)/seed({seed}|\d+)/models/model\.pt", knobs["pretrained"])
            assert found is not None
            other = run_experiments.read_study(EXPERIMENTS / f"{found[1]}.json")
            assert found[2] in other.recipes
            assert other.variants_change == "evaluation"  # else every variant has weights of its own
            assert set(study.seeds if found[3] == "{seed}" else [int(found[3])]) <= set(other.seeds)


@pytest.mark.parametrize("name", [path.stem for path in STUDIES if 'subjects": {' in path.read_text("utf-8")])
def test_the_variants_of_a_study_are_named_for_their_number_of_subjects(name: str) -> None:
    study = run_experiments.read_study(EXPERIMENTS / f"{name}.json")
    assert render_results.sizes_of(study) == {name: int(name.split()[0]) for name in study.variants}


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.25, 0.5, 0.77, 1])
def test_the_number_of_subjects_is_what_a_fraction_draws(segmented: Study, fraction: float) -> None:
    study = {**segmented, "variants": {"some": {"label_fraction": fraction}}, "training_subjects": 9}
    drawn = select_fraction([{"subject": str(index)} for index in range(9)], fraction, 0)
    assert render_results.sizes_of(run_experiments.Study(**study)) == {"some": len(drawn)}
