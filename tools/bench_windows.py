"""What windows cost: first touches, copies of page tables, and switches of address spaces, by guest code under `bt`.

`python -m tools.bench_windows` prints microseconds of CPU time for a page, an entry or a switch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from machine.clock import Clock
from machine.cpu import Cpu
from machine.debug import DebugControl, StopKind
from machine.lines import CpuLines
from machine.memory import PhysicalMemory
from machine.paging import ACCESSED, DIRTY, PS, RW, P
from machine.ports import PortBus
from machine.state import CR0_PE, CR0_PG, CR4_PSE, CS, EAX, EBX, ECX, EDI, ESI, MASK32, SEG_DB, SEG_G
from vmm.bt import BinaryTranslator
from vmm.hostalu import choose_alu

RAM_BYTES = 80 << 20
CODE = 0x1000
DIRECTORY = 0x20_0000
TABLES = 0x20_1000
FIRST = 16 << 20  # what is touched: 64 MiB of RAM from here on
PAGES = (64 << 20) >> 12

# mov [edi], eax; add edi, 4096; dec ecx; jnz; hlt
_IN_TURN = bytes.fromhex("8907 81c700100000 49 75f5 f4")
# imul eax, eax, 41c64e6dh; add eax, 3039h; mov edi, eax; shr edi, 4; and edi, 3fff000h; mov [edi + FIRST], eax;
# dec ecx; jnz; hlt
_AT_RANDOM = bytes.fromhex("69c06d4ec641 0539300000 89c7 c1ef04 81e700f0ff03 898700000001 49 75e1 f4")
# lodsd; and eax, ~2; mov [esi - 4], eax; stosd; dec ecx; jnz; hlt: what fork does to tables, both copies read-only
_COPY_TABLE = bytes.fromhex("ad 83e0fd 8946fc ab 49 75f5 f4")
# mov cr3, ebx; mov edi, FIRST; mov edx, 8; (mov [edi], eax; add edi, 11000h; dec edx; jnz); add ebx, 4096;
# cmp ebx, esi; jb +2; mov ebx, ebp; dec ecx; jnz; hlt
_SWITCH = bytes.fromhex("0f22db bf00000001 ba08000000 8907 81c700100100 4a 75f5 81c300100000 39f3 7202 89eb 49 75d9 f4")


@dataclass(slots=True)
class Guest:
    """A CPU in flat protected mode with paging as a case wants it."""

    cpu: Cpu
    engine: BinaryTranslator

    @property
    def memory(self) -> PhysicalMemory:
        """Its memory."""
        return self.cpu.memory

    def run(self, code: bytes, **registers: int) -> float:
        """Seconds of CPU time from the first instruction of `code` to its HLT."""
        state = self.cpu.state
        self.memory.write(CODE, code)
        state.eip, state.halted = CODE, 0
        names = {"eax": EAX, "ebx": EBX, "ecx": ECX, "esi": ESI, "edi": EDI, "ebp": 5}
        for name, value in registers.items():
            state.gpr[names[name]] = value
        before = time.process_time()
        while self.engine.run(1 << 60).kind is not StopKind.HALTED:
            pass
        return time.process_time() - before

    def close(self) -> None:
        """Give its share of the host back."""
        self.engine.leave()
        self.memory.close()


def make(entry_bits: int | None, *, large: bool = False, touched: bool = False) -> Guest:
    """A guest whose linear addresses are physical ones; without paging if there are no bits for entries.

    Args:
        entry_bits: of the entries of 16 to 80 MiB.
        large: they are of large pages.
        touched: the pages of RAM have been allocated by the host.
    """
    memory = PhysicalMemory(RAM_BYTES)
    cpu = Cpu(memory, PortBus(), CpuLines(), Clock(), choose_alu())
    state = cpu.state
    state.cr0 |= CR0_PE
    for number, segment in enumerate(state.segments):
        segment.load(8, 0, MASK32, (0x9B if number == CS else 0x93) | SEG_DB | SEG_G)
    if entry_bits is not None:
        for table in range(20):
            is_low = table < FIRST >> 22
            bits = P | RW | ACCESSED | DIRTY if is_low else P | RW | entry_bits
            first = table << 22
            if large:
                memory.store(DIRECTORY + 4 * table, 4, first | bits | PS)
            else:
                at = TABLES + 4096 * table
                entries = [first + page * 4096 | bits for page in range(1024)]
                memory.write(at, b"".join(entry.to_bytes(4, "little") for entry in entries))
                memory.store(DIRECTORY + 4 * table, 4, at | P | RW | ACCESSED)
        state.cr3 = DIRECTORY
        state.cr4 = CR4_PSE if large else 0
        state.cr0 |= CR0_PG
    if touched:
        for at in range(FIRST, RAM_BYTES, 4096):
            memory.ram8[at] = 1
    engine = BinaryTranslator(cpu, DebugControl())
    engine.enter()
    return Guest(cpu, engine)


def touch(code: bytes, count: int, **options: bool) -> Callable[[int | None], tuple[float, int]]:
    """A case that runs a loop of touches."""

    def case(bits: int | None) -> tuple[float, int]:
        guest = make(bits, **options)
        seconds = guest.run(code, eax=1, ecx=count, edi=FIRST)
        guest.close()
        return seconds, count

    return case


def copy_tables(bits: int | None) -> tuple[float, int]:
    """16 tables, whose pages are all mapped, are copied and write-protected."""
    guest = make(bits, touched=True)
    guest.run(_IN_TURN, eax=1, ecx=PAGES, edi=FIRST)
    count = 16 * 1024
    seconds = guest.run(_COPY_TABLE, ecx=count, esi=TABLES + 4 * 4096, edi=0x30_0000)
    guest.close()
    return seconds, count


def switch(spaces: int) -> Callable[[int | None], tuple[float, int]]:
    """Address spaces that share all tables, 8 pages touched in each after a switch; the second time round."""

    def case(bits: int | None) -> tuple[float, int]:
        guest = make(bits, touched=True)
        first = 0x40_0000
        for number in range(spaces):
            guest.memory.write(first + 4096 * number, guest.memory.read(DIRECTORY, 4096))
        registers = {"eax": 1, "ebx": first, "ebp": first, "esi": first + 4096 * spaces}
        guest.run(_SWITCH, ecx=2 * spaces, **registers)
        seconds = guest.run(_SWITCH, ecx=4000, **registers)
        guest.close()
        return seconds, 4000

    return case


FRESH, USED = 0, ACCESSED | DIRTY
CASES: tuple[tuple[str, Callable[[int | None], tuple[float, int]], int | None], ...] = (
    ("64 MiB in turn, no paging", touch(_IN_TURN, PAGES), None),
    ("64 MiB in turn, no paging, RAM in use", touch(_IN_TURN, PAGES, touched=True), None),
    ("64 MiB in turn, large pages", touch(_IN_TURN, PAGES, large=True, touched=True), USED),
    ("64 MiB in turn, A and D set", touch(_IN_TURN, PAGES, touched=True), USED),
    ("64 MiB in turn, A and D clear", touch(_IN_TURN, PAGES, touched=True), FRESH),
    ("at random, no paging, RAM in use", touch(_AT_RANDOM, PAGES, touched=True), None),
    ("at random, A and D set", touch(_AT_RANDOM, PAGES, touched=True), USED),
    ("at random, A and D clear", touch(_AT_RANDOM, PAGES, touched=True), FRESH),
    ("copying page tables", copy_tables, USED),
    ("switch between 2 address spaces", switch(2), USED),
    ("switch between 40 address spaces", switch(40), USED),
)


def main() -> None:
    """Print a line for each case: the best of three runs."""
    for name, case, bits in CASES:
        seconds, count = min(case(bits) for _ in range(3))
        print(f"{name:40} {seconds / count * 1e6:8.2f} us of {count}", flush=True)


if __name__ == "__main__":
    main()
