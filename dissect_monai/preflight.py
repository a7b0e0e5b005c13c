"""What a run checks and says before it starts, and how it ends on bad input: with one line."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sized
from dis import opname
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any

from monai.utils import ensure_tuple

from dissect_monai.checkpoints import checkpoints_in, newest_checkpoint
from dissect_monai.knobs import is_true
from dissect_monai.overrides import run_arguments, running_workflow
from dissect_monai.processes import of_first_process

logger = logging.getLogger(__name__)
BAD_INPUT = (ValueError, RuntimeError, ImportError)  # what this package raises on purpose; the rest are its faults


def explain_errors() -> None:
    """Let `monai.bundle run` end with one line where this package refuses its input deep inside MONAI's calls.

    Only for errors that this package raises on purpose or the file system reports; all others keep their traceback,
    as do callers of the Python API.
    """
    if run_arguments() is None:
        return

    def explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        cause = bad_input(error)
        if cause is None:
            sys.__excepthook__(kind, error, trace)
        else:
            sys.stderr.write(f"error: {cause}\n")

    sys.excepthook = explain


def bad_input(error: BaseException | None) -> BaseException | None:
    """The error in a chain of causes that says what was wrong with the input, or None: MONAI wraps it several times."""
    while error is not None:
        if isinstance(error, OSError) or (isinstance(error, BAD_INPUT) and _is_raised_here(error.__traceback__)):
            return error
        error = error.__cause__
    return None


def _is_raised_here(trace: TracebackType | None) -> bool:
    """Whether a `raise` of this package began a traceback, and not a function that it called."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not trace.tb_frame.f_globals.get("__name__", "").startswith("dissect_monai."):
        return False
    # What torch or numpy raise in C has no frame of its own, but stops at a call.
    return opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"


def bundle_root(name: str) -> str:
    """Folder of the bundle that runs: that of its config file, the current one, or `bundles/<name>` below it.

    Args:
        name: name of the bundle's folder.

    Raises:
        FileNotFoundError: if none of the three holds configs/metadata.json.
    """
    workflow = running_workflow()
    roots = [] if workflow is None else [Path(workflow.config_root_path).absolute().parent]
    for folder in (*roots, Path(), Path("bundles", name)):
        if (folder / "configs" / "metadata.json").is_file():
            return str(folder)
    raise FileNotFoundError(f"cannot find the bundle {name} from {Path.cwd()}: add --bundle_root <its folder>.")


def announce(smoke: bool, data_dir: object) -> None:
    """Say in one line which images the run uses.

    Args:
        smoke: whether it runs on generated phantoms.
        data_dir: folder or folders of the images; None if the caller of the run lists them.
    """
    folders = ", ".join(map(str, ensure_tuple(data_dir)))
    if smoke:
        logger.warning("Smoke run on generated phantoms in %s; give --dataset_dir to use your images.", folders)
    elif data_dir is None:
        logger.info("Using the images that the caller lists.")
    else:
        logger.info("Using the images in %s.", folders)


def claim_output(output_dir: str | Path, *folders: str) -> None:
    """Make the folders that a run needs, and refuse an output folder that cannot be written.

    Args:
        output_dir: where the run is to write.
        folders: names of the folders below it.

    Raises:
        ValueError: naming the output folder and what the system says.
    """
    for folder in (Path(output_dir, name) for name in folders):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ValueError(
                f"`--output_dir` must be a folder that can be written, got {output_dir}: {error}"
            ) from error


def refuse_overwriting(ckpt_dir: str | Path) -> None:
    """Refuse a folder that holds checkpoints of another run, which a run that starts anew would overwrite.

    Raises:
        ValueError: saying what to do.
    """
    if checkpoints_in(ckpt_dir):
        raise ValueError(
            f"{ckpt_dir} holds the checkpoints of another run: go on with it by --resume true, or give another "
            "--output_dir."
        )


def checkpoint_to_resume(resume: Any, ckpt_dir: str | Path) -> str | None:
    """The newest checkpoint if a run is to go on from it, else None; in all processes that which the first one sees.

    Args:
        resume: true; false; or "auto", which goes on if there is a checkpoint and begins otherwise, for runs that are
            started again by what supervises them, with the arguments that they had.
        ckpt_dir: folder of the checkpoints.

    Raises:
        FileNotFoundError: if `resume` is true and there is none.
        ValueError: if `resume` is none of the three.
    """
    auto = str(resume).lower() == "auto"
    if not auto and not is_true(resume, "resume"):
        return None
    newest = of_first_process([str(path) for path in checkpoints_in(ckpt_dir)[-1:]])
    if not newest and not auto:
        return newest_checkpoint(ckpt_dir)  # says what is missing
    return newest[0] if newest else None


def refuse_small_data(dataset: Sized, batch_size: int, world_size: int = 1) -> None:
    """Refuse a training set that does not fill one batch per process.

    Raises:
        ValueError: saying how many images there are and what to do.
    """
    if not len(dataset):
        raise ValueError("`training` holds no images: list some there in dataset.json.")
    if batch_size < 2:
        raise ValueError(f"`--batch_size` must be at least 2 for batch normalisation, got {batch_size}.")
    if len(dataset) < batch_size * world_size:
        raise ValueError(
            f"`training` holds {len(dataset)} images, fewer than one batch of {batch_size} on {world_size} "
            "process(es): lower --batch_size."
        )
