"""The QEMU oracle itself: what it returns for programs whose effect is known."""

import struct

import pytest

from tests.oracles import qemu
from tests.oracles.qemu import Mode, QemuError, QemuRun

PRINT_AL = b"\xe6\xe9"  # out 0E9h, al
EXIT_WITH_AL = b"\xe6\xf4"  # out 0F4h, al


def mov_al(value: int) -> bytes:
    return bytes((0xB0, value))


def test_output_and_status_come_back() -> None:
    program = mov_al(0x41) + PRINT_AL + mov_al(0x00) + PRINT_AL + mov_al(0x2A) + EXIT_WITH_AL
    assert qemu.run(program) == QemuRun(b"A\0", 0x2A)


def test_status_zero_is_not_a_reset() -> None:
    assert qemu.run(mov_al(0) + EXIT_WITH_AL) == QemuRun(b"", 0)


def test_a_triple_fault_is_no_status() -> None:
    # The IDTR of reset points at address 0, where there is no descriptor.
    assert qemu.run(mov_al(0x42) + PRINT_AL + b"\x0f\x0b") == QemuRun(b"B", None)


def test_protected_mode_starts_flat_and_in_ring_0() -> None:
    program = b""
    for store in (b"\x66\x8c\xc8", b"\x66\x8c\xd8", b"\x66\x8c\xc0", b"\x66\x8c\xd0"):  # mov ax, cs / ds / es / ss
        program += store + PRINT_AL
    program += b"\x89\xe0" + (PRINT_AL + b"\xc1\xe8\x08") * 4  # mov eax, esp; its four bytes
    program += b"\xbf\x78\x56\x34\x00\xc6\x07\x99\x8a\x07" + PRINT_AL  # a byte through DS at 00345678h
    run = qemu.run(program + mov_al(1) + EXIT_WITH_AL)
    assert run == QemuRun(b"\x08\x10\x10\x10" + struct.pack("<I", qemu.ENTRY_ESP) + b"\x99", 1)


def test_real_mode_starts_at_7c00() -> None:
    # call next; next: pop ax; out al; mov al, ah; out al: prints IP of `next`, then the low byte of CS, then CR0.PE.
    program = b"\xe8\x00\x00\x58" + PRINT_AL + b"\x88\xe0" + PRINT_AL + b"\x8c\xc8" + PRINT_AL
    program += b"\x0f\x20\xc0\x24\x01" + PRINT_AL
    run = qemu.run(program + mov_al(5) + EXIT_WITH_AL, Mode.REAL)
    assert run == QemuRun(b"\x03\x7c\x00\x00", 5)


def test_a_program_that_hangs_is_given_up() -> None:
    with pytest.raises(QemuError, match=r"still running after 0\.5 s; printed b'C'"):
        qemu.run(mov_al(0x43) + PRINT_AL + b"\xeb\xfe", timeout_s=0.5)


def test_a_cpu_that_qemu_does_not_know_is_an_error() -> None:
    with pytest.raises(QemuError, match="nonesuch"):
        qemu.run(EXIT_WITH_AL, cpu="nonesuch")
