"""The frame in which the ROM saves a caller's registers, and through which a service answers.

It owns the layout that rom.S makes; it must not know what any service does.
"""

import struct
from typing import Protocol


class FirmwareCpu(Protocol):
    """What the firmware needs of the CPU that called it."""

    def calls_from_rom(self) -> bool:
        """True if the instruction being executed is in the BIOS ROM, in real or virtual-8086 mode."""
        ...

    def read(self, linear: int, length: int) -> bytes:
        """Guest memory as the caller sees it."""
        ...

    def write(self, linear: int, data: bytes) -> None:
        """Change guest memory as the caller sees it."""
        ...


class _Part:
    """A register or part of one: `bits` bits from bit `shift` of the frame's value number `index`."""

    def __init__(self, index: int, shift: int, bits: int) -> None:
        self._index = index
        self._shift = shift
        self._mask = (1 << bits) - 1

    def __get__(self, frame: "CallFrame", _owner: type) -> int:
        return frame.values[self._index] >> self._shift & self._mask

    def __set__(self, frame: "CallFrame", value: int) -> None:
        others = frame.values[self._index] & ~(self._mask << self._shift)
        frame.values[self._index] = others | (value & self._mask) << self._shift


class _Flag:
    """A flag in the FLAGS image that IRET loads."""

    def __init__(self, mask: int) -> None:
        self._mask = mask

    def __get__(self, frame: "CallFrame", _owner: type) -> bool:
        return bool(frame.flags & self._mask)

    def __set__(self, frame: "CallFrame", value: bool) -> None:
        frame.flags = frame.flags | self._mask if value else frame.flags & ~self._mask


_LAYOUT = struct.Struct("<8I7H")
FRAME_BYTES = _LAYOUT.size
_EDI, _ESI, _EBP, _ESP, _EBX, _EDX, _ECX, _EAX, _ES, _DS, _STATUS, _SERVICE, _IP, _CS, _FLAGS = range(15)

STATUS_DONE = 0
#: In the service number: the ROM calls again at once, not after the next interrupt.
SERVICE_AGAIN = 0x8000


class CallFrame:
    """One call: registers by name, written back with `save`.

    Attributes:
        attempt: how many times the same call was made before, while the service answers with `wait`; or how far it has
            come, while it answers with `again`.
        scratch: 32 bits that last from one attempt to the next (the place of ESP, which POPA skips).
    """

    eax = _Part(_EAX, 0, 32)
    ebx = _Part(_EBX, 0, 32)
    ecx = _Part(_ECX, 0, 32)
    edx = _Part(_EDX, 0, 32)
    esi = _Part(_ESI, 0, 32)
    edi = _Part(_EDI, 0, 32)
    ebp = _Part(_EBP, 0, 32)
    scratch = _Part(_ESP, 0, 32)
    ax = _Part(_EAX, 0, 16)
    bx = _Part(_EBX, 0, 16)
    cx = _Part(_ECX, 0, 16)
    dx = _Part(_EDX, 0, 16)
    si = _Part(_ESI, 0, 16)
    di = _Part(_EDI, 0, 16)
    bp = _Part(_EBP, 0, 16)
    al = _Part(_EAX, 0, 8)
    ah = _Part(_EAX, 8, 8)
    bl = _Part(_EBX, 0, 8)
    bh = _Part(_EBX, 8, 8)
    cl = _Part(_ECX, 0, 8)
    ch = _Part(_ECX, 8, 8)
    dl = _Part(_EDX, 0, 8)
    dh = _Part(_EDX, 8, 8)
    es = _Part(_ES, 0, 16)
    ds = _Part(_DS, 0, 16)
    service = _Part(_SERVICE, 0, 16)
    status = _Part(_STATUS, 0, 16)
    ip = _Part(_IP, 0, 16)
    cs = _Part(_CS, 0, 16)
    flags = _Part(_FLAGS, 0, 16)
    carry = _Flag(1 << 0)
    zero = _Flag(1 << 6)

    def __init__(self, values: list[int]) -> None:
        self.values = values
        self.attempt = self.status
        self.status = STATUS_DONE
        self.service &= ~SERVICE_AGAIN

    @classmethod
    def load(cls, cpu: FirmwareCpu, selector: int, offset: int) -> "CallFrame":
        """Read the frame at SS:SP; it may wrap at the end of the segment."""
        data = b"".join(cpu.read(linear, length) for linear, length in _pieces(selector, offset))
        return cls(list(_LAYOUT.unpack(data)))

    def save(self, cpu: FirmwareCpu, selector: int, offset: int) -> None:
        """Write it back."""
        data = _LAYOUT.pack(*self.values)
        for linear, length in _pieces(selector, offset):
            cpu.write(linear, data[:length])
            data = data[length:]

    def wait(self) -> None:
        """Have the ROM call again after the next interrupt; the service must not have changed other registers."""
        self.status = min(self.attempt + 1, 0xFFFF)

    def again(self, progress: int) -> None:
        """Have the ROM call again at once, with `progress` (1 to 65535) as `attempt`; registers as for `wait`."""
        self.status = progress
        self.service |= SERVICE_AGAIN

    def fail(self, error: int) -> None:
        """The usual error: CF set, AH the code."""
        self.ah = error
        self.carry = True

    def succeed(self) -> None:
        """The usual success: CF clear, AH 0."""
        self.ah = 0
        self.carry = False


def _pieces(selector: int, offset: int) -> list[tuple[int, int]]:
    first = min(FRAME_BYTES, 0x10000 - offset)
    pieces = [((selector << 4) + offset, first)]
    if first < FRAME_BYTES:
        pieces.append((selector << 4, FRAME_BYTES - first))
    return pieces
