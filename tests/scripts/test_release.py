from __future__ import annotations

from pathlib import Path

import pytest
import release
from helpers import ROOT, read, write
from release import card_problems, changelog_problems, commands

import dissect_monai


@pytest.mark.parametrize("bundle", sorted(ROOT.glob("bundles/*")), ids=lambda path: path.name)
def test_model_cards_are_complete(bundle: Path) -> None:
    assert list(card_problems(bundle)) == []


def test_what_a_model_card_lacks_is_named(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "README.md").write_text("# A bundle\n\n## Train\n", encoding="utf-8")
    said = "\n".join(card_problems(tmp_path))
    for lack in ("section `## Limits`", "Not a medical device", "LICENSE", "docs/data_license.txt"):
        assert lack in said
    assert "## Train" not in said


@pytest.mark.parametrize(
    ("changelog", "problem"),
    [
        ("## 1.2.0 – 2026-01-31\n", ""),
        ("## 1.2.0 – unreleased\n", "got `## 1.2.0 – unreleased`"),
        ("## 1.1.0 – 2026-01-31\n", "must have an entry for 1.2.0"),
    ],
)
def test_the_changelog_must_name_version_and_date(changelog: str, problem: str) -> None:
    found = list(changelog_problems(f"# Changelog\n\n{changelog}", "1.2.0"))
    assert len(found) == bool(problem)
    assert problem in "".join(found)


def test_package_changelog_and_citation_have_one_version() -> None:
    changelog, citation = ((ROOT / name).read_text(encoding="utf-8") for name in ("CHANGELOG.md", "CITATION.cff"))
    found = changelog_problems(changelog, dissect_monai.__version__)
    assert not [problem for problem in found if "must have an entry" in problem]
    assert f"\nversion: {dissect_monai.__version__}\n" in citation


def test_all_problems_are_named_after_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def packaged(bundle: Path, weights: Path, output_dir: Path) -> Path:
        if bundle.name == "cxr_classify":
            raise FileNotFoundError("cxr_classify has no weights")
        return write(output_dir / f"{bundle.name}.zip", {})

    monkeypatch.setattr(release, "package", packaged)
    monkeypatch.setattr(release, "changelog_problems", lambda changelog, version: ["no date"])
    with pytest.raises(SystemExit, match=r"(?s)not ready to be published:.*no date.*cxr_classify has no weights"):
        release.main(output_dir=tmp_path)
    printed = capsys.readouterr().out
    assert "pretrain_vq_ssl.zip" in printed
    assert "cxr_classify" not in printed


def test_the_commands_name_version_and_folder() -> None:
    version = read(ROOT / "bundles" / "cxr_classify" / "configs" / "metadata.json")["version"]
    unzip, zoo, ngc, hub = commands("cxr_classify", version, Path("dist/a.zip"))
    assert unzip == "unzip -q dist/a.zip -d unpacked"
    assert "unpacked/cxr_classify" in zoo
    assert f"cxr_classify:{version} --source unpacked/cxr_classify" in ngc
    assert f"--version {version}" in hub
