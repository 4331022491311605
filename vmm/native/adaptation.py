"""Adaptation: when the native core changes its mind about guest code and memory, and back, in one place.

It owns thresholds, the counts that are held against them, and the measurements behind them; what is done then is the
business of who asks. It must not know windows, or how instructions are emitted.

Measured on two cores in a virtual machine: a hidden fault costs 10 to 15 us (signal 2, mmap 4, Python the rest), a
store to a traced page by way of the interpreter as much, giving up a region of a window 5 us and 0.1 us for each page
that was touched in it, a translation unit 100 to 200 us.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vmm.native.fragments import Fragment

# A guest that writes a table again and again, with no page of it touched in between, builds, copies or tears down an
# address space, or has made another use of the memory: windows let go of the table, and its other entries are written
# at full speed. Where that saved fewer stores than it had taken, as the kernel needs the table for itself all the time,
# it takes twice as many the next time.
TABLE_WRITES = 8
TABLE_WRITES_MOST = 1024
_TABLES = 4096

# An instruction that faults on a trace or a device is translated anew, without the fault, when the faults have cost
# about as much as that does. It takes 10 us so, where an innocent one takes less than 1 ns: after a few executions in a
# row during which nothing was written to a page that is watched, it gets the plain form back. That nobody sees of a
# device; then the plain form is tried after so many executions, and should one fault come, the other one is back for
# four times as long: at worst a hundredth of the time is spent on trying.
INSTRUCTION_FAULTS = 24
INSTRUCTION_INNOCENT = 16
INSTRUCTION_EXECUTIONS = 2048
INSTRUCTION_EXECUTIONS_MOST = 1 << 20
_INSTRUCTIONS = 4096


@dataclass(slots=True)
class TableWrites:
    """How many stores in a row to each page table are put up with."""

    _limits: dict[int, int] = field(default_factory=dict)
    _before: dict[int, bytes] = field(default_factory=dict)  # what tables held when they were let go of

    def is_enough(self, table: int, writes: int) -> bool:
        """Whether to let go of a table after so many stores since a page of it was touched."""
        return writes >= self._limits.get(table, TABLE_WRITES)

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
        limit = self._limits.get(table, TABLE_WRITES)
        old = memoryview(before).cast("I").tolist()
        saved = sum(one != other for one, other in zip(old, holds.cast("I").tolist(), strict=True))
        self._limits[table] = TABLE_WRITES if saved > limit else min(2 * limit, TABLE_WRITES_MOST)

    def clear(self) -> None:
        """Forget all."""
        self._limits.clear()
        self._before.clear()


@dataclass(slots=True, eq=False)
class Culprit:
    """An instruction that has faulted on a trace or a device.

    Attributes:
        eip: its address.
        limit: how many faults are put up with.
        probation: after how many executions without a fault of a device it is tried in the plain form.
        faults: how often, since it was last translated plainly.
        by_device: whether the last one was a device's.
        is_adapted: whether it is to be translated without the fault.
        executions: how often it has been executed so; for traces, without a write to a watched page.
        traced_writes: the count of these when it was last executed.
        fragments: whose code has it.
    """

    eip: int
    limit: int
    probation: int
    faults: int = 0
    by_device: bool = False
    is_adapted: bool = False
    executions: int = 0
    traced_writes: int = 0
    fragments: list[Fragment] = field(default_factory=list)


@dataclass(slots=True)
class Culprits:
    """All such instructions, by the page of RAM that they are in and by their guest address.

    Attributes:
        counters: adaptations and reversions since the start.
        traced_writes: writes to pages that somebody watches, counted by whoever sees them.
    """

    counters: dict[str, int] = field(default_factory=lambda: {"adaptations": 0, "reversions": 0})
    traced_writes: int = 0
    _by_page: dict[int, dict[int, Culprit]] = field(default_factory=dict)
    _adapted: dict[int, list[Culprit]] = field(default_factory=dict)  # by guest address
    _count: int = 0

    def fault(self, fragment: Fragment, eip: int, *, by_device: bool = False) -> bool:
        """The instruction at `eip` of a fragment has faulted; whether that is to be translated anew."""
        if self._count >= _INSTRUCTIONS:
            self._clear()
        page = self._by_page.setdefault(fragment.ram_page, {})
        culprit = page.get(eip)
        if culprit is None:
            culprit = page[eip] = Culprit(eip, INSTRUCTION_FAULTS, INSTRUCTION_EXECUTIONS)
            self._count += 1
        culprit.faults += 1
        culprit.by_device = by_device
        if culprit.faults >= culprit.limit and not culprit.is_adapted:
            culprit.is_adapted = True
            culprit.executions = 0
            self._adapted.setdefault(eip, []).append(culprit)
            self.counters["adaptations"] += 1
        return culprit.is_adapted

    def adapted(self, ram_page: int) -> frozenset[int]:
        """The addresses of a page's instructions that are not to be translated plainly."""
        page = self._by_page.get(ram_page)
        return frozenset(each.eip for each in page.values() if each.is_adapted) if page else frozenset()

    def translated(self, fragment: Fragment) -> None:
        """A fragment is there; if an adapted instruction is in it, it goes when that reverts."""
        page = self._by_page.get(fragment.ram_page)
        if page:
            for eip in fragment.eips:
                culprit = page.get(eip)
                if culprit is not None and culprit.is_adapted:
                    culprit.fragments.append(fragment)

    def executed(self, eip: int) -> list[Fragment]:
        """The instruction at `eip` was interpreted; returns the fragments to be dropped because it reverts."""
        found: list[Fragment] = []
        for culprit in tuple(self._adapted.get(eip, ())):
            if not culprit.by_device and culprit.traced_writes != self.traced_writes:
                culprit.traced_writes = self.traced_writes
                culprit.executions = 0
                continue
            culprit.executions += 1
            if culprit.executions >= (culprit.probation if culprit.by_device else INSTRUCTION_INNOCENT):
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
        self._count = 0

    def _revert(self, culprit: Culprit) -> None:
        culprit.is_adapted = False
        culprit.fragments.clear()
        culprit.faults = 0
        if culprit.by_device:
            culprit.limit = 1
            culprit.probation = min(4 * culprit.probation, INSTRUCTION_EXECUTIONS_MOST)
        remaining = self._adapted[culprit.eip]
        remaining.remove(culprit)
        if not remaining:
            del self._adapted[culprit.eip]
        self.counters["reversions"] += 1
