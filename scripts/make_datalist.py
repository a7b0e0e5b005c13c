r"""Write the dataset.json of a data folder: every image checked, split by subject, and counted.

    python scripts/make_datalist.py nih DIR
    python scripts/make_datalist.py chexpert DIR --uncertain ignore
    python scripts/make_datalist.py folders DIR --subject_pattern '^(p\d+)_'
    python scripts/make_datalist.py table FILE.csv --image path --labels "[Edema,Effusion]" --subject patient
    python scripts/make_datalist.py unlabelled DIR [DIR ...]

and of volumes (NIfTI, MHA, NRRD, folders of DICOM slices), images and label maps compared:

    python scripts/make_datalist.py btcv DIR
    python scripts/make_datalist.py msd Task09_Spleen --output DIR
    python scripts/make_datalist.py volumes DIR --label_dir DIR --labels "[liver,spleen]" --group abdomen --modality CT
    python scripts/make_datalist.py volumes DIR --group abdomen --modality CT

What cannot be made right is refused with one message and exit status 1, and nothing is written. `nih --help` lists the
knobs of one source.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from inspect import cleandoc, getmembers, isfunction, signature

import fire
from datalists.image_sources import ImageSources
from datalists.source import Source
from datalists.volume_sources import VolumeSources
from datalists.writer import make_datalist


class Sources(ImageSources, VolumeSources):
    """Write the dataset.json of a data folder: every image checked, split by subject, and counted.

    Give one of the sources nih, chexpert, folders, table and unlabelled, or, of volumes, btcv, msd and volumes;
    `nih --help` says what it takes.

    Args:
        output: where it goes, if not into the data folder: a folder, or a path that ends in dataset.json.
        overwrite: replace an existing dataset.json.
        check: "open" reads every image, or of volumes every header and label map; "exists" only looks for the files.
        workers: threads that check images; more than cores, since they wait for the disk.
        skip_corrupt: leave out images that cannot be read and volumes that do not agree with their label map, and name
            them, instead of refusing the data.
        seed: draws other splits.
        name: name of the data set, and the task of volumes; by default that of its folder, btcv, or what the Decathlon
            calls it.
        modality: its DICOM code, such as CR (X-ray, the default of images), CT or MR.
    """


def words_of(arguments: Sequence[str]) -> list[str]:
    """The arguments that are neither knobs nor, as Fire reads them, the values of knobs."""
    is_knob = [re.match(r"--|-[a-zA-Z]", argument) is not None for argument in arguments]
    takes_next = [knob and "=" not in argument for knob, argument in zip(is_knob, arguments, strict=True)]
    return [
        argument
        for argument, knob, is_value in zip(arguments, is_knob, [False, *takes_next], strict=False)
        if not (knob or is_value)
    ]


def usage() -> str:
    """What to type, and the knobs that all sources share."""
    knobs = cleandoc(str(Sources.__doc__)).partition("Args:\n")[2]
    return f"{__doc__.strip()}\n\nAll sources take:\n\n{knobs}"


def refuse_misspelt(arguments: Sequence[str]) -> None:
    """Refuse a source or knob that does not exist, and words too many: Fire would take them for something else.

    Raises:
        ValueError: naming the nearest source or knob, or the word.
    """
    source, *given = words_of(arguments)
    sources = [name for name, member in getmembers(Sources, isfunction) if not name.startswith("_")]
    if source not in sources:
        (near,) = get_close_matches(source, sources, n=1, cutoff=0)
        raise ValueError(f"there is no source {source}; did you mean {near}?")
    parameters = signature(getattr(Sources, source)).parameters
    known = {"help", *(field.name for field in fields(Sources)), *parameters} - {"self", "folders"}
    for argument in arguments:
        name = argument.partition("=")[0].lstrip("-").replace("-", "_")
        if argument.startswith("--") and name and name not in known:
            (near,) = get_close_matches(name, known, n=1, cutoff=0)
            raise ValueError(f"there is no --{name}; did you mean --{near}?")
    if len(given) > 1 and not any(each.kind is each.VAR_POSITIONAL for each in parameters.values()):
        raise ValueError(f"`{source}` must get one path, got {', '.join(given)}. Name the knobs, as in --seed 1.")


def main(command: Sequence[str] | None = None) -> None:
    """Run one subcommand.

    Args:
        command: the arguments; those of the process by default.
    """
    arguments = sys.argv[1:] if command is None else command
    if not words_of(arguments):
        if not {"-h", "--help"} & set(arguments):
            raise SystemExit(usage())
        print(usage())
        return
    try:
        refuse_misspelt(arguments)
        source = fire.Fire(Sources, command, serialize=lambda got: None if isinstance(got, Source) else got)
        if isinstance(source, Source):
            make_datalist(source)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
