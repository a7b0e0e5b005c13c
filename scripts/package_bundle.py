"""Package bundles for those who have nothing of this repository: dist/NAME_vVERSION.zip and its SHA-256.

    python scripts/package_bundle.py NAME|all [--weights DIR] [--output_dir dist]
    python scripts/package_bundle.py digests [--output_dir dist]
    python scripts/package_bundle.py release [--weights DIR] [--output_dir dist]

The archive holds one folder: the bundle, its weights and the package that its configs refer to. The same commit and
weights give the same bytes. `digests` writes those of the wheel and the source archive of `make dist`. `release`
packages all, checks the wheel, versions, changelogs and model cards, prints the commands that publish them, and names
all that is missing; it needs no network and sends nothing anywhere.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

import fire
from fire.decorators import SetParseFn

from dissect_monai import __version__
from dissect_monai.data.identity import DIGITS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "dissect_monai"
SUMS = "SHA256SUMS"  # of the wheel and the source archive
WEIGHTS = ("models/model.pt", "models/model.json")
CARD = "docs/README.md"
CARD_TEXTS = ("\n## Train\n", "\n## Limits\n", "Not a medical device")


def main(name: str, weights: str | Path | None = None, output_dir: str | Path = "dist") -> None:
    """Package one bundle or all of them, or check all of them and print how to publish them.

    Args:
        name: of the bundle's folder in bundles/, or "all", "release" or "digests".
        weights: folder that has NAME/models/model.pt of each, such as runs/demo after `make demo-all`; bundles/ by
            default.
        output_dir: folder for the archives.
    """
    trained = Path(weights or ROOT / "bundles")
    output_dir = Path(output_dir)
    if name == "release":
        release(trained, output_dir)
        return
    try:
        if name == "digests":
            lines = [f"{digest(output_dir / each)}  {each}\n" for each in distributions(__version__)]
            (output_dir / SUMS).write_text("".join(lines), encoding="utf-8")
            return
        for bundle in chosen_bundles(name):
            print(package(bundle, trained / bundle.name, output_dir))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def package(bundle: Path, weights: Path, output_dir: Path) -> Path:
    """Write the archive of a bundle and, beside it, its SHA-256 as `sha256sum` takes it; return the archive's path.

    What version 0.1.0 recorded of subjects, which can be guessed, is left out of the settings with a warning.

    Args:
        bundle: its folder, in a git repository with the package beside `bundles`.
        weights: folder with models/model.pt and models/model.json, and codes/*.pt if the bundle leaves codes.
        output_dir: folder for both; made if missing.

    Raises:
        FileNotFoundError: if the weights or their settings are missing.
        ValueError: if the version has no changelog entry, or bundle or package differ from what is committed.
    """
    path = output_dir / f"{bundle.name}_v{released_version(bundle)}.zip"
    files = dict(contents(bundle, weights))
    output_dir.mkdir(parents=True, exist_ok=True)
    # Stored, since weights hardly shrink and what a compressor writes depends on its version.
    half = path.with_name(f".{path.name}.tmp")
    with zipfile.ZipFile(half, "w", zipfile.ZIP_STORED) as archive:
        for name, file in sorted(files.items()):
            entry = zipfile.ZipInfo(f"{bundle.name}/{name}", date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            content = file.read_bytes()
            archive.writestr(entry, without_guessable(content, file) if name == WEIGHTS[1] else content)
    half.replace(path)
    path.with_name(f"{path.name}.sha256").write_text(f"{digest(path)}  {path.name}\n", encoding="utf-8")
    return path


def without_guessable(content: bytes, path: Path) -> bytes:
    """The settings beside weights without unsalted digests of subjects, as version 0.1.0 recorded them."""
    settings = json.loads(content)
    record = settings.pop("trained_on", None) or []
    kept = [each for each in record if len(each) == DIGITS]
    if len(kept) == len(record):
        return content
    print(
        f"warning: {path} records {len(record) - len(kept)} subjects as version 0.1.0 did, in a form that can be "
        "guessed, which is left out of the archive: evaluations by it cannot refuse them.",
        file=sys.stderr,
    )
    settings |= {"trained_on": kept} if kept else {}  # without it, an evaluation says that nothing is known
    return json.dumps(settings, indent=1).encode()


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def released_version(bundle: Path) -> str:
    """The version of a bundle's metadata, which must have a changelog entry."""
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))
    version, changelog = str(metadata["version"]), metadata["changelog"]
    if not str(changelog.get(version, "")).strip():
        raise ValueError(
            f"version {version} of {bundle.name} must have an entry in `changelog` of its metadata.json, which has "
            f"{', '.join(changelog) or 'none'}: write what is new."
        )
    return version


def chosen_bundles(name: str) -> list[Path]:
    """Folders of one bundle or, for "all", of all of them; a misspelt name is refused with the nearest."""
    bundles = {path.parent.parent.name: path.parent.parent for path in ROOT.glob("bundles/*/configs/metadata.json")}
    if name == "all":
        return [bundles[each] for each in sorted(bundles)]
    if name not in bundles:
        (near,) = get_close_matches(str(name), bundles, n=1, cutoff=0)
        raise ValueError(f"there is no bundle {name}; did you mean {near}? `all` takes {', '.join(sorted(bundles))}.")
    return [bundles[name]]


def contents(bundle: Path, weights: Path) -> Iterator[tuple[str, Path]]:
    """Name in the bundle's folder and path of all that goes into the archive."""
    root = bundle.parent.parent
    changed = git(root, "status", "--porcelain", "--", str(bundle), PACKAGE)
    if changed:
        raise ValueError(
            f"{bundle.name} and {PACKAGE} must be as they are committed, got {len(changed)} changed or new files, "
            f"{changed[0][3:]} first: commit them."
        )
    for part, folder in ((bundle, bundle), (root / PACKAGE, root)):
        for file in git(root, "ls-files", "--full-name", "--", str(part)):
            yield (root / file).relative_to(folder).as_posix(), root / file
    for name in WEIGHTS:
        if not (weights / name).is_file():
            raise FileNotFoundError(
                f"{bundle.name} has no {weights / name}: train it, or give --weights DIR, where DIR/{bundle.name}/"
                f"{name} is."
            )
        yield name, weights / name
    for codes in sorted(weights.glob("codes/*.pt")):
        yield f"codes/{codes.name}", codes


def git(root: Path, *arguments: str) -> list[str]:
    """Lines that git prints."""
    command = ["git", "-C", str(root), *arguments]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    if result.returncode:
        raise ValueError(f"bundles are packaged from a git repository, and git says: {result.stderr.strip()}")
    return result.stdout.splitlines()


def release(weights: Path, output_dir: Path) -> None:
    """Package all bundles and print what publishes them.

    Raises:
        SystemExit: naming all that is not ready to be published.
    """
    problems = list(changelog_problems((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), __version__))
    problems += wheel_problems(output_dir, __version__)
    print(f"# the package {__version__}: {', '.join(distributions(__version__))}, {SUMS}")
    print(
        f"python -m twine upload {' '.join(str(output_dir / each) for each in distributions(__version__))}",
        "",
        sep="\n",
    )
    for bundle in chosen_bundles("all"):
        problems += [f"{bundle.name}: {each}" for each in card_problems(bundle)]
        try:
            archive = package(bundle, weights / bundle.name, output_dir)
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        version = released_version(bundle)
        print(f"# {bundle.name} {version}: {archive}, {archive.stat().st_size / 2**20:.1f} MiB")
        print(*commands(bundle.name, version, archive), "", sep="\n")
    if problems:
        raise SystemExit("error: not ready to be published:\n" + "\n".join(f"- {each}" for each in problems))


def distributions(version: str) -> tuple[str, str]:
    """Names of the wheel and of the source archive."""
    return f"{PACKAGE}-{version}-py3-none-any.whl", f"{PACKAGE}-{version}.tar.gz"


def wheel_problems(folder: Path, version: str, root: Path = ROOT) -> Iterator[str]:
    """What is wrong with the wheel and the source archive in a folder: missing, changed, or of other code."""
    sums = (folder / SUMS).read_text(encoding="utf-8") if (folder / SUMS).is_file() else ""
    for name in distributions(version):
        if not (folder / name).is_file():
            yield f"{folder / name} is missing: `make dist`"
        elif f"{digest(folder / name)}  {name}\n" not in sums:
            yield f"{folder / name} has not the digest that {SUMS} says: `make dist`"
    wheel = folder / distributions(version)[0]
    if wheel.is_file():
        with zipfile.ZipFile(wheel) as archive:
            held = {name: archive.read(name) for name in archive.namelist() if name.startswith(f"{PACKAGE}/")}
        committed = git(root, "ls-files", "--", PACKAGE)
        if held != {name: (root / name).read_bytes() for name in committed}:
            yield f"{wheel} does not hold {PACKAGE} as it is committed: `make dist`"


def changelog_problems(changelog: str, version: str) -> Iterator[str]:
    """What is wrong with the entry of a version in CHANGELOG.md."""
    entry = re.search(rf"^## {re.escape(version)}\b(.*)$", changelog, re.MULTILINE)
    if entry is None:
        yield f"CHANGELOG.md must have an entry for {version}, the version in {PACKAGE}/common.py"
    elif not re.search(r"\d{4}-\d\d-\d\d", entry[1]):
        yield f"CHANGELOG.md must say when {version} was released, as in `## {version} – 2026-01-31`, got `{entry[0]}`"


def card_problems(bundle: Path) -> Iterator[str]:
    """What a reader of the model card would miss: sections, the warning and licences."""
    card = (bundle / CARD).read_text(encoding="utf-8")
    yield from (f"{CARD} must have `{text.strip()}`" for text in CARD_TEXTS if text not in card)
    yield from (f"{name} is missing" for name in ("LICENSE", "docs/data_license.txt") if not (bundle / name).is_file())


def commands(name: str, version: str, archive: Path) -> list[str]:
    """What publishes one bundle; words in capitals are yours."""
    folder = f"unpacked/{name}"
    return [
        f"unzip -q {archive} -d unpacked",
        f"python -m monai.bundle push_to_hf_hub --repo ORG/{name} --name {name} --bundle_dir unpacked"
        f" --version {version}   # Hugging Face",
        f"cp -r {folder} MODEL_ZOO/models/ && rm -r MODEL_ZOO/models/{name}/{PACKAGE}"
        "   # a pull request to the model zoo, with the wheel in place of the copy: docs/publishing.md",
        f"ngc registry model upload-version ORG/TEAM/{name}:{version} --source {folder}   # NGC",
    ]


if __name__ == "__main__":
    fire.Fire(SetParseFn(str, "weights", "output_dir")(main))  # as they are typed
