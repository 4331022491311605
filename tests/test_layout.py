"""Keeps the rules of who may import whom, and of what a file in this repository may hold, by reading the sources."""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("machine", "vmm", "gdbstub", "guests", "tools")

# Past this a module has a seam that wants finding. Tables, which are read row by row, are excepted.
MAX_MODULE_LINES = 500
TABLES = ("machine/instructions/*",)

# Directories of the machine where something was built; pieced together so that this file may be read like any other.
FORBIDDEN = tuple(b"/" + name + b"/" for name in (b"work", b"root"))


@dataclass(frozen=True, slots=True)
class Room:
    """The modules that match `pattern`, and what they may import beside the standard library.

    `local` and `foreign` are patterns of dotted names: of this repository's modules, and of installed packages.
    """

    pattern: str
    local: tuple[str, ...]
    foreign: tuple[str, ...] = ()


GDBSTUB_CORE = Room("gdbstub/*", ("gdbstub", "gdbstub.*"))
# The protocol core is what is left of gdbstub without these; it may not import them either.
GDBSTUB_EDGES = ("gdbstub.cli*", "gdbstub.server*", "gdbstub.guest*", "gdbstub.monitor*")

# The first room whose pattern matches is the module's own.
ROOMS = (
    Room("machine/*", ("machine", "machine.*"), ("construct", "iced_x86")),
    Room("vmm/*", ("machine", "machine.*", "vmm", "vmm.*"), ("capstone", "construct", "iced_x86")),
    Room("gdbstub/cli*", ("*",), ("trio", "capstone")),
    Room("gdbstub/server*", ("gdbstub", "gdbstub.*"), ("trio",)),
    Room("gdbstub/guest*", ("machine", "machine.*", "vmm", "vmm.*", "gdbstub", "gdbstub.*")),
    Room(
        "gdbstub/monitor/*", ("machine", "machine.*", "vmm", "vmm.*", "gdbstub", "gdbstub.*"), ("capstone", "construct")
    ),
    GDBSTUB_CORE,
    Room("guests/*", ("guests", "guests.*")),
    Room("tools/*", ("*",), ("*",)),
)


def room_of(path: str) -> Room:
    return next(room for room in ROOMS if fnmatchcase(path, room.pattern))


def imported_names(source: str, path: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the dotted name of each import, at whatever depth; `from a import b` yields `a.b`."""
    package = Path(path).parent.parts
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join((*base, *((node.module,) if node.module else ())))
            for alias in node.names:
                yield node.lineno, f"{origin}.{alias.name}"


def broken_rules(source: str, path: str) -> list[str]:
    """Say which imports of the module at `path` (relative to the repository) its room does not allow."""
    room = room_of(path)
    broken = []
    for line, name in imported_names(source, path):
        top = name.partition(".")[0]
        if top in PACKAGES or top == "tests":
            allowed = top != "tests" and any(fnmatchcase(name, pattern) for pattern in room.local)
            if room is GDBSTUB_CORE and any(fnmatchcase(name, pattern) for pattern in GDBSTUB_EDGES):
                allowed = False
        else:
            allowed = top in sys.stdlib_module_names or any(fnmatchcase(top, pattern) for pattern in room.foreign)
        if not allowed:
            broken.append(f"{path}:{line}: {room.pattern} may not import {name}")
    return broken


def modules(package: str) -> list[Path]:
    return sorted(ROOT.joinpath(package).rglob("*.py"))


def tracked_files() -> list[Path]:
    """Return the files that git tracks; in an unpacked archive, all that are not hidden or built."""
    git = shutil.which("git")
    if git is not None and ROOT.joinpath(".git").exists():
        listing = subprocess.run([git, "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
        paths = [ROOT / name for name in listing.decode().split("\0") if name]
    else:
        generated = re.compile(r"/\.|/__pycache__/|\.egg-info/|/(build|dist)/")
        paths = [path for path in ROOT.rglob("*") if not generated.search(f"/{path.relative_to(ROOT).as_posix()}")]
    return [path for path in paths if path.is_file()]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_keep_to_their_rooms(package: str) -> None:
    broken = []
    for module in modules(package):
        broken += broken_rules(module.read_text(), module.relative_to(ROOT).as_posix())
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("machine/cpu.py", "import vmm"),
        ("machine/cpu.py", "from gdbstub import target"),
        ("machine/cpu.py", "import trio"),
        ("machine/devices/pic.py", "from ...vmm import engine"),
        ("machine/cpu.py", "def late():\n    import unicorn"),
        ("machine/cpu.py", "from tests import oracles"),
        ("vmm/engine.py", "import gdbstub.target"),
        ("gdbstub/framing.py", "from machine.state import CpuState"),
        ("gdbstub/framing.py", "import trio"),
        ("gdbstub/framing.py", "from gdbstub.guest import Guest"),
        ("gdbstub/framing.py", "from gdbstub import guest"),
        ("gdbstub/framing.py", "from . import server"),
        ("gdbstub/packets/memory.py", "import vmm"),
        ("gdbstub/guest.py", "import trio"),
        ("gdbstub/monitor/pages.py", "import trio"),
        ("gdbstub/server.py", "import machine.state"),
        ("guests/__init__.py", "import machine"),
    ],
)
def test_a_forbidden_import_is_found(path: str, source: str) -> None:
    assert broken_rules(source, path)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("machine/cpu.py", "from machine.state import CpuState\nfrom . import flags\nimport iced_x86, os.path"),
        ("machine/devices/pic.py", "from ..lines import CpuLines"),
        ("vmm/engine.py", "from machine import cpu"),
        ("gdbstub/server.py", "import trio\nfrom gdbstub import framing"),
        ("gdbstub/cli.py", "import trio\nimport vmm, machine, guests"),
        ("gdbstub/guest_memory.py", "from machine.memory import PhysicalMemory"),
    ],
)
def test_an_allowed_import_is_let_through(path: str, source: str) -> None:
    assert broken_rules(source, path) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_marked_as_typed(package: str) -> None:
    assert ROOT.joinpath(package, "py.typed").is_file()


def test_modules_are_short_enough_to_read() -> None:
    long = {}
    for package in PACKAGES:
        for module in modules(package):
            path = module.relative_to(ROOT).as_posix()
            lines = module.read_text().count("\n")
            if lines > MAX_MODULE_LINES and not any(fnmatchcase(path, pattern) for pattern in TABLES):
                long[path] = lines
    assert long == {}


def test_no_file_names_a_directory_of_the_machine_it_was_made_on() -> None:
    guilty = [
        f"{path.relative_to(ROOT)}: {word.decode()}"
        for path in tracked_files()
        for word in FORBIDDEN
        if word in path.read_bytes()
    ]
    assert not guilty, "\n".join(guilty)
