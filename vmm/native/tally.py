"""What `bt` counts: translation, chains, callouts by instruction, and where the time goes; by name, for all to read.

It must not know how any of it is done; what windows and spaces count is their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

from iced_x86 import Decoder

from machine.cpu import Cpu
from machine.instructions import lookup
from machine.state import CS, MASK32, SEG_DB
from vmm.blocks import MAX_INSTRUCTION_BYTES, OPTIONS

MAX_SITES = 1 << 16  # of callouts that are told apart
_UNKNOWN = "unknown"


@dataclass(slots=True)
class Site:
    """A place in guest code whose instruction is interpreted.

    Attributes:
        eip: its address.
        row: the instruction's row in the table, when it was first met.
        count: how often.
    """

    eip: int
    row: str
    count: int = 0


@dataclass(slots=True)
class Tally:
    """The counters of one engine.

    Attributes:
        guest_bytes, guest_insns, host_bytes: of all translations.
        faults_delivered: exceptions of emitted code that were the guest's beyond doubt.
        faults_interpreted: host signals after which the instruction was interpreted.
        budget_exits: host signals because the budget was used up.
        callouts: how often an instruction left emitted code to be interpreted.
        units: translations.
        dropped: fragments that went because their code changed, or a breakpoint came or went.
        flushes: how often the TC was emptied.
        chains_made, chains_broken: direct branches that were pointed at a fragment, and whose fragment went.
        misses: branches that found no entry in the dispatch table.
        seconds_in_run: what all stints took.
    """

    units: int = 0
    guest_bytes: int = 0
    guest_insns: int = 0
    host_bytes: int = 0
    dropped: int = 0
    flushes: int = 0
    chains_made: int = 0
    chains_broken: int = 0
    misses: int = 0
    callouts: int = 0
    faults_delivered: int = 0
    faults_interpreted: int = 0
    budget_exits: int = 0
    seconds_in_tc: float = 0.0
    seconds_in_translator: float = 0.0
    seconds_in_run: float = 0.0
    _chained: Counter[int] = field(default_factory=Counter)  # by the offset of the fragment that is led to
    _sites: dict[int, Site] = field(default_factory=dict)  # by CR3 and EIP
    _others: Site = field(default_factory=lambda: Site(0, _UNKNOWN))

    def translated(self, guest_insns: int, guest_bytes: int, host_bytes: int) -> None:
        """A unit was placed."""
        self.units += 1
        self.guest_insns += guest_insns
        self.guest_bytes += guest_bytes
        self.host_bytes += host_bytes

    def chained(self, target: int) -> None:
        """A direct branch leads to the fragment at offset `target` from now on."""
        self.chains_made += 1
        self._chained[target] += 1

    def drop(self, start: int) -> None:
        """The fragment at offset `start` is no more."""
        self.dropped += 1
        self.chains_broken += self._chained.pop(start, 0)

    def flush(self) -> None:
        """Every fragment is gone."""
        self.flushes += 1
        self.chains_broken += self._chained.total()
        self._chained.clear()

    def chains_to(self, start: int) -> int:
        """How many direct branches lead to the fragment at offset `start`."""
        return self._chained[start]

    def fault(self, *, is_budget: bool) -> None:
        """A host signal came in emitted code, and there is no page to be filled."""
        if is_budget:
            self.budget_exits += 1
        else:
            self.faults_interpreted += 1

    def call_out(self, cpu: Cpu, eip: int) -> None:
        """The instruction at `eip` is going to be interpreted."""
        key = cpu.state.cr3 << 32 | eip
        site = self._sites.get(key)
        if site is None:
            if len(self._sites) >= MAX_SITES:
                site = self._others
            else:
                site = self._sites[key] = Site(eip, _row_at(cpu, eip))
        site.count += 1
        self.callouts += 1

    def hottest(self, count: int) -> Sequence[Site]:
        """The places that call out most often."""
        return sorted(self._sites.values(), key=lambda site: -site.count)[:count]

    def callouts_by_row(self) -> Counter[str]:
        """How often each instruction was interpreted, by its row in the table."""
        rows: Counter[str] = Counter()
        for site in (*self._sites.values(), self._others):
            if site.count:
                rows[site.row] += site.count
        return rows

    def report(self) -> dict[str, int | float | str]:
        """By name; names do not change, since scripts read them."""
        rows = self.callouts_by_row()
        seconds_in_vmm = self.seconds_in_run - self.seconds_in_tc - self.seconds_in_translator
        return {
            "translation units": self.units,
            "guest instructions translated": self.guest_insns,
            "guest bytes translated": self.guest_bytes,
            "host bytes emitted": self.host_bytes,
            "fragments dropped": self.dropped,
            "TC flushes": self.flushes,
            "chains made": self.chains_made,
            "chains broken": self.chains_broken,
            "dispatch misses": self.misses,
            "faults delivered": self.faults_delivered,
            "faults interpreted": self.faults_interpreted,
            "budget exits": self.budget_exits,
            "callouts": self.callouts,
            **{f"callouts of {row}": count for row, count in rows.most_common()},
            "seconds in TC": round(self.seconds_in_tc, 6),
            "seconds in translator": round(self.seconds_in_translator, 6),
            "seconds in VMM": round(max(0.0, seconds_in_vmm), 6),
        }


@dataclass(slots=True)
class Stopwatch:
    """Adds what a stint takes: `with Stopwatch(tally): …`."""

    tally: Tally
    _since: float = 0.0

    def __enter__(self) -> None:
        self._since = perf_counter()

    def __exit__(self, *_details: object) -> None:
        self.tally.seconds_in_run += perf_counter() - self._since


def _row_at(cpu: Cpu, eip: int) -> str:
    """The row of the instruction at `eip`, read without changing anything that the guest can see."""
    code = cpu.state.segments[CS]
    linear = code.base + eip & MASK32
    data = b""
    while len(data) < MAX_INSTRUCTION_BYTES:
        physical = cpu.mmu.probe(linear + len(data) & MASK32)
        at = -1 if physical is None else cpu.memory.ram_address(physical)
        if at < 0:
            break
        data += bytes(cpu.memory.ram8[at : (at | 0xFFF) + 1])
    instruction = Decoder(32 if code.attributes & SEG_DB else 16, data, OPTIONS, eip).decode()
    row = None if instruction.is_invalid else lookup(instruction.code, cpu.model.instructions)
    return _UNKNOWN if row is None else row.mnemonic
