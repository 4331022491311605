"""Adaptation: when the native core changes its mind about guest code and memory, and back, in one place.

It owns thresholds, the counts that are held against them, and the measurements behind them; what is done then is the
business of who asks. It must not know windows, or how instructions are emitted.

Measured on two cores in a virtual machine: a hidden fault costs 10 to 15 us (signal 2, mmap 4, Python the rest), a
store to a traced page by a fault and the interpreter 25 us, by a callout 8, giving up a region of a window 5 us and
0.1 us for each page that was touched in it, a translation unit 100 to 300 us. With the thresholds below, against none
for code and a row of 16 innocent executions: patched code 162 to 14 us an operation, GRUB's first 60 million
instructions 5.1 to 1.3 s of CPU time with 95,550 to 4,979 callouts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vmm.native.volatility import VolatileEntries

if TYPE_CHECKING:
    from vmm.native.fragments import Fragment

# A guest that writes a table again and again, with no page of it touched in between, builds, copies or tears down an
# address space, or has made another use of the memory: windows let go of the table, and its other entries are written
# at full speed. Where that saved fewer stores than it had taken, as the kernel needs the table for itself all the time,
# it takes twice as many the next time.
TABLE_WRITES = 8
TABLE_WRITES_MOST = 1024
_TABLES = 4096

# The same for a page with code that is written to where no code is, as when a program is loaded over another one: a
# store costs 8 to 25 us, a translation 100 to 300, so that many stores are put up with for each unit of the page.
CODE_PAGE_WRITES = 32

# An instruction that faults on a trace or a device, again and again, becomes a callout. Executed so it takes 8 us, and
# a fault takes 25, but the plain form less than 1 ns where nothing is watched. So the callout pays where more than a
# third of the executions touch what is watched: an innocent one weighs 1, one that is not -2, and when the innocent
# ones weigh so much that translating the unit anew is paid for, the plain form comes back. Where an adaptation did not
# pay, as of a copy routine that many share, twice as many faults are put up with the next time.
INSTRUCTION_FAULTS = 24
INSTRUCTION_FAULTS_MOST = 24 << 8
INSTRUCTION_INNOCENT = 24
TOUCH_WEIGHT = 2
ADAPTATION_WEIGHT = 48  # two translations of a unit, in executions by callout

# An instruction whose bytes are written time and again, with the unit around it executed in between, becomes a callout
# too, in no unit: stores to its bytes drop nothing then. That spares the translation of a unit, 100 to 300 us. Where
# only the operand changes, of a MOV that can load it from there, it need not even be a callout.
INSTRUCTION_WRITES = 4
INSTRUCTION_WRITES_MOST = 4 << 8
REWRITTEN_INNOCENT = 64
REWRITE_WEIGHT = 32
_INSTRUCTIONS = 4096

# An instruction that faults on volatile pages, or on traces of page tables, gets a soft form: it walks the guest's
# tables itself, in emitted code. That takes some 10 ns, where a fault takes 25 us and the plain form less than 1 ns; so
# fewer faults are enough, and who need not have taken that way is found out by looking at one access of so many, which
# takes 10 us. An entry may well say the same twice and change all the time, so it takes several such looks in a row
# until the plain form is back.
SOFT_FAULTS = 8
SOFT_ACCESSES = 100_000
SOFT_INNOCENT = 8

# Where emitted code meets a page fault or divide error of the guest's again, the next one is delivered there without an
# exit: 4 to 7 us instead of 100 to 140 on a busy machine, of which the signal alone is 2 to 4. To be known costs a few
# stores, and each fault there that is none of the guest's a walk of its page tables, some 60 host instructions; so the
# first one, which may be the only one, is spared both.
SITE_FAULTS = 2

# A soft form needs no signal to find a page fault of the guest's, or a divide error: 0.1 us instead of 4.5. After so
# many of them for each fault that is put up with before it gets one anyhow, an instruction gets it that can have it.
# That is soon enough, with 64 signals for 0.3 ms, and seldom too soon, where 100,000 accesses take 1 ms.
SIGNALS_FOR_SOFT_FAULT = 8


@dataclass(slots=True)
class TableWrites:
    """How many stores in a row to each page table, or page with code, are put up with.

    Attributes:
        least: how many at first.
    """

    least: int = TABLE_WRITES
    _limits: dict[int, int] = field(default_factory=dict)
    _before: dict[int, bytes] = field(default_factory=dict)  # what tables held when they were let go of

    def is_enough(self, table: int, writes: int) -> bool:
        """Whether to let go of a table after so many stores since a page of it was touched."""
        return writes >= self._limits.get(table, self.least)

    def let_go(self, table: int, held: bytes) -> None:
        """Windows do not depend on a table any more, which holds this."""
        if len(self._before) >= _TABLES:
            self.clear()
        self._before[table] = held

    def take_back(self, table: int, holds: memoryview) -> None:
        """Windows depend on a table again, which holds this now: did it pay?"""
        before = self._before.pop(table, None)
        if before is None:
            return
        limit = self._limits.get(table, self.least)
        old = memoryview(before).cast("I").tolist()
        saved = sum(one != other for one, other in zip(old, holds.cast("I").tolist(), strict=True))
        self._limits[table] = self.least if saved > limit else min(2 * limit, TABLE_WRITES_MOST)

    def clear(self) -> None:
        """Forget all."""
        self._limits.clear()
        self._before.clear()


@dataclass(slots=True, eq=False)
class Culprit:
    """An instruction that has faulted on a trace or a device, or was written to.

    Attributes:
        eip: its address.
        ram_page: the page of RAM that it is in.
        limit: how many faults are put up with.
        writes_limit: how many stores to its bytes are.
        faults, writes: how many came since it was last translated plainly.
        is_adapted: whether it is a callout.
        is_soft: whether it has a soft form, unless it is a callout.
        soft_faults: how many of the faults could have been spared by one.
        soft_limit: how many of these are put up with.
        is_loaded: whether its immediate operand is to be read where it stands.
        first, end: offsets in its page of it and behind it, if stores to it are followed, else 0.
        is_new: it was written to since it was last executed.
        innocent: weight of the executions as a callout that need not have been.
        balance: weight of what callouts have saved since it became one.
        fragments: whose code has it.
    """

    eip: int
    ram_page: int
    limit: int = INSTRUCTION_FAULTS
    writes_limit: int = INSTRUCTION_WRITES
    faults: int = 0
    writes: int = 0
    is_adapted: bool = False
    is_soft: bool = False
    soft_faults: int = 0
    soft_limit: int = SOFT_FAULTS
    is_loaded: bool = False
    first: int = 0
    end: int = 0
    is_new: bool = False
    innocent: int = 0
    balance: int = 0
    fragments: list[Fragment] = field(default_factory=list)

    def execute(self, *, touched: bool) -> bool:
        """It was interpreted, and touched what is watched or not; whether it is to revert."""
        if self.is_soft and not self.is_adapted:
            self.balance += touched
            self.innocent = 0 if touched else self.innocent + 1
            return self.innocent >= SOFT_INNOCENT
        if self.end:
            weight, enough = REWRITE_WEIGHT * (self.is_new or touched), REWRITTEN_INNOCENT
            self.is_new = False
        else:
            weight, enough = TOUCH_WEIGHT * touched, INSTRUCTION_INNOCENT
        self.balance += weight or -1
        self.innocent = max(0, self.innocent - (weight or -1))
        return self.innocent >= enough

    def revert(self) -> None:
        """It gets its plain form back."""
        paid = self.balance > ADAPTATION_WEIGHT
        if self.is_soft:
            self.soft_limit = SOFT_FAULTS if self.balance else min(2 * self.soft_limit, INSTRUCTION_FAULTS_MOST)
            self.is_soft = False
            self.soft_faults = 0
        elif self.end:
            self.writes_limit = INSTRUCTION_WRITES if paid else min(2 * self.writes_limit, INSTRUCTION_WRITES_MOST)
        else:
            self.limit = INSTRUCTION_FAULTS if paid else min(2 * self.limit, INSTRUCTION_FAULTS_MOST)
        self.is_adapted = self.is_new = False
        self.faults = self.writes = self.first = self.end = self.innocent = self.balance = 0
        self.fragments.clear()


@dataclass(slots=True)
class Culprits:
    """All such instructions, by the page of RAM that they are in and by their guest address.

    Attributes:
        counters: adaptations and reversions since the start.
        volatile: page-table entries whose pages may be kept out of the windows; None where nothing is adapted, and no
            instruction has a soft form.
    """

    volatile: VolatileEntries | None = field(default_factory=VolatileEntries)
    counters: dict[str, int] = field(
        default_factory=lambda: {"adaptations": 0, "adaptations to written code": 0, "soft forms": 0, "reversions": 0}
    )
    _by_page: dict[int, dict[int, Culprit]] = field(default_factory=dict)
    _adapted: dict[int, list[Culprit]] = field(default_factory=dict)  # by guest address
    _written: dict[int, list[Culprit]] = field(default_factory=dict)  # those that are written to, by page of RAM
    _count: int = 0

    def fault(self, fragment: Fragment, eip: int, *, soft: bool = False) -> bool:
        """The instruction at `eip` of a fragment has faulted; whether that is to be translated anew.

        Args:
            fragment: where it is.
            eip: its address.
            soft: a soft form would not have faulted.
        """
        culprit = self._of(fragment, eip)
        if soft:
            culprit.soft_faults += 1
            if culprit.soft_faults >= culprit.soft_limit and not culprit.is_soft:
                culprit.is_soft = True
                self._enter(culprit)
                self.counters["soft forms"] += 1
            return culprit.is_soft
        culprit.faults += 1
        if culprit.faults >= culprit.limit and not culprit.is_adapted:
            self._adapt(culprit)
        return culprit.is_adapted

    def signals(self, fragment: Fragment, eip: int) -> int:
        """How many page faults of the guest's by signal an instruction of a fragment may raise."""
        return SIGNALS_FOR_SOFT_FAULT * self._of(fragment, eip).soft_limit

    def soften(self, fragment: Fragment, eip: int) -> None:
        """It has raised so many, and can have a soft form."""
        self._of(fragment, eip).soft_faults = INSTRUCTION_FAULTS_MOST
        self.fault(fragment, eip, soft=True)

    def write(self, fragment: Fragment, first: int, end: int) -> None:
        """A store changed bytes of a fragment, from offset `first` to before `end` of its page."""
        for eip, after in fragment.instructions_in(first, end):
            culprit = self._of(fragment, eip)
            culprit.writes += 1
            if culprit.writes >= culprit.writes_limit and not culprit.is_adapted:
                if not culprit.end:
                    self._written.setdefault(culprit.ram_page, []).append(culprit)
                culprit.first, culprit.end = fragment.first + eip - fragment.eip, after
                self.counters["adaptations to written code"] += 1
                # An opcode of one byte and 4 bytes that change: if it is a MOV, these can be loaded.
                if not culprit.is_loaded and after == culprit.first + 5 and culprit.first < first:
                    culprit.is_loaded = True
                    culprit.writes = 0
                else:
                    culprit.is_loaded = False
                    self._adapt(culprit)
                    culprit.is_new = True

    def note_write(self, ram_page: int, first: int, end: int) -> bool:
        """There was a store to bytes of a page that holds code; whether it was to an instruction that is followed."""
        found = False
        for culprit in self._written.get(ram_page, ()):
            if culprit.first < end and first < culprit.end:
                culprit.is_new = found = True
        return found

    def loaded(self, ram_page: int) -> frozenset[int]:
        """The addresses of a page's instructions whose immediate operand is to be read where it stands."""
        return frozenset(each.eip for each in self._written.get(ram_page, ()) if each.is_loaded)

    def _of(self, fragment: Fragment, eip: int) -> Culprit:
        if self._count >= _INSTRUCTIONS:
            self._clear()
        page = self._by_page.setdefault(fragment.ram_page, {})
        culprit = page.get(eip)
        if culprit is None:
            culprit = page[eip] = Culprit(eip, fragment.ram_page, soft_limit=SOFT_FAULTS)
            self._count += 1
        return culprit

    def _adapt(self, culprit: Culprit) -> None:
        culprit.is_adapted = True
        self._enter(culprit)
        self.counters["adaptations"] += 1

    def _enter(self, culprit: Culprit) -> None:
        known = self._adapted.setdefault(culprit.eip, [])
        if culprit not in known:
            known.append(culprit)

    def soft(self, ram_page: int) -> frozenset[int]:
        """The addresses of a page's instructions that are to have a soft form."""
        page = self._by_page.get(ram_page)
        return frozenset(each.eip for each in page.values() if each.is_soft) if page else frozenset()

    def adapted(self, ram_page: int) -> frozenset[int]:
        """The addresses of a page's instructions that are not to be translated plainly."""
        page = self._by_page.get(ram_page)
        return frozenset(each.eip for each in page.values() if each.is_adapted) if page else frozenset()

    def is_written(self, ram_page: int, eip: int) -> bool:
        """Whether an instruction is a callout because its bytes change, so that nothing depends on them."""
        return any(culprit.eip == eip and culprit.is_adapted for culprit in self._written.get(ram_page, ()))

    def translated(self, fragment: Fragment) -> None:
        """A fragment is there; if an adapted instruction is in it, it goes when that reverts."""
        page = self._by_page.get(fragment.ram_page)
        if page:
            for eip in fragment.unit.eips:
                culprit = page.get(eip)
                if culprit is not None and (culprit.is_adapted or culprit.is_soft):
                    culprit.fragments.append(fragment)

    def has(self, eip: int) -> bool:
        """Whether an instruction at `eip` is adapted."""
        return eip in self._adapted

    def executed(self, eip: int, *, touched: bool) -> list[Fragment]:
        """The instruction at `eip` was interpreted; returns the fragments to be dropped because it reverts.

        Args:
            eip: its address.
            touched: it accessed a device, or wrote to a page that somebody watches.
        """
        found: list[Fragment] = []
        for culprit in tuple(self._adapted.get(eip, ())):
            if culprit.execute(touched=touched):
                found += culprit.fragments
                self._revert(culprit)
        return found

    def forget_fragments(self) -> None:
        """There are none any more."""
        for page in self._by_page.values():
            for culprit in page.values():
                culprit.fragments.clear()

    def _clear(self) -> None:
        """Forget all: what is adapted stays so until it is translated again."""
        self._by_page.clear()
        self._adapted.clear()
        self._written.clear()
        self._count = 0

    def _revert(self, culprit: Culprit) -> None:
        if culprit.end:
            _remove(self._written, culprit.ram_page, culprit)
        culprit.revert()
        _remove(self._adapted, culprit.eip, culprit)
        self.counters["reversions"] += 1


def _remove(lists: dict[int, list[Culprit]], key: int, culprit: Culprit) -> None:
    remaining = lists[key]
    remaining.remove(culprit)
    if not remaining:
        del lists[key]
