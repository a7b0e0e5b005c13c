"""How folders without a list are laid out: which hold images, which their label maps, and what belongs together."""

from __future__ import annotations

import os
import re
from pathlib import Path

from dissect_monai.common import InputError, shorten
from dissect_monai.data.readers import IMAGE_SUFFIX, image_format

# What label maps and their folders are called beside images: labelsTr, x_seg.nii.gz, aparc+aseg.mgz, lungMask-0.nii.
LABELS = re.compile(
    r"(.*[-_.+ ])?(labels?|lbls?|label[-_ ]?maps?|[a-z]*masks?|msks?|[a-z]*segs?|segmentations?|[a-z]*seg[-_ ]?maps?|"
    r"annot(ation)?s?|annos?|rois?|contours?|delineations?|outlines?|parcellations?|wmparc|aparc|struct(ure)?s?|"
    r"rt[-_ ]?(structs?|ss)|[gcip]tvs?|oars?|gts?|((ground[-_ ]?)?truths?|gold[-_ ]?standards?))"
    r"([-_ ]?(tr|ts|val|train|test|manual|final|left|right|(?<=[-_ ])[lr]|rater\d+|[a-z]?\d+(?!\d)))*(\.\w+)?(\.gz)?",
    re.IGNORECASE,
)
_IMAGES = re.compile(r"images?|imgs?", re.IGNORECASE)
_SPLIT = "(?i:train(?:ing)?|val(?:id(?:ation)?)?|test(?:ing)?|tr|ts)"
# A split, a kind, or both: train, Images, train_images, masks-val, labelsTr.
_FOLDER = re.compile(rf"(?:({_SPLIT})(?:[-_ ]|$))?(.*?)(?:[-_ ]({_SPLIT})|(Tr|Ts|Val|Train|Test))?")
_SPLITS = {"": "", "tr": "training", "va": "validation", "ts": "test", "te": "test"}  # by their first two letters
# Of names that are else those of images: x_mask.png, x_segmentation.png, mask_1.png beside image_1.png.
_KIND = "images?|imgs?|labels?|masks?|segs?|segmentations?|annotations?|gts?|ground[-_ ]?truth"
_AFFIX = re.compile(rf"^({_KIND})[-_. ]+(?=.)|[-_. ]+({_KIND})([-_ ]?\d+)?$", re.IGNORECASE)
_CHANNEL = re.compile(r"_\d{4}$")  # of a file of nnU-Net
Folders = dict[str, tuple[Path, "Path | None"]]  # of images and of their label maps, by split


def label_folders(folder: Path) -> Folders:
    """Folders of images and of their label maps, by split; none where there are not both.

    They are called `images` and like label maps, such as `Masks`, and are for training; or there are such folders for
    each split: train/images and train/masks, images/train and masks/train, train_images and train_masks, imagesTr and
    labelsTr. Or label maps lie beside their images, as x_mask.png beside x.png.

    Raises:
        ValueError: if there are several folders of one kind.
    """
    found: dict[tuple[str, str], list[Path]] = {}
    for path in (*_named(folder), *(below for each in _named(folder) for below in _named(each))):
        said = [_said(name) for name in path.relative_to(folder).parts]
        kinds, splits = ({each[at] for each in said if each and each[at]} for at in (0, 1))
        if len(kinds) == 1 and len(splits) < 2:
            found.setdefault(("".join(kinds), "".join(splits)), []).append(path)
    labelled = {split for kind, split in found if kind == "labels" and ("images", split) in found}
    chosen = sorted({split for kind, split in found if kind == "images" and labelled and bool(split) == any(labelled)})
    for kind, split in ((kind, split) for split in chosen for kind in ("images", "labels")):
        if len(paths := found.get((kind, split), [])) > 1:
            what = "images" if kind == "images" else "label maps beside images"
            names = shorten([os.path.relpath(path, folder) for path in paths])
            raise InputError(f"{folder} must have one folder of {what}, got {names}: move the others.")
    if not chosen and _has_pairs(folder):
        return {"training": (folder, folder)}
    return {split or "training": (found["images", split][0], *found.get(("labels", split), [None])) for split in chosen}


def _named(folder: Path) -> list[Path]:
    return sorted(each for each in folder.iterdir() if _said(each.name) and each.is_dir())


def _said(name: str) -> tuple[str, str] | None:
    """Kind ("images", "labels" or "") and split (or "") that the name of a folder says; None if it says neither."""
    first, what, last, camel = _FOLDER.fullmatch(name).groups("")  # type: ignore[union-attr]
    kind = "images" if _IMAGES.fullmatch(what) else "labels" if LABELS.fullmatch(what) else ""
    return (kind, _SPLITS[(first or last or camel).lower()[:2]]) if (kind or not what) and name[0] != "." else None


def _has_pairs(folder: Path) -> bool:
    for parent, _, files in os.walk(folder):
        stems = {IMAGE_SUFFIX.sub("", name) for name in files if image_format(os.path.join(parent, name))}
        if any(LABELS.fullmatch(stem) and _AFFIX.sub("", stem, count=1) in stems - {stem} for stem in stems):
            return True
    return False


def label_of(image: str, images: Path, by_name: dict[str, list[str]]) -> list[str]:
    """The label maps that have the name of an image, or one that differs in suffix, in what it is, or in a channel.

    Raises:
        ValueError: if the image is one of several channels in files of their own, as nnU-Net writes them.
    """
    name = os.path.relpath(image, images)
    for key in (name, *names_of(name)):
        if key in by_name:
            return by_name[key]
    stem = IMAGE_SUFFIX.sub("", name)
    found = by_name.get(_CHANNEL.sub("", stem), []) if _CHANNEL.search(stem) else []
    if found and not stem.endswith("_0000"):
        raise InputError(
            f"{image} must be the only file of its case, got channel {stem[-4:]}, as nnU-Net calls it, of "
            f"{found[0]}: make a data folder of one channel, or one file of all and a `modality` for each."
        )
    return found


def names_of(name: str) -> tuple[str, str]:
    """A relative path without suffix, and without what says that it is an image or a mask."""
    folder, stem = os.path.split(IMAGE_SUFFIX.sub("", name))
    return os.path.join(folder, stem), os.path.join(folder, _AFFIX.sub("", stem, count=1))


def subject_of(name: str, pattern: str, where: str) -> str:
    """The subject in the name of an image: what the one group of a regular expression finds there."""
    try:
        found = re.search(pattern, name)
    except (re.error, TypeError) as error:
        raise InputError(f"{where} must be a regular expression, got {pattern!r}: {error}.") from error
    if found is None or len(found.groups()) != 1 or not found[1]:
        raise InputError(f"{where} must match every file name, with one group, got {pattern!r} for {name}.")
    return found[1]
