"""What an evaluation leaves of the weights it has judged: a classifier's calibration, and the facts of a report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import date
from math import isnan, nan
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from dissect_monai.common import InputError, __version__
from dissect_monai.data.datalists import data_folders


class Calibration(NamedTuple):
    """What an evaluation has fitted on validation."""

    temperature: float = 1.0  # the logits are divided by it
    thresholds: Mapping[str, float] = {}  # finding → probability to call it; NaN: unknown


def write_calibration(path: str | Path, calibration: Calibration, network: nn.Module) -> None:
    """Write a calibration as JSON, with the fingerprint of the weights that it is for."""
    thresholds = {name: None if isnan(value) else value for name, value in calibration.thresholds.items()}
    content = {"temperature": calibration.temperature, "thresholds": thresholds, "weights": fingerprint(network)}
    Path(path).write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


def read_calibration(path: str | Path | None, label_names: Sequence[str], network: nn.Module) -> Calibration:
    """Read what `write_calibration` wrote, for a network that has its weights.

    Args:
        path: the calibration.json of an evaluation; None is a temperature of 1, and no thresholds.
        label_names: names of the network's outputs, in order.
        network: the network of the predictions, its weights loaded.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no calibration, or one of other findings or weights.
    """
    if path is None:
        return Calibration()
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        given = {name: nan if value is None else float(value) for name, value in content["thresholds"].items()}
        calibration, weights = Calibration(float(content["temperature"]), given), content["weights"]
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"`calibration` must be the calibration.json of an evaluation, got {path}, which is not there: evaluate "
            "first, or leave it out."
        ) from error
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise InputError(f"{path} must be the calibration.json of an evaluation, got {error!r}.") from error
    same = list(given) == list(label_names)
    if not same or weights != fingerprint(network):
        what = "weights" if same else f"findings ({', '.join(given)})"
        raise InputError(f"{path} was fitted to other {what}: evaluate these weights, and give their calibration.json.")
    return calibration


def provenance(facts: Mapping[str, Any], network: nn.Module, num_samples: int) -> dict[str, Any]:
    """Facts of a report with what every evaluation knows. Its readers have other disks: paths are names there.

    Data are the names of their folders; weights, and those that they started from, the last three parts of the path.
    """
    named = dict(facts)
    if named.get("data"):
        named["data"] = ", ".join(folder.name for folder in data_folders(named["data"]))
    for name in {"weights", "started from"} & named.keys():
        named[name] = named[name] and "/".join(Path(named[name]).parts[-3:])
    sha = {"weights' SHA-256": fingerprint(network)[:12], "bootstrap resamples": num_samples}
    return {**named, **sha, "date": date.today().isoformat(), "software": f"dissect_monai {__version__}"}


def fingerprint(network: nn.Module) -> str:
    """SHA-256 of the names and values of all that the network's state dict holds."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
