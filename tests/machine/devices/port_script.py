"""A sequence of port accesses that runs on our board, and as machine code under QEMU, and gives the bytes it read."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from machine.devices.board import Board
from tests.machine.devices.rig import advance
from tests.oracles import qemu

_INSNS_PER_POLL = 100
_POLLS = 1_000_000

_IN = {1: b"\xec", 2: b"\x66\xed", 4: b"\xed"}
_OUT = {1: b"\xee", 2: b"\x66\xef", 4: b"\xef"}


@dataclass(slots=True)
class PortScript:
    """Steps in order; `run_on_board` and `run_on_qemu` return what the reads gave, in order."""

    _steps: list[tuple[str, int, int, int]] = field(default_factory=list)

    def __add__(self, other: PortScript) -> PortScript:
        """This script and then the other."""
        return PortScript(self._steps + other._steps)

    def out(self, port: int, *values: int, size: int = 1) -> PortScript:
        """Write each value in turn."""
        self._steps += [("out", port, size, value) for value in values]
        return self

    def read(self, port: int, count: int = 1, size: int = 1) -> PortScript:
        """Read `count` times."""
        self._steps += [("in", port, size, 0)] * count
        return self

    def wait(self, port: int, mask: int, wanted: int) -> PortScript:
        """Poll a byte until `byte & mask == wanted`; what is read on the way is not kept."""
        self._steps.append(("wait", port, mask, wanted))
        return self

    def spend(self, insns: int) -> PortScript:
        """Execute `insns` instructions (an odd number) that touch no port."""
        assert insns & 1
        self._steps.append(("spend", insns, 0, 0))
        return self

    def run_on_board(self, board: Board) -> list[int]:
        """Perform the accesses after as many instructions as the machine code has; events run when they are due."""
        results = []
        for kind, port, size, value in self._steps:
            if kind == "out":
                self._pass(board, 2)
                board.ports.store(port, size, value)
                self._pass(board, 1)
            elif kind == "in":
                self._pass(board, 1)
                results.append(board.ports.load(port, size))
                self._pass(board, 2 * size)
            elif kind == "spend":
                self._pass(board, port)
            else:
                self._poll(board, port, size, value)
        return results

    def _poll(self, board: Board, port: int, mask: int, wanted: int) -> None:
        for _ in range(_POLLS):
            self._pass(board, _INSNS_PER_POLL)
            if board.ports.load(port, 1) & mask == wanted:
                return
        raise AssertionError(f"port {port:#x} never has {wanted:#x} in {mask:#x}")

    @staticmethod
    def _pass(board: Board, insns: int) -> None:
        advance(board.clock, insns)

    def machine_code(self) -> bytes:
        """32-bit code that prints what it reads, little-endian, and exits with 0."""
        code = b""
        for kind, port, size, value in self._steps:
            if kind == "spend":
                code += b"\xb9" + struct.pack("<I", port >> 1) + b"\x49\x75\xfd"  # mov ecx, n; dec ecx; jnz
                continue
            code += b"\xba" + struct.pack("<I", port)  # mov edx, port
            if kind == "out":
                code += b"\xb8" + struct.pack("<I", value) + _OUT[size]  # mov eax, value; out dx, eax
            elif kind == "in":
                code += _IN[size] + b"\xe6\xe9" + b"\xc1\xe8\x08\xe6\xe9" * (size - 1)  # in; out e9h; shr eax, 8; ...
            else:
                # in al, dx; and al, mask; cmp al, wanted; jne in
                code += b"\xec\x24" + bytes((size,)) + b"\x3c" + bytes((value,)) + b"\x75\xf9"
        return code + b"\x31\xc0\xe6\xf4"  # xor eax, eax; out f4h, al

    def run_on_qemu(self, options: Sequence[str] = ()) -> list[int]:
        """Perform the accesses on QEMU's "pc" machine, straight from reset."""
        run = qemu.run(self.machine_code(), options=options)
        assert run.status == 0, run
        results, at = [], 0
        for kind, _, size, _ in self._steps:
            if kind == "in":
                results.append(int.from_bytes(run.output[at : at + size], "little"))
                at += size
        assert at == len(run.output)
        return results
