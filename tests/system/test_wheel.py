"""The wheel: what is in it, that pip alone installs it, and that what it installs boots a guest and serves gdb."""

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.system.tools import run_gdb

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"machine", "vmm", "gdbstub", "guests", "tools"}
# What a checkout holds beside the sources.
NOT_SOURCES = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def environment() -> dict[str, str]:
    """Return the environment without what would let the checkout be imported in the wheel's place."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, f"{command} ended with status {done.returncode}:\n{done.stdout}"
    return done.stdout


def build_wheel(directory: Path) -> Path:
    """Build the source distribution from a copy of the checkout, the wheel from that, and return the wheel."""
    sources = directory / "sources"
    shutil.copytree(ROOT, sources, ignore=NOT_SOURCES)
    run(sys.executable, "-m", "build", "--outdir", directory / "dist", sources, cwd=directory)
    (wheel,) = directory.glob("dist/*.whl")
    return wheel


def test_the_wheel_holds_the_packages_and_installs_with_pip_alone(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == PACKAGES
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    for package in PACKAGES:
        modules = {path.relative_to(ROOT).as_posix() for path in ROOT.joinpath(package).rglob("*.py")}
        assert modules <= names
    images = {
        path.relative_to(ROOT).as_posix()
        for package in ("guests", "machine")
        for path in ROOT.joinpath(package).rglob("*")
        if path.suffix in (".elf", ".img", ".bin")
    }
    assert {"guests/built/demo.elf", "guests/built/boot.img", "machine/bios/rom.bin"} <= images <= names
    assert any(re.fullmatch(r"trapgate-[^/]*\.dist-info/licenses/LICENSE", name) for name in names)

    venv.create(tmp_path / "venv", with_pip=True)
    binaries = tmp_path / "venv/bin"
    run(binaries / "python", "-m", "pip", "install", "-qq", "--disable-pip-version-check", wheel, cwd=tmp_path)
    assert str(ROOT) not in run(binaries / "python", "-c", "import machine; print(machine.__file__)", cwd=tmp_path)
    assert "usage: trapgate" in run(binaries / "trapgate", "--help", cwd=tmp_path)
    boot = run(binaries / "trapgate", "run", "--gdb", "none", "--append", "run=poweroff", cwd=tmp_path)
    assert "demo kernel" in boot
    assert_gdb_stops_at_a_symbol(binaries / "trapgate", tmp_path)


def assert_gdb_stops_at_a_symbol(trapgate: Path, directory: Path) -> None:
    """Attach gdb to the installed program and stop at a function of the installed demo kernel."""
    arguments = [str(trapgate), "run", "-S", "--gdb", "127.0.0.1:0", "--serial", "none"]
    process = subprocess.Popen(arguments, cwd=directory, env=environment(), stderr=subprocess.PIPE, text=True)
    with process:
        try:
            assert process.stderr is not None
            listening = re.fullmatch(r"gdb: listening on (127\.0\.0\.1:\d+)\n", process.stderr.readline())
            assert listening is not None
            (kernel,) = directory.glob("venv/lib/python*/site-packages/guests/built/demo.elf")
            commands = [f"target remote {listening[1]}", "tbreak syscall_dispatch", "continue", "backtrace 1", "kill"]
            session = run_gdb(commands, program=kernel)
            assert "#0  syscall_dispatch (" in session.output
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()
