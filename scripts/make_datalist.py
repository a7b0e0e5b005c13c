r"""Write the dataset.json of a data folder: every image checked, split by subject, and counted.

    python scripts/make_datalist.py nih DIR
    python scripts/make_datalist.py chexpert DIR --uncertain ignore
    python scripts/make_datalist.py folders DIR --subject_pattern '^(p\d+)_'
    python scripts/make_datalist.py table FILE.csv --image path --labels Edema Effusion --subject patient

and of volumes (NIfTI, MHA, NRRD, folders of DICOM slices), images and label maps compared:

    python scripts/make_datalist.py btcv DIR
    python scripts/make_datalist.py msd Task09_Spleen --output DIR
    python scripts/make_datalist.py volumes DIR --label_dir DIR --labels liver spleen --group abdomen --modality CT
    python scripts/make_datalist.py volumes DIR --group abdomen --modality CT

What cannot be made right is refused, and nothing is written. `nih --help` lists the options of one source.
"""

from __future__ import annotations

from argparse import Action, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from inspect import cleandoc
from typing import Any

from datalists.image_sources import UNCERTAIN, chexpert, folders, nih, table
from datalists.source import Source, absolute
from datalists.volume_sources import btcv, msd, volumes
from datalists.writer import make_datalist


def build_parser() -> ArgumentParser:
    """A subcommand for every source; its options are the arguments of its function and of `make_datalist`."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    sources = parser.add_subparsers(required=True, metavar="SOURCE")

    def source(read: Callable[..., Source], **fractions: float | str) -> Callable[..., Action]:
        about = cleandoc(str(read.__doc__))
        own = sources.add_parser(
            read.__name__, description=about, help=about.splitlines()[0], formatter_class=RawDescriptionHelpFormatter
        )
        own.set_defaults(read=read)
        option = own.add_argument
        if read is not table:
            option("folder", type=absolute)
        option("--output", type=absolute, help="where dataset.json goes, if not into the data folder: a folder")
        option("--overwrite", action="store_true", help="replace an existing dataset.json")
        option("--skip_corrupt", action="store_true", help="leave out what cannot be used instead of refusing the data")
        option(
            "--seed", type=int, default=0, help="draws other splits; a subject keeps its split when others are added"
        )
        option("--name", default="", help="of the data set, and the task of volumes")
        for split, default in fractions.items():  # in words where it depends on what else is given
            known = None if isinstance(default, str) else default
            help_text = f"share of the subjects (default: {default})"
            option(f"--{split}_fraction", type=float, default=known, help=help_text)
        return option

    pattern = (
        r"regular expression whose one group is the subject in a file name, or in the path of a volume, as in "
        r"'^(p\d+)_'; by default the PatientID of DICOM files, else each image is a subject of its own"
    )
    source(nih, validation=0.1)
    option = source(chexpert, validation=0.1)
    option("--uncertain", choices=UNCERTAIN, default="ignore", help="what a label of -1 becomes (default: unknown)")
    option = source(folders, validation=0.1, test=0.2)
    option("--subject_pattern", default="", help=pattern)
    option = source(table, validation="0.1 without --split", test="0.2 without --split")
    option("file", type=absolute, help="the table")
    option("--image", required=True, help="column with paths relative to the folder of the images")
    option("--image_dir", type=absolute, help="folder of the images; that of the table by default")
    option("--labels", nargs="+", default=[], help="columns with labels; none for unlabelled images")
    option("--subject", default="", help="column with the patient; by default the PatientID of DICOM files")
    option("--split", default="", help="column with train, valid or test, which takes the place of the fractions")
    option("--extra", nargs="+", default=[], help="columns to copy, such as view and age")
    source(btcv, validation="the split of the literature, else 0.2")
    option = source(msd, validation=0.2, test=0.0)
    region = "region, such as abdomen, which several tasks share"
    option("--group", default="", help=f"{region} (default: that of Task01 to Task10)")
    option = source(volumes, validation="0.2 with label maps, else 0", test=0.0)
    option("--group", required=True, help=region)
    option("--modality", required=True, help="DICOM code, such as CT or MR")
    option("--label_dir", type=absolute, help="holds the label maps")
    option("--labels", nargs="+", default=[], help="names of the values 1, 2, ..., or as in 1=liver 6=left_kidney")
    option("--subject_pattern", default="", help=pattern)
    return parser


def main(command: Sequence[str] | None = None) -> None:
    """Run one subcommand; `command` are its arguments, those of the process by default."""
    given: dict[str, Any] = vars(build_parser().parse_args(command))
    shared = {name: given.pop(name) for name in ("output", "overwrite", "skip_corrupt", "seed", "name")}
    try:
        make_datalist(given.pop("read")(**given), **shared)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
