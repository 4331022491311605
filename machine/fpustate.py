"""The registers of x87 FPU, MMX and SSE, in one page of memory that an engine can hand to the host's own FPU.

It owns the layout and the rules that tie the parts of the state together (tags, summary bits, reset values). It must
not know instructions, nor how results are computed.

The page begins with an image in the format of FXSAVE, so that loading and storing the whole state is one instruction
for an engine. Behind it lie the pointers to the last instruction and operand, which are the guest's and which no host
keeps for us, and the places where an engine finds operands and leaves results.

Source: SDM Vol. 1, "x87 FPU Execution Environment" and "MXCSR Control and Status Register"; Vol. 2A, "FXSAVE";
Vol. 3A, table "IA-32 and Intel 64 Processor States Following Power-up, Reset, or INIT".
"""

from __future__ import annotations

import mmap
from typing import Final

FXSAVE_BYTES: Final = 512
REGISTERS_BYTES: Final = 288
"""So much of an FXSAVE image means something in 32-bit modes: the rest would be XMM8 to XMM15."""

PAGE_BYTES: Final = 4096

# Byte offsets in the page.
FCW: Final = 0
FSW: Final = 2
FTW: Final = 4
MXCSR: Final = 24
MXCSR_MASK: Final = 28
ST: Final = 32
XMM: Final = 160
OPERAND: Final = 512  # memory operand of an instruction, in or out; 16-byte aligned, 32 bytes
FLAGS: Final = 544  # EFLAGS, in and out; 64 bits, of which the upper half is 0
GPR: Final = 552  # general-purpose register operand, in or out; 32 bits
FIP: Final = 556
FCS: Final = 560
FDP: Final = 564
FDS: Final = 568
FOP: Final = 572
ENGINE: Final = 576  # from here to the end of the page the engine keeps what it likes

FCW_RESET: Final = 0x0040
FCW_INIT: Final = 0x037F
FCW_FIXED: Final = 0x0040  # reads as set whatever is written
FCW_WRITABLE: Final = 0x1F3F
FSW_EXCEPTIONS: Final = 0x003F
FSW_INVALID: Final = 0x0001
FSW_STACK_FAULT: Final = 0x0040
FSW_SUMMARY: Final = 0x0080  # ES: an unmasked exception is pending
FSW_BUSY: Final = 0x8000  # the same as ES
FSW_TOP: Final = 0x3800
FSW_TOP_SHIFT: Final = 11
MXCSR_RESET: Final = 0x1F80
MXCSR_WRITABLE: Final = 0xFFFF
MXCSR_MASKS: Final = 0x1F80
MXCSR_MASKS_SHIFT: Final = 7
MXCSR_FLAGS: Final = 0x003F
MXCSR_FLUSH_TO_ZERO: Final = 0x8000

TAG_VALID, TAG_ZERO, TAG_SPECIAL, TAG_EMPTY = range(4)


class FpuState:
    """The state, for the life of a CPU.

    Attributes:
        page: the page; `words`, `halves` and `quads` are 32-, 16- and 64-bit views of it, `bytes8` one of bytes.
    """

    __slots__ = ("bytes8", "halves", "page", "quads", "words")

    def __init__(self) -> None:
        self.page = mmap.mmap(-1, PAGE_BYTES)
        self.bytes8 = memoryview(self.page)
        self.halves = self.bytes8.cast("H")
        self.words = self.bytes8.cast("I")
        self.quads = self.bytes8.cast("Q")
        self.reset()

    def reset(self) -> None:
        """Power-up and RESET: all registers +0.0, and none of them empty."""
        self.bytes8[:ENGINE] = bytes(ENGINE)
        self.halves[FCW // 2] = FCW_RESET
        self.bytes8[FTW] = 0xFF
        self.words[MXCSR // 4] = MXCSR_RESET
        self.words[MXCSR_MASK // 4] = MXCSR_WRITABLE

    def initialize(self) -> None:
        """FNINIT: the x87 registers keep their contents and are empty; MMX shares them, SSE is not touched."""
        self.turn(0)
        self.halves[FCW // 2] = FCW_INIT
        self.halves[FSW // 2] = 0
        self.bytes8[FTW] = 0
        self.words[FIP // 4] = self.words[FCS // 4] = self.words[FDP // 4] = self.words[FDS // 4] = 0
        self.words[FOP // 4] = 0

    def turn(self, top: int) -> None:
        """Make another physical register the top of the stack: the page holds them in the order of the stack."""
        distance = top - self.top & 7
        if distance:
            values = bytes(self.bytes8[ST:XMM])
            self.bytes8[ST:XMM] = values[16 * distance :] + values[: 16 * distance]
            self.halves[FSW // 2] = self.halves[FSW // 2] & ~FSW_TOP | top << FSW_TOP_SHIFT

    # The parts.

    @property
    def fcw(self) -> int:
        """The x87 control word."""
        return self.halves[FCW // 2]

    @fcw.setter
    def fcw(self, value: int) -> None:
        self.halves[FCW // 2] = value & FCW_WRITABLE | FCW_FIXED
        self.summarize()

    @property
    def fsw(self) -> int:
        """The x87 status word, TOP in it; setting it derives ES and B anew."""
        return self.halves[FSW // 2]

    @fsw.setter
    def fsw(self, value: int) -> None:
        self.halves[FSW // 2] = value & 0xFFFF
        self.summarize()

    def summarize(self) -> None:
        """ES and B say whether an exception is flagged that is not masked: they follow from the other bits."""
        fsw = self.halves[FSW // 2] & ~(FSW_SUMMARY | FSW_BUSY)
        if fsw & ~self.halves[FCW // 2] & FSW_EXCEPTIONS:
            fsw |= FSW_SUMMARY | FSW_BUSY
        self.halves[FSW // 2] = fsw

    @property
    def top(self) -> int:
        """The physical register that ST(0) is."""
        return self.halves[FSW // 2] >> FSW_TOP_SHIFT & 7

    @property
    def mxcsr(self) -> int:
        """MXCSR; reserved bits are dropped when it is set."""
        return self.words[MXCSR // 4]

    @mxcsr.setter
    def mxcsr(self, value: int) -> None:
        self.words[MXCSR // 4] = value & MXCSR_WRITABLE

    def st(self, number: int) -> int:
        """ST(number), 80 bits."""
        at = ST + 16 * number
        return int.from_bytes(self.bytes8[at : at + 10], "little")

    def set_st(self, number: int, value: int) -> None:
        """Write the 80 bits of ST(number); whether it is empty is the tag's business."""
        at = ST + 16 * number
        self.bytes8[at : at + 16] = (value & (1 << 80) - 1).to_bytes(16, "little")

    def xmm(self, number: int) -> int:
        """XMM0 to XMM7, 128 bits."""
        at = XMM + 16 * number
        return int.from_bytes(self.bytes8[at : at + 16], "little")

    def set_xmm(self, number: int, value: int) -> None:
        """Write an XMM register."""
        at = XMM + 16 * number
        self.bytes8[at : at + 16] = (value & (1 << 128) - 1).to_bytes(16, "little")

    def mmx(self, number: int) -> int:
        """MM0 to MM7, 64 bits: the significand of a physical register."""
        return self.quads[(ST + 16 * (number - self.top & 7)) // 8]

    @property
    def tags(self) -> int:
        """The tag word of FSTENV: two bits a physical register, register 0 in the lowest."""
        full, kept, top = 0, self.bytes8[FTW], self.top
        for register in range(8):
            tag = self._tag(register - top & 7) if kept >> register & 1 else TAG_EMPTY
            full |= tag << 2 * register
        return full

    @tags.setter
    def tags(self, value: int) -> None:
        kept = 0
        for register in range(8):
            if value >> 2 * register & 3 != TAG_EMPTY:
                kept |= 1 << register
        self.bytes8[FTW] = kept

    def _tag(self, number: int) -> int:
        at = ST + 16 * number
        significand = self.quads[at // 8]
        exponent = self.halves[at // 2 + 4] & 0x7FFF
        if not exponent and not significand:
            return TAG_ZERO
        if exponent in (0, 0x7FFF) or not significand >> 63:
            return TAG_SPECIAL
        return TAG_VALID

    # For snapshots: the image as FXSAVE would store it, then what FXSAVE has no room for.

    def pack(self) -> bytes:
        """512 bytes, in the format of FXSAVE in 32-bit modes; the guest's pointers are in it."""
        image = bytearray(FXSAVE_BYTES)
        image[:REGISTERS_BYTES] = self.bytes8[:REGISTERS_BYTES]
        words = self.words
        image[5] = 0
        image[6:8] = (words[FOP // 4] & 0x7FF).to_bytes(2, "little")
        for at, source in ((8, FIP), (12, FCS), (16, FDP), (20, FDS)):
            image[at : at + 4] = words[source // 4].to_bytes(4, "little")
        image[MXCSR_MASK : MXCSR_MASK + 4] = MXCSR_WRITABLE.to_bytes(4, "little")
        return bytes(image)

    def unpack(self, image: bytes, *, sse: bool = True) -> None:
        """Load what `pack` made; without `sse` MXCSR and the XMM registers stay as they are.

        Bits that no register has are dropped; ES and B are derived.
        """
        words = self.words
        data = self.bytes8
        kept_sse = None if sse else (words[MXCSR // 4], bytes(data[XMM:REGISTERS_BYTES]))
        data[:REGISTERS_BYTES] = image[:REGISTERS_BYTES]
        for number in range(8):
            data[ST + 16 * number + 10 : ST + 16 * number + 16] = bytes(6)
        words[FOP // 4] = int.from_bytes(image[6:8], "little") & 0x7FF
        for at, target in ((8, FIP), (16, FDP)):
            words[target // 4] = int.from_bytes(image[at : at + 4], "little")
        for at, target in ((12, FCS), (20, FDS)):
            words[target // 4] = int.from_bytes(image[at : at + 2], "little")
        data[5] = 0
        words[MXCSR_MASK // 4] = MXCSR_WRITABLE
        if kept_sse is not None:
            words[MXCSR // 4], data[XMM:REGISTERS_BYTES] = kept_sse
        self.mxcsr = words[MXCSR // 4]
        self.fcw = self.halves[FCW // 2]


# What debuggers call the registers: gdb's org.gnu.gdb.i386.core and org.gnu.gdb.i386.sse.

_POINTERS: Final = {"fiseg": FCS, "fioff": FIP, "foseg": FDS, "fooff": FDP, "fop": FOP}
_POINTER_MASKS: Final = {"fiseg": 0xFFFF, "fioff": 0xFFFF_FFFF, "foseg": 0xFFFF, "fooff": 0xFFFF_FFFF, "fop": 0x7FF}

X87_REGISTERS: Final = (
    *(f"st{number}" for number in range(8)), "fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop",
)  # fmt: skip
SSE_REGISTERS: Final = (*(f"xmm{number}" for number in range(8)), "mxcsr")


def read_register(fpu: FpuState, name: str) -> int:
    """A register of `X87_REGISTERS` or `SSE_REGISTERS`: 80, 128 or at most 32 bits."""
    if name.startswith("st"):
        return fpu.st(int(name[2:]))
    if name.startswith("xmm"):
        return fpu.xmm(int(name[3:]))
    if name in _POINTERS:
        return fpu.words[_POINTERS[name] // 4]
    return {"fctrl": fpu.fcw, "fstat": fpu.fsw, "ftag": fpu.tags, "mxcsr": fpu.mxcsr}[name]


def write_register(fpu: FpuState, name: str, value: int) -> None:
    """Write one of them; bits that a register has not are dropped, and what follows from it is derived anew.

    A debugger that writes ST(n) does not change its tag: of the tag word gdb writes every register's emptiness itself.
    """
    if name.startswith("st"):
        fpu.set_st(int(name[2:]), value)
    elif name.startswith("xmm"):
        fpu.set_xmm(int(name[3:]), value)
    elif name in _POINTERS:
        fpu.words[_POINTERS[name] // 4] = value & _POINTER_MASKS[name]
    elif name == "fctrl":
        fpu.fcw = value
    elif name == "fstat":
        fpu.fsw = value
    elif name == "ftag":
        fpu.tags = value
    elif name == "mxcsr":
        fpu.mxcsr = value
    else:
        raise KeyError(name)
