"""Coverage-guided search for a file that makes a loader do anything but load or raise `ImageError`.

Run it by hand: `python -m tests.fuzz.fuzz_loaders [CORPUS] -max_total_time=300`. A corpus directory, if given, is
seeded with images of every format. What it finds becomes a test in tests/machine/loaders.
"""

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["machine.loaders", "machine.disk"]):
    from machine.loaders import ImageError, ImageKind, LoadOptions, Module, load

from tests.machine.loaders.test_properties import SEEDS, check

_RAM_BYTES = 16 << 20
_KINDS = (None, *ImageKind)
_MAX_BYTES = 1 << 16


def one_input(data: bytes) -> None:
    """The first byte picks the options, the rest is the file."""
    if not data:
        return
    choice, image = data[0], data[1:]
    kind = _KINDS[choice % len(_KINDS)] if choice & 0x80 else None
    modules = (Module(image[:64], "module"),) if choice & 0x40 else ()
    options = LoadOptions(
        ram_bytes=_RAM_BYTES,
        kind=kind,
        modules=modules,
        command_line=image[-16:].decode("latin-1"),
        load_address=0x100000 if kind is ImageKind.FLAT else None,
    )
    try:
        loaded = load(image, options)
    except ImageError:
        return
    check(loaded, _RAM_BYTES)


def main() -> None:
    """Seed the corpus and search until the time or the inputs run out."""
    directories = [Path(argument) for argument in sys.argv[1:] if not argument.startswith("-")]
    for directory in directories[:1]:
        directory.mkdir(parents=True, exist_ok=True)
        for name, image in SEEDS.items():
            for choice in (0x00, 0x40):
                (directory / f"{name}-{choice:02x}").write_bytes(bytes((choice,)) + image)
    atheris.Setup([*sys.argv, f"-max_len={_MAX_BYTES}", "-timeout=5", "-rss_limit_mb=1024"], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
