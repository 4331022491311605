"""Building the guests: the same bytes as shipped, from any directory; and what happens without the tools."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from guests import build, images
from tests.guests.behaviours import BEHAVIOURS

PACKAGE = images.source_root() / "guests"


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[Path]]:
    """All images built just now: the files of each by its name."""
    directory = tmp_path_factory.mktemp("rebuilt")
    return {image.name: build.build(image, directory) for image in images.IMAGES}


@pytest.mark.parametrize("name", images.NAMES)
def test_a_build_gives_what_ships(name: str, rebuilt: Mapping[str, list[Path]]) -> None:
    """Byte for byte with the tools that the shipped ones were built with, else in behaviour."""
    same = [file.read_bytes() == (images.built_directory() / file.name).read_bytes() for file in rebuilt[name]]
    if build.tool_versions() == build.read_manifest().tools:
        assert all(same)
    elif not all(same):
        image = next(file for file in rebuilt[name] if file.name == images.image(name).file_name)
        for behaviour in BEHAVIOURS:
            if behaviour.name == name:
                behaviour.check(image)


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory elsewhere with a copy of the package in it."""
    directory = tmp_path_factory.mktemp("else where")
    shutil.copytree(PACKAGE, directory / "guests", ignore=shutil.ignore_patterns("__pycache__"))
    return directory


def run_builder(directory: Path, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({} if path is None else {"PATH": path})
    return subprocess.run(
        [sys.executable, "-m", "guests.build", *arguments],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_another_directory_gives_the_same_bytes(copied: Path, rebuilt: Mapping[str, list[Path]]) -> None:
    shutil.rmtree(copied / "guests" / "built")
    done = run_builder(copied)
    assert (done.returncode, done.stderr) == (0, "")
    for files in rebuilt.values():
        for file in files:
            assert file.read_bytes() == (copied / "guests" / "built" / file.name).read_bytes(), file.name
    assert run_builder(copied, "--check").returncode == 0


def test_check_finds_a_changed_source_and_names_the_image(copied: Path) -> None:
    source = copied / "guests" / "tiny" / "loop.S"
    text = source.read_text()
    source.write_text(text.replace('"loop', '"pool'))
    done = run_builder(copied, "--check")
    source.write_text(text)
    assert done.returncode == 1
    assert "tiny-loop.elf differs from what its sources give" in done.stderr
    assert "tiny-exit.elf" not in done.stderr


def test_a_missing_compiler_is_said_in_one_line(copied: Path) -> None:
    done = run_builder(copied, path="/nonexistent")
    assert (done.returncode, done.stderr) == (1, "gcc is not installed\n")


def test_an_error_in_a_source_is_the_compilers_own_message(copied: Path) -> None:
    source = copied / "guests" / "demo" / "print.c"
    text = source.read_text()
    source.write_text(f"{text}\nint broken(void) {{ return undeclared; }}\n")
    done = run_builder(copied)
    source.write_text(text)
    assert done.returncode == 1
    assert "guests/demo/print.c" in done.stderr
    assert "undeclared" in done.stderr
