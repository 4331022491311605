"""Builds the images that `guests.images` lists, the same bytes wherever and whenever it runs.

It knows gcc, GNU as and ld for 32-bit x86; it must not know what the images do. Run as `python -m guests.build` it
renews the images of this checkout, with `--check` it compares them instead.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from guests import images

MANIFEST = "manifest.json"

# Pentium-class integer code, frame pointers and debug information for stock gdb, nothing of the host in the file.
COMPILE_FLAGS = (
    *("-m32", "-march=pentium", "-mno-mmx", "-mno-sse", "-mno-80387", "-msoft-float"),
    *("-std=gnu11", "-ffreestanding", "-fno-pic", "-fno-pie", "-fno-stack-protector", "-fcf-protection=none"),
    *("-fno-omit-frame-pointer", "-fno-asynchronous-unwind-tables", "-fno-unwind-tables"),
    "-fno-tree-loop-distribute-patterns",  # it would call memset, and the native benchmark would get the host's
    *("-g", "-gdwarf-4", "-Wa,--gdwarf-4", "-gno-record-gcc-switches"),
    *("-Wall", "-Wextra", "-Werror"),
)
LINK_FLAGS = (
    *("-m", "elf_i386", "--build-id=none", "--no-warn-rwx-segments"),
    *("-z", "noexecstack", "-z", "max-page-size=4096"),
)
NATIVE_SOURCE = "bench/native.c"
NATIVE_KERNELS = ("bench/kernels.c", "bench/x87.c", "bench/sse2.c")
NATIVE_COMPUTE = ("fork/native.c", "fork/compute.c")
# The sources that use the FPU.
_FLOATING_FLAGS = {
    "bench/x87.c": ("-m80387", "-mhard-float", "-mfpmath=387"),
    "bench/sse2.c": ("-m80387", "-mhard-float", "-msse2", "-mfpmath=sse"),
}


class BuildError(Exception):
    """A tool is missing or refused its input; the message is the tool's own."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What the shipped images were built with.

    Attributes:
        tools: first line of `--version` of each tool, by its name.
        sha256: digest of each file, in hexadecimal, by its name.
    """

    tools: dict[str, str]
    sha256: dict[str, str]


def _run(command: Sequence[str | Path], directory: Path) -> str:
    """Run a tool in `directory` and return its standard output.

    Raises:
        BuildError: it is not there, or its exit status is not 0.
    """
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    except FileNotFoundError as missing:
        raise BuildError(f"{command[0]} is not installed") from missing
    if done.returncode != 0:
        raise BuildError(f"{' '.join(map(str, command))}\n{done.stderr}")
    return done.stdout


def tool_versions() -> dict[str, str]:
    """Return the first line of `--version` of gcc, as and ld, by their names.

    Raises:
        BuildError: one of them is missing.
    """
    return {tool: _run([tool, "--version"], Path.cwd()).splitlines()[0] for tool in ("gcc", "as", "ld")}


def _compile(source: str, flags: Sequence[str], directory: Path) -> Path:
    """Compile `source`, a path inside this package, to an object file in `directory`; return that."""
    root = images.source_root()
    target = directory / (source.rpartition(".")[0].partition("/")[2].replace("/", "-") + ".o")
    prefix_map = f"-ffile-prefix-map={root}=."
    _run(
        [
            "gcc",
            *COMPILE_FLAGS,
            prefix_map,
            *flags,
            *_FLOATING_FLAGS.get(source, ()),
            "-c",
            f"guests/{source}",
            "-o",
            target,
        ],
        root,
    )
    return target


def build(image: images.Image, directory: Path) -> list[Path]:
    """Build `image` into `directory`, which exists.

    Returns:
        The files made: the image, and for a disk image also the ELF file with its symbols.

    Raises:
        BuildError: a tool is missing or refused its input.
    """
    with tempfile.TemporaryDirectory() as scratch:
        objects = [_compile(source, image.flags, Path(scratch)) for source in image.sources]
        script = images.source_root() / "guests" / image.script
        elf = directory / image.symbols_file_name
        _run(["ld", *LINK_FLAGS, "-T", script, "-o", elf, *objects], directory)
        files = [elf]
        if image.kind == "disk":
            files.append(directory / image.file_name)
            _run(["ld", *LINK_FLAGS, "-T", script, "--oformat", "binary", "-o", files[-1], *objects], directory)
    for file in files:
        file.chmod(0o644)
    return files


def build_native_bench(directory: Path) -> Path:
    """Build the benchmark kernels as a 32-bit program of the host, from the same object code as the guest's.

    Returns:
        The program: takes NAME=REPEATS words, prints what the guest prints for each.

    Raises:
        BuildError: a tool or the 32-bit C library is missing.
    """
    return _build_native("bench", NATIVE_SOURCE, NATIVE_KERNELS, directory)


def build_native_compute(directory: Path) -> Path:
    """Build the computation of the guest `fork` as a 32-bit program of the host, from the same object code.

    Returns:
        The program: takes counts, prints what the guest prints for each.

    Raises:
        BuildError: a tool or the 32-bit C library is missing.
    """
    main, *kernels = NATIVE_COMPUTE
    return _build_native("fork", main, kernels, directory)


def _build_native(image: str, main: str, kernels: Sequence[str], directory: Path) -> Path:
    objects = [_compile(source, images.image(image).flags, directory) for source in kernels]
    root = images.source_root()
    program = directory / f"{image}-native"
    _run(["gcc", "-m32", "-O2", "-no-pie", "-Wall", "-Werror", f"guests/{main}", *objects, "-o", program], root)
    return program


def read_manifest() -> Manifest:
    """Return the manifest of the shipped images."""
    document = json.loads((images.built_directory() / MANIFEST).read_text())
    return Manifest(tools=document["tools"], sha256=document["sha256"])


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def renew() -> None:
    """Build all images into the package and write the manifest.

    Raises:
        BuildError: a tool is missing or refused its input.
    """
    directory = images.built_directory()
    directory.mkdir(exist_ok=True)
    files = [file for image in images.IMAGES for file in build(image, directory)]
    document = {"tools": tool_versions(), "sha256": {file.name: _digest(file) for file in files}}
    (directory / MANIFEST).write_text(json.dumps(document, indent=2) + "\n")


def differences() -> list[str]:
    """Build all images elsewhere and return the names of the files that are not the shipped ones, byte for byte.

    Raises:
        BuildError: a tool is missing or refused its input.
    """
    with tempfile.TemporaryDirectory() as scratch:
        files = [file for image in images.IMAGES for file in build(image, Path(scratch))]
        return [file.name for file in files if not _is_shipped(file)]


def _is_shipped(file: Path) -> bool:
    shipped = images.built_directory() / file.name
    return shipped.exists() and shipped.read_bytes() == file.read_bytes()


def main(arguments: Sequence[str] | None = None) -> int:
    """Renew or check the shipped images; return 0, or 1 if they differ or cannot be built."""
    parser = argparse.ArgumentParser(
        prog="python -m guests.build", description="Build the guests that ship with trapgate."
    )
    parser.add_argument("--check", action="store_true", help="compare with the shipped images, change nothing")
    options = parser.parse_args(arguments)
    try:
        if not options.check:
            renew()
            return 0
        changed = differences()
    except BuildError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    for name in changed:
        sys.stderr.write(f"{name} differs from what its sources give\n")
    if changed and tool_versions() != read_manifest().tools:
        sys.stderr.write("the tools are not those that the shipped images were built with\n")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
