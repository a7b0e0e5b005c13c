"""What a run of a bundle needs from the command line and from torchrun, and nothing else."""

from __future__ import annotations

import inspect
import logging
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from traceback import extract_tb
from types import FrameType, TracebackType
from typing import Any
from urllib.parse import unquote

import fire
import numpy as np
import torch
import torch.distributed as dist
from monai.bundle import ConfigParser, ConfigWorkflow, ReferenceResolver
from monai.bundle.scripts import run as bundle_run
from monai.utils import ensure_tuple
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from dissect_monai.common import (
    InputError,
    Item,
    __version__,
    bad_input,
    memory_fault,
    of_all_processes,
    of_first_process,
    rank,
    root_cause,
    world_size,
)
from dissect_monai.data.datalists import SPLITS, Datalist
from dissect_monai.data.datasets import items_of
from dissect_monai.data.identity import content_digest, datalist_digest, training_record
from dissect_monai.data.sampling import refuse_small
from dissect_monai.data.splits import refuse_trained, refuse_untrainable
from dissect_monai.data.volume_lists import refuse_overlap
from dissect_monai.handlers.checkpoints import (
    checkpoints_in,
    newest_checkpoint,
    newest_whole,
    read_checkpoint,
    refuse_other_config,
)
from dissect_monai.handlers.ending import last_lines
from dissect_monai.handlers.probes import check_probe_data, refuse_unlabelled
from dissect_monai.knobs import (
    DERIVED,
    PATH_KNOBS,
    RULES,
    SETTINGS,
    SIZES,
    WORKED_OUT,
    check_knobs,
    is_disabled,
    refuse_component,
    refuse_other_kind,
)
from dissect_monai.networks.weights import read_settings
from dissect_monai.writing import TEMPORARY, disk_fault, hold, read_csv, release, remove_halves

logger = logging.getLogger(__name__)
# What a run that goes on may change beside knobs on which no weights depend: paths, devices, workers, intervals, steps.
EXEMPT = {
    "bundle_root", "ckpt_dir", "data_dir", "log_dir", "model_path", "phantoms", "resume_from", "smoke", "start_from",
    "device", "on_cuda", "rank", "backend", "network", "compile_kwargs", "loader_class", "loader_workers",
    "persistent_workers", "pin_memory", "interval", "draw_interval", "imports", "initialize", "run",
    "finalize", "is_not_rank0", "_desc_",  # the last but one is of MONAI's tracking
}  # fmt: skip
OURS = {"pretrained_norm", "resnet_shortcuts"}  # arguments that a class of the user's own need not have
UNSAID = (  # of ignite and MONAI; an error is told once, at the end of the process
    "Engine run resuming from iteration 0,", "Current run is terminating due to exception:",
    "Engine run is terminating due to exception:", "Exception: ",
)  # fmt: skip
HEADER = 200  # bytes; a smaller event file holds nothing
_made: list[Path] = []  # folders of the run, of which those that are empty when it ends are removed
_held: list[logging.LogRecord] = []  # what is said when an engine runs
_typed: dict[str, Any] = {}  # overrides that MONAI has not had as they were typed
_unchecked: list[str] = []  # overrides of the command line for which there is no rule
# What MONAI itself reads beside `--tracking`.
TRACKING_OPTIONS = ("experiment_name", "run_name", "save_execute_config", "tracking_uri")


# ---- the command line ----------------------------------------------------------------------------------------------


def begin() -> None:
    """First step of a run: errors and ends in one line, MLflow's handlers completed, every knob checked, torch seeded.

    It takes no argument, since what MONAI evaluates for one fails before this can say so in a line.

    What processes that are dead have left in the folder for temporary files is removed.

    Raises:
        InputError: naming a misspelt override and the nearest id, or a knob with a bad value.
    """
    workflow, before = running_workflow(), {}
    if _is_command_line():
        sys.excepthook = partial(_explain, workflow=workflow)
        logging.setLogRecordFactory(_without_trace)
        for handler in logging.getLogger().handlers:
            handler.addFilter(_waits)
        stop = partial(_stop, workflow, os.getpid())
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        # Of MONAI, of a reader that nobody asked for, wherever pydicom is installed.
        logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", "NvImgCodecPydicomReader: ")
    if workflow is not None:
        remove_halves(gettempdir(), only=TEMPORARY)
        workflow.run = partial(_run, workflow, workflow.run, before)
        _complete_tracking(workflow.parser)
        if _is_command_line():
            config_file, overrides = run_arguments()
            refuse_unknown_overrides(config_file, overrides)
            if workflow.run_id not in workflow.parser:
                raise InputError(f"there is no step {workflow.run_id} to run: leave the word out.")
            _keep_as_typed(workflow.parser, overrides)
        _drop_unknown_arguments(workflow.parser)
        check_knobs(workflow.parser)
        if "seed" in workflow.parser:
            torch.manual_seed(workflow.parser.get_parsed_content("seed"))


def _is_command_line() -> bool:
    """Whether this process is `python -m monai.bundle run`, and not a server or a script that has loaded a bundle."""
    return Path(sys.argv[0]).parts[-3:] == ("monai", "bundle", "__main__.py") and sys.argv[1:2] == ["run"]


def run_arguments() -> tuple[Any, dict[str, Any]]:
    """Config files and overrides of the command line and of its `--args_file`, as they were typed.

    Raises:
        InputError: if a value has come as several words.
    """
    words = sys.argv[2:]
    flags = [index for index, word in enumerate(words) if _is_flag(word)]
    for flag, end in zip(flags, [*flags[1:], len(words)], strict=True):
        name, _, value = words[flag].partition("=")
        value, *others = [value] * ("=" in words[flag]) + words[flag + 1 : end] or [""]
        if odd := next((word for word in others if re.match(r"-[a-zA-Z]|[a-zA-Z_][\w#:]*=", word)), None):
            raise InputError(f"`{name}` is followed by {odd}, which is no option: options begin with two dashes.")
        if others and not value:
            raise InputError(f"`{name}=` is followed by a blank: leave the blank out.")
        if others:
            whole, several = " ".join([value, *others]), f'"{[value, *others]}"'
            is_container = value[:1] in ("[", "(", "{")
            quoted = f'{name} "{whole}"' + ("" if is_container else f", or as a list: {name} {several}")
            raise InputError(f"`{name}` must be one word, got {whole}: put it into quotation marks, {quoted}.")
    given: dict[str, Any] = fire.Fire(
        lambda *_, **named: named, command=[*map(_word_for_fire, words, ["", *words])], serialize=lambda _: None
    )
    if given.get("args_file"):
        given = {**ConfigParser.load_config_file(given["args_file"]), **given}
    options = {
        "workflow_name",
        *inspect.signature(bundle_run).parameters,
        *inspect.signature(ConfigWorkflow).parameters,
    }
    options |= {*TRACKING_OPTIONS} if given.get("tracking") else set()
    return given["config_file"], {name: value for name, value in given.items() if name not in options}


def _is_flag(word: str) -> bool:
    return re.match(r"--|-[a-zA-Z](=|$)", word) is not None


def _word_for_fire(word: str, before: str) -> str:
    """A word in quotation marks where fire would make another text of it: cut it at a #, or part a path at a comma."""
    flag, _, value = word.partition("=") if _is_flag(word) else ("", "", word)
    read = fire.parser.DefaultParseValue(value)
    is_other_text = isinstance(read, str) and read != value and value[:1] not in ("'", '"')
    is_one = (flag or before).lstrip("-") in PATH_KNOBS and value[:1] not in ("(", "[")
    is_path = isinstance(read, tuple) and (is_one or os.path.exists(value))
    if is_other_text or is_path or ("#" in value and "#" not in str(read)):
        value = repr(value)
    return f"{flag}={value}" if flag and "=" in word else flag or value


def _keep_as_typed(parser: ConfigParser, overrides: Mapping[str, Any]) -> None:
    """Give a config the values that were typed: MONAI has had fire's, and takes a # in any text for part of an id."""
    typed = {}
    for name, value in overrides.items():
        text = repr(value)
        if "#" in text and not re.search(r"(^|[\[({ ])['\"][@%$]", text):  # it is no reference, macro or expression
            typed[name] = "$" + re.sub("[#@%]", lambda match: f"\\x{ord(match[0]):x}", text)
        elif "#" not in text and value != parser.get(name):
            typed[name] = value
    _typed.clear()
    _typed.update({name: overrides[name] for name in typed})
    if typed:
        parser.update(typed)
        parser.parse(reset=True)


def running_workflow() -> ConfigWorkflow | None:
    """The workflow whose config this code is called from, if any.

    MONAI hands it to nobody. This is the one place that looks for it among the callers: for the config's folder, its
    knobs, and the lists that MONAI Label puts into it.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, ConfigWorkflow):
            return caller
        frame = frame.f_back
    return None


def refuse_unknown_overrides(config_file: Any, overrides: Mapping[str, Any]) -> None:
    """Refuse overrides that name nothing in the config files, which MONAI would ignore, or have odd values.

    An argument that a component's class takes may be added even if the config does not show it. A knob that is
    {"_disabled_": true} has been taken away by one of the files.
    """
    _unchecked.clear()
    parser = ConfigParser()
    parser.read_config(ensure_tuple(config_file))
    known = [each for each in _ids(parser.config) if not each.startswith("_")]
    for identifier, value in overrides.items():
        name = str(identifier).replace("#", "::")
        if name in parser and is_disabled(parser[name]):
            files = " and ".join(Path(file).name for file in ensure_tuple(config_file))
            raise InputError(f"--{identifier} has no meaning with {files}: leave it out.")
        if name in WORKED_OUT and str(parser.get(name))[:1] in ("$", "@"):
            raise InputError(
                f"--{identifier} follows from the data, the weights and other arguments, and cannot be given: leave it "
                "out."
            )
        arguments = [] if name in parser else _arguments(parser, name.rpartition("::")[0])
        if name not in parser and name not in arguments:
            parent, separator, last = name.rpartition("::")
            beside = [each.rpartition("::")[2] for each in (*known, *arguments) if each.rpartition("::")[0] == parent]
            near = [f"{parent}{separator}{each}".replace("::", "#") for each in get_close_matches(last, beside, n=1)]
            page = Path(ensure_tuple(config_file)[0]).parent.parent / "docs" / "knobs.md"
            explained = f" {page} explains every knob." if page.is_file() else ""
            raise InputError(
                f"there is no --{identifier} to override{f'; did you mean --{near[0]}?' if near else '.'}{explained}"
            )
        refers = isinstance(value, str) and value[:1] in ("@", "$")
        others = ReferenceResolver.match_refs_pattern(value) if refers else {}
        if refers and value[0] == "@" and not others:
            raise InputError(f"--{identifier} must name an id of the config after the @, got {value!r}.")
        for other in others:
            if other not in parser:
                raise InputError(f"--{identifier} refers to @{other.replace('::', '#')}, which is not in the config.")
        refuse_component(identifier, parser.get(name), value)
        is_held = name in RULES or (name not in DERIVED and refuse_other_kind(identifier, parser.get(name), value))
        if not is_held and "_target_" not in name:
            _unchecked.append(f"--{identifier} {value}")
        parser[name] = value


def _ids(config: Any, prefix: str = "") -> list[str]:
    entries = config.items() if isinstance(config, Mapping) else enumerate(config) if isinstance(config, list) else ()
    return [each for key, value in entries for each in (f"{prefix}{key}", *_ids(value, f"{prefix}{key}::"))]


def _arguments(parser: ConfigParser, component: str) -> list[str]:
    """Ids of what a component could be given."""
    config = parser.get(component) if component in parser else None
    if not isinstance(config, Mapping) or "_target_" not in config:
        return []
    target = config["_target_"]
    if str(target).startswith("@"):
        target = parser.get_parsed_content(target[1:])
    # Without its arguments, which may refer to data and networks that nobody wants to build for this.
    callable_only = ConfigParser({"component": {"_target_": target, "_mode_": "callable"}})
    names = inspect.signature(callable_only.get_parsed_content("component")).parameters
    return [f"{component}::{name}" for name in ("_disabled_", *names)]


def _drop_unknown_arguments(parser: ConfigParser) -> None:
    """Take what only networks of ours take from a class of the user's own, which was given in their place."""
    changed = {}
    for name, config in parser.config.items():
        given = OURS & config.keys() if isinstance(config, Mapping) and "_target_" in config else set()
        unknown = {each for each in given if f"{name}::{each}" not in _arguments(parser, name)}
        if unknown:
            changed[name] = {key: value for key, value in config.items() if key not in unknown}
    if changed:
        parser.update(changed)
        parser.parse(reset=True)


# ---- errors --------------------------------------------------------------------------------------------------------


def _explain(
    kind: type[BaseException],
    error: BaseException,
    trace: TracebackType | None,
    workflow: ConfigWorkflow | None = None,
) -> None:
    cause = disk_fault(error) or bad_input(error) or _without_memory(error, workflow) or _of_unchecked(error)
    if cause is None:
        _say_held()
        sys.__excepthook__(kind, error, trace)
        return
    _close_bars()
    kept = f" Free the disk; {_kept(workflow)}" if isinstance(cause, OSError) and disk_fault(cause) else ""
    where = "" if not kept or getattr(cause, "filename", None) else f" in {_output_dir(workflow)}"
    message = re.sub(r"\s*\n(?! {4})\s*", " ", with_dashes(str(cause)).strip())  # lines of code stay
    sys.stderr.write(f"error: {message}{where}{'.' if kept else ''}{kept}\n")


def _without_memory(error: BaseException, workflow: ConfigWorkflow | None) -> InputError | None:
    """What to say if memory did not suffice, or not even the numbers that count it, with the knobs that set sizes."""
    if (fault := memory_fault(error)) is None:
        return None
    parser = ConfigParser() if workflow is None else workflow.parser
    known = [name for name in SIZES if name in parser and not is_disabled(parser[name])]
    sizes = [f"`{name}` {parser.get_parsed_content(name)}" for name in known]
    return InputError(f"there is not enough memory: {fault}. Lower what sets sizes: {', '.join(sizes)}.")


def _of_unchecked(error: BaseException) -> InputError | None:
    """What to say of an error that is no known one if an override for which there is no rule may be its cause."""
    if not _unchecked or not isinstance(error, Exception) or sys.flags.dev_mode:
        return None
    cause = root_cause(error)
    place = extract_tb(cause.__traceback__)[-1]
    found = f"{type(cause).__name__}: {cause} ({Path(place.filename).name}, line {place.lineno})"
    given = f"the run failed with {', '.join(_unchecked)}, which no rule checks"
    return InputError(f"{given}: {found}. Correct it, or leave it out; `python -X dev` shows the traceback.")


def _waits(record: logging.LogRecord) -> bool:
    """Hold back what the package says until an engine runs: the first line of an error is the error."""
    if waits := record.levelno < logging.ERROR and record.name.startswith("dissect_monai"):
        _held.append(record)
    return not waits


def _say_held() -> None:
    for handler in logging.getLogger().handlers:
        handler.removeFilter(_waits)
    while _held:
        logging.getLogger(_held[0].name).handle(_held.pop(0))


def _without_trace(*args: Any, **kwargs: Any) -> logging.LogRecord:
    """A record of the log: MONAI logs tracebacks of what ends an engine, by many loggers, also of what is no fault.

    What an engine says of its end, and that it resumes from iteration 0 when it begins, no handler takes. A knob that
    MONAI has not had as it was typed is shown as it was.
    """
    record = logging.LogRecord(*args, **kwargs)
    listed = re.match("> ([^:]+): ", str(record.msg))
    if listed and listed[1] in _typed:
        record.msg = f"> {listed[1]}: {_typed[listed[1]]!r}"
    if str(record.msg).startswith("Engine run "):
        _say_held()
    if str(record.msg).startswith(UNSAID):
        record.levelno = -1
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, SystemExit) or disk_fault(error) or bad_input(error):
        record.exc_info = None
    return record


def _stop(workflow: ConfigWorkflow | None, pid: int, number: int, frame: FrameType | None) -> None:
    """End the process, with one line of its own unless it is a worker."""
    if os.getpid() == pid:
        _close_bars()
        sys.stderr.write(f"error: stopped by {signal.Signals(number).name}; {_kept(workflow)}\n")
        signal.signal(number, signal.SIG_IGN)  # a second one would interrupt the end
    raise SystemExit(128 + number)


def _close_bars() -> None:
    """End the lines of the progress bars: an error begins one of its own."""
    for bar in [*getattr(tqdm, "_instances", ())]:
        bar.close()


def _kept(workflow: ConfigWorkflow | None) -> str:
    """What a run that ends early leaves, and how to go on."""
    parser = ConfigParser() if workflow is None else workflow.parser
    if "resume_from" not in parser:
        return f"what stood in {_output_dir(workflow)} before is kept: start it again."
    found = checkpoints_in(parser.get_parsed_content("ckpt_dir"))
    if not found:
        return "there is no checkpoint yet: start it again."
    return f"{found[-1]} is whole: go on from it by the same command with --resume true."


def _output_dir(workflow: ConfigWorkflow | None) -> str:
    return "its folder" if workflow is None else str(workflow.parser.get_parsed_content("output_dir", default="."))


def _run(workflow: ConfigWorkflow, steps: Callable[[], Any], before: Mapping[signal.Signals, Any]) -> Any:
    """Run, and give back lock and signals; of a run that fails before it logs anything, nothing empty is left."""
    try:
        done = steps()
        _say_held()
        if before and rank() == 0:
            try:
                sys.stdout.write(last_lines(workflow.parser, *run_arguments()))
            except Exception:  # the run is done, and must not end in an error
                logger.warning("The last lines, which say what the run has left, could not be made.", exc_info=True)
        return done
    except Exception:
        if writer := workflow.parser.ref_resolver.resolved_content.get("writer"):
            writer.flush()
        folder = workflow.parser.get_parsed_content("log_dir", default=".")
        for events in Path(folder).glob(f"events.out.tfevents.*.{os.getpid()}.*"):
            if events.stat().st_size < HEADER:
                events.unlink()
        raise
    finally:
        release()
        while _made:
            with suppress(OSError):
                _made.pop().rmdir()
        for number, handler in before.items():
            signal.signal(number, handler)


def with_dashes(message: str) -> str:
    """A message about arguments as one about the knobs of the same names: `seed` becomes `--seed`."""
    return re.sub(r"`(\w+)`", lambda match: f"`--{match[1]}`" if match[1] in RULES else match[0], message)


# ---- before the first step -----------------------------------------------------------------------------------------


def run_settings(
    data: Any = None,
    labelled: Any = None,
    validation: Sequence[Item] | None = None,
    pretraining: Mapping[str, Any] | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """What the weights of the running bundle depend on: its knobs, in their order, and what is given here.

    It is written beside the weights, for evaluation and inference, and a run that goes on must have the same. It names
    no subject, and is the same in all processes. `phantoms` says whether all images are generated.

    Args:
        data: data set or items for training, whose digest is kept under this name.
        labelled: data set with whose labels it trains; `trained_on` is a record of its subjects.
        validation: items on which the weights of a segmentation are chosen; their digest is `validation_data`.
        pretraining: settings of the weights that it starts from, whose `trained_on` is added.
        facts: what no knob says, such as the number of images; they come before a knob of the same name.

    Raises:
        InputError: in all processes, if one has other settings or images.
    """
    # A task may be called like its folder.
    keys = ["task", "modality"] if labelled is None else ["modality", "label", "labels", "ignored"]
    if data is not None:
        facts["data"] = datalist_digest(data if isinstance(data, list) else items_of(data), *keys)
    if validation is not None:
        facts["validation_data"] = datalist_digest(validation, "modality")  # as `scored_subjects` looks for it
    if labelled is not None:
        facts["trained_on"] = training_record(items_of(labelled), (pretraining or {}).get("trained_on", ()))
    workflow = running_workflow()
    parser = ConfigParser() if workflow is None else workflow.parser
    if "smoke" in parser:
        facts["phantoms"] = bool(parser.get_parsed_content("smoke"))
    names = [name for name, knob in parser.config.items() if name in SETTINGS and not is_disabled(knob)]
    settings = {**{name: parser.get_parsed_content(name) for name in names}, **facts}
    _refuse_differing([{**each, "trained_on": None} for each in of_all_processes(settings)])
    return settings


def _refuse_differing(settings: Sequence[Mapping[str, Any]]) -> None:
    """Processes that draw different numbers of batches would wait for each other for hours."""
    for number, other in enumerate(settings):
        for name in (name for name in other if other[name] != settings[0].get(name)):
            raise InputError(
                f"all processes must have the same images and settings, got {name} {settings[0].get(name)} in the "
                f"first and {other[name]} in process {number}: look for images that one of them cannot read."
            )


def config_values() -> dict[str, Any]:
    """The config of the running bundle by id, as checkpoints keep it: knobs and references to them with their values.

    Other expressions stand as they are written, and no component is built. What a run that goes on may change is left
    out; of `pretrained` there is a digest of the file.
    """
    workflow = running_workflow()
    if workflow is None:
        return {}
    parser, free = workflow.parser, EXEMPT | (RULES.keys() - SETTINGS - {"overlap"})
    values: dict[str, Any] = {}
    for name, raw in _leaves(parser.config):
        first, last = name.partition("::")[0], name.rpartition("::")[2]
        if first.startswith("_") or {first, last} & free or first in TRACKING_OPTIONS:
            continue
        knob = name if name in RULES else str(raw).removeprefix("@")
        values[name.replace("::", "#")] = parser.get_parsed_content(knob) if knob in RULES else raw
    start = parser.get_parsed_content("pretrained") if "pretrained" in parser else None
    if start and Path(start).is_file():
        values["pretrained"] = content_digest(start)
    return {name: [*value] if isinstance(value, tuple) else value for name, value in values.items()}


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Ids and values of what is no container, and of knobs, which may be one; without the handlers of MLflow."""
    if prefix in RULES or not isinstance(config, (Mapping, list)):
        yield prefix, config
    else:
        parts = [each for each in config if not (isinstance(each, Mapping) and each.get("_target_") == "MLFlowHandler")]
        for key, value in config.items() if isinstance(config, Mapping) else enumerate(parts):
            yield from _leaves(value, f"{prefix}::{key}" if prefix else str(key))


def refuse_phantoms(smoke: bool, output_dir: str | Path, pretrained: str | Path | None = None) -> None:
    """First of the steps of `run`: no phantoms where there is what was trained on other images, or made of them.

    Whoever only parses a bundle with its weights and without data, as the model zoo does, does not come here.

    Raises:
        InputError: in a smoke run, before anything is written, if the weights that it uses or starts from, or weights,
            checkpoints or results in the output folder, are of other images.
    """
    folder, model = Path(output_dir, "phantoms"), Path(output_dir, "models", "model.pt")
    if not smoke:
        if pretrained and Path(pretrained).is_file() and read_settings(pretrained).get("phantoms"):
            logger.warning(
                "The weights %s were trained on phantoms alone: what they say of real images means nothing.", pretrained
            )
        return
    remedy = "give `dataset_dir`, the images to use, or for a trial on phantoms another `output_dir`"
    said = {path: read_settings(path).get("phantoms") for path in (model, pretrained) if path and Path(path).is_file()}
    for path in (path for path, of_phantoms in said.items() if not of_phantoms):
        raise InputError(f"{path} must be weights that were trained on phantoms to be used with them: {remedy}.")
    left = [file for name in ("checkpoints", "eval") for file in Path(output_dir, name).rglob("*") if file.is_file()]
    foreign = left[:1] if model not in said and not folder.is_dir() else [*filter(_shows_other_images, left)]
    if foreign:
        raise InputError(f"{foreign[0]} is of other images than phantoms, which must not take its place: {remedy}.")


def _shows_other_images(file: Path) -> bool:
    """Whether a table of results, or embeddings, begin with an image outside of a folder of phantoms."""
    image: Any = None
    if file.suffix == ".csv":
        row = next(iter(read_csv(file)), {})
        image = row.get("image", row.get("case"))
    elif file.name == "embeddings.npz":
        image = next(iter(np.load(file)["image"].tolist()), None)
    return bool(image) and "phantoms" not in Path(image).parts


def bundle_root(name: str) -> str:
    """Folder of the bundle that runs: that of its config file, the current one, or `bundles/<name>` below it.

    Raises:
        FileNotFoundError: if none of the three holds configs/metadata.json.
    """
    workflow = running_workflow()
    roots = [] if workflow is None else [Path(workflow.config_root_path).absolute().parent]
    for folder in (*roots, Path(), Path("bundles", name)):
        if (folder / "configs" / "metadata.json").is_file():
            return str(folder)
    raise FileNotFoundError(f"cannot find the bundle {name} from {Path.cwd()}: add --bundle_root <its folder>.")


def trained_weights(output_dir: str | Path, bundle_root: str | Path) -> str:
    """Path of the weights to judge or to use: those that a training has left in `output_dir`, else the bundle's own.

    Where neither has any it is that in `output_dir`.
    """
    places = [Path(folder, "models", "model.pt") for folder in (output_dir, bundle_root)]
    return str(next(filter(Path.is_file, places), places[0]))


def given_items() -> tuple[list[Any], list[Any]] | None:
    """The items for training and validation that a server gives the running workflow, as MONAI Label does, or None.

    They stand in the config in place of what the bundle lists itself, in `train#dataset#data` and
    `validate#dataset#data`; without the latter there are none for validation.
    """
    workflow = running_workflow()
    names = ("train::dataset::data", "validate::dataset::data")
    training, validation = (None if workflow is None else workflow.parser.get(name) for name in names)
    if not isinstance(training, list):
        return None
    return training, validation if isinstance(validation, list) else []


def checkpoint_to_resume(resume: Any, ckpt_dir: str | Path) -> str | None:
    """The newest checkpoint if a run is to go on from it, else None; in all processes that which the first one sees.

    Args:
        resume: true; false; or "auto", which goes on if there is a checkpoint and begins otherwise, for runs that are
            started again by what supervises them, with the arguments that they had. It leaves out a damaged one, with
            a warning, if there is an older one.
        ckpt_dir: folder of the checkpoints.

    Raises:
        FileNotFoundError: if `resume` is true and there is none.
    """
    if str(resume).lower() == "false":
        return None
    if str(resume).lower() == "true":
        return of_first_process(lambda: newest_checkpoint(ckpt_dir))
    return of_first_process(lambda: newest_whole(ckpt_dir))


def check_training(
    smoke: bool,
    data_dir: object,
    output_dir: str | Path,
    resume_from: str | None,
    datalist: Datalist | None = None,
    batch_size: int | None = None,
    labelled: bool = False,
    select: str | None = None,
) -> None:
    """Check what a training learns from, say in one line which images it uses, and make the folders that it writes to.

    From then on no other training writes there.

    Args:
        smoke: whether it runs on generated phantoms, and may write over an earlier run, as it says.
        data_dir: folder or folders of the images; None if the caller of the run lists them.
        output_dir: where the run is to write, in `checkpoints`, `eval` and `models`.
        resume_from: checkpoint from which it goes on, or None.
        datalist: what it trains on, to be checked with the arguments that follow.
        batch_size: images of a batch, of which every process must have one.
        labelled: whether training and validation must have labels.
        select: "best" if the weights of a segmentation are chosen by validation, else "last".

    Raises:
        FileNotFoundError: if there is no checkpoint to go on from.
        InputError: if the output folder cannot be written, is in use or holds the checkpoints of another run, the data
            leave nothing to learn, or the checkpoint is of another config.
    """
    if datalist is not None:
        if select is not None:
            refuse_untrainable(datalist.training, datalist.validation, select)
            refuse_overlap(datalist)
        if labelled:
            refuse_unlabelled(datalist, splits=("training", "validation"))
        if batch_size is not None:
            refuse_small(datalist.training, batch_size, world_size())
    ckpt_dir = Path(output_dir, "checkpoints")
    if resume_from is None and not smoke and data_dir is not None and checkpoints_in(ckpt_dir):
        raise InputError(
            f"{ckpt_dir} holds the checkpoints of another run: go on with it (`resume` true), or give another "
            "`output_dir`."
        )
    if resume_from is not None and running_workflow() is not None:
        of_first_process(partial(_refuse_other_run, resume_from))
    _make_folders(smoke, data_dir, output_dir, "checkpoints", "eval", "models")
    model = Path(output_dir, "models", "model.pt")
    if smoke and resume_from is None and model.is_file():
        logger.warning("This trial on phantoms will replace the weights of the one before it: %s.", model)


def _refuse_other_run(checkpoint: str) -> None:
    """Before the images are read; what depends on them is compared when the training starts."""
    saved, parser = read_checkpoint(checkpoint), getattr(running_workflow(), "parser", {})
    if saved["config"] and saved.get("version") == __version__:  # else it has none, or is refused for that
        longer = isinstance(parser.get("schedule_epochs"), int)  # and no reference to `max_epochs`
        refuse_other_config(checkpoint, saved["config"], config_values(), longer=longer)


def check_output(
    smoke: bool,
    data_dir: Any,
    output_dir: str | Path,
    datalist: Datalist | None = None,
    needed: Sequence[str] = SPLITS,
    settings: Mapping[str, Any] | None = None,
    findings: str | Sequence[str] | None = None,
    volumes: bool = False,
) -> None:
    """Check what an evaluation scores, say in one line which images it uses, and make the folder that it writes to.

    Args:
        smoke: whether it runs on generated phantoms.
        data_dir: folder or folders of the images.
        output_dir: where the run is to write, in `eval`.
        datalist: what an evaluation scores, which must leave something to measure.
        needed: splits of images that must have labels.
        settings: of weights that were trained with labels, with whose subjects they must not be scored.
        findings: those that it scores; None for all.
        volumes: whether they are volumes, of whose patches structures and data sets are asked.

    Raises:
        InputError: if the output folder cannot be written, there is nothing to measure, or the weights know subjects.
    """
    workflow = running_workflow()
    weights = "" if workflow is None else workflow.parser.get_parsed_content("pretrained", default="")
    if weights is None:
        raise InputError("`pretrained` must be the path of the weights to use, got None: leave it out, or name them.")
    if datalist is not None and volumes:
        check_probe_data(datalist, data_dir)
    elif datalist is not None:
        refuse_unlabelled(datalist, findings, needed)
    if datalist is not None and settings is not None:
        for split in needed:
            refuse_trained(getattr(datalist, split), split, settings)
    _make_folders(smoke, data_dir, output_dir, "eval")
    if weights:
        logger.info("Using the weights %s.", weights)


def _make_folders(smoke: bool, data_dir: object, output_dir: str | Path, *folders: str) -> None:
    named = ", ".join(map(str, ensure_tuple(data_dir)))
    if smoke:
        logger.warning("Smoke run on generated phantoms in %s; give --dataset_dir to use your images.", named)
    else:
        logger.info("Using the images %s.", "that the caller lists" if data_dir is None else f"in {named}")
    of_first_process(lambda: _take(Path(output_dir), *folders))


def _take(output_dir: Path, *folders: str) -> None:
    workflow = running_workflow()
    parser = ConfigParser() if workflow is None else workflow.parser
    given = {name: parser.get_parsed_content(name, default=None) for name in ("ckpt_dir", "log_dir", "cache_dir")}
    places = {Path(path): name for name, path in given.items() if isinstance(path, (str, Path))}
    if weights := parser.get_parsed_content("model_path", default=None):  # of a training
        places[Path(weights).parent] = "model_path"
    places |= {output_dir / folder: "output_dir" for folder in folders}
    for path, name in places.items():
        try:
            made = [each for each in (path, *path.parents) if not each.exists()]
            path.mkdir(parents=True, exist_ok=True)
            _made.extend(made[::-1])
            TemporaryFile(dir=path).close()
        except OSError as error:
            of_file = "the folder of " if name == "model_path" else ""
            shown, got = ("`output_dir`", output_dir) if name == "output_dir" else (f"{of_file}--{name}", path)
            raise InputError(f"{shown} must be a folder that can be written, got {got}: {error}") from error
    if workflow is not None:  # which gives the lock back at its end
        hold(output_dir / folders[0])
        remove_halves(*(output_dir / folder for folder in (*folders, "codes")))
        if path := workflow.parser.get_parsed_content("save_execute_config", default=None):
            ConfigParser.export_config_file(workflow.parser.config, path)  # now that nothing is refused any more


# ---- processes -----------------------------------------------------------------------------------------------------


def process_device() -> torch.device:
    """Device of this process among those that torchrun started on this machine.

    Raises:
        InputError: if torchrun did not start it.
    """
    if "LOCAL_RANK" not in os.environ:
        raise InputError(
            "multi_gpu_train.json needs one process per GPU: start it by "
            "`python -m torch.distributed.run --nproc_per_node=<GPUs> -m monai.bundle run ...`."
        )
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")


def destroy_group(network: DistributedDataParallel) -> None:
    """Wait until all processes of the run are done, and end what connects them, in each of them.

    Gloo's threads may still hold tensors of the last collective, and abort a process whose interpreter ends before they
    have let go. They are joined with the last reference to the group, which `network` gives up here: it cannot be
    trained any more.
    """
    device = next(network.parameters()).device
    dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)
    for holder in ("reducer", "logger", "process_group"):
        vars(network).pop(holder, None)
    dist.destroy_process_group()


# ---- `--tracking mlflow` -------------------------------------------------------------------------------------------

OF_RUN = "$dissect_monai.bundle.tracked_parameters(@settings)"
OF_LOSS = ("loss#", "dice_ce#")
BESIDE_STORE = "$dissect_monai.bundle.artifacts_beside(@tracking_uri)"
OF_DECOLLATED = "$monai.handlers.from_engine(['loss'], first=True)"  # how MONAI's handler reads the loss


def _complete_tracking(parser: ConfigParser) -> None:
    """Let the handlers that MONAI adds for `--tracking mlflow` see the loss, the settings and the config of the run.

    As they come, they read the loss of decollated outputs alone, look for the config that was run below an
    `output_dir` that must be an expression, and write into the run of a process that was killed.
    """
    if "save_execute_config" not in parser:
        return
    if find_spec("mlflow") is None:
        raise InputError(
            "`--tracking mlflow` needs MLflow: pip install mlflow (in the repository: pip install -e '.[mlflow]'), "
            "or leave it out."
        )
    if str(parser["tracking_uri"]).startswith("$monai.utils.path_to_sqlite_uri"):
        parser["tracking_uri"] += ".replace('%20', ' ')"  # else MLflow makes a folder with the former in its name
    for place in ("train::handlers", "validate::handlers", "handlers"):
        handlers = parser.get(place) or []
        if handlers and handlers[-1].get("_target_") == "MLFlowHandler":
            # A copy, since MONAI's is shared by all runs of a process, and the first, whose epochs are the run's.
            own = {**handlers.pop(), "artifact_location": BESIDE_STORE}
            if own.get("output_transform") == OF_DECOLLATED:
                own |= {"output_transform": "$lambda output: output['loss']", "experiment_param": OF_RUN}
                handlers.insert(0, own)
            else:
                handlers.append(own)
    if "run_name" in parser and parser["run_name"] is None:
        parser["run_name"] = time.strftime("run_%Y%m%d_%H%M%S")
    # MONAI wrote "<output_dir> + '/<file>'", an expression without its "$", and the file, although all may be refused.
    path = parser["save_execute_config"]
    if isinstance(path, str) and path.endswith(".json'"):
        parser["save_execute_config"] = "$str(@output_dir) + " + path.rpartition(" + ")[2]
    parser.parse(reset=True)
    written = parser.get_parsed_content("save_execute_config")
    if written and Path(written).is_file():
        Path(written).unlink()
        with suppress(OSError):
            Path(written).parent.rmdir()  # if that was all


def tracked_parameters(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What MLflow shows of a run: settings without the record of subjects, images, and arguments of its loss."""
    parser = ConfigParser() if (workflow := running_workflow()) is None else workflow.parser
    loss = {name.replace("#", "."): value for name, value in config_values().items() if name.startswith(OF_LOSS)}
    shown = {name: value for name, value in settings.items() if name != "trained_on"}
    return {**loss, **shown, "dataset_dir": parser.get_parsed_content("dataset_dir", default=None)}


def artifacts_beside(tracking_uri: str) -> str | None:
    """URI of mlruns/ beside a local store; of another store None, as it knows itself."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or tracking_uri
    if not uri.startswith("sqlite:///"):
        return None
    return Path(unquote(uri.removeprefix("sqlite:///"))).absolute().with_name("mlruns").as_uri()
