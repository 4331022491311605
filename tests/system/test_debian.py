"""The guests that come from Debian's packages: they are what `debian` says of them, and QEMU runs them as it says."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system import debian
from tests.system.tools import printed_until, qemu


def serial_output_until(marker: bytes, arguments: list[str], timeout_s: float) -> bytes:
    """Run QEMU until `marker` has been printed on its first serial port, end it, and return what was printed."""
    command = [str(qemu()), "-nodefaults", "-display", "none", "-vga", "std", "-m", "64", "-serial", "stdio"]
    return printed_until(marker, [*command, *arguments], timeout_s)


def test_gnumach_ends_in_its_expected_panic_under_qemu() -> None:
    marker = b"No bootstrap code loaded with the kernel!"
    output = serial_output_until(marker, ["-kernel", str(debian.gnumach()), "-append", "console=com0"], 60)
    assert output.startswith(b"GNU Mach 1.8+git20221224-486\r\n")
    assert b"biosmem: physical memory map:" in output
    assert b"panic ../kern/bootstrap.c:181: bootstrap_create: " + marker in output


def test_memtest_draws_its_screen_on_the_serial_port_under_qemu() -> None:
    arguments = ["-kernel", str(debian.memtest()), "-append", "console=ttyS0,115200 nopause"]
    assert b"Memtest86+ v6.10" in serial_output_until(b"v6.10", arguments, 60)


@pytest.mark.parametrize("floppy", [debian.memtest_floppy, debian.grub_floppy])
def test_a_floppy_has_a_boot_sector(floppy: Callable[[], Path]) -> None:
    image = floppy().read_bytes()
    assert len(image) == debian.FLOPPY_BYTES
    assert image[510:512] == b"\x55\xaa"


def test_a_package_that_does_not_exist_is_a_clear_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(debian.FetchError, match=re.escape("apt could not download memtest86+ for i386")):
        debian.memtest()
    assert not (tmp_path / "trapgate-tests" / "memtest86+").exists()
