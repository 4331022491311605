"""Volatile pages: those whose table entry changes so often that mapping them again each time is dearer than a walk.

It owns what is remembered of entries, and the thresholds with what was measured for them. It must not know windows, or
who accesses such a page.

Measured: to unmap a page and fill it again takes 20 to 40 us, an access by the software path 8 to 15 ns. So the path
pays where the page is accessed less than some 2000 times between two changes, of which instructions executed are an
upper bound. A touch of a page that is kept out, by an instruction that has no soft form yet, costs 25 us.
"""

from __future__ import annotations

from dataclasses import dataclass, field

VOLATILE_INSNS = 4096  # between two changes
VOLATILE_CHANGES = 8  # as close as that, before the page is kept out
CALM_TOUCHES = 12  # with no change in between, before it comes back; twice as many the next time
CALM_TOUCHES_MOST = 512
_TABLES = 1024


@dataclass(slots=True)
class Entry:
    """What is known of an entry of a page table.

    Attributes:
        changes: close changes in a row.
        changed_icount: of the last one.
        is_out: its page is kept out of the windows.
        value: what it said when the page was last touched.
        touches: how often it said the same.
        calm_touches: how many are enough.
    """

    changes: int = 0
    changed_icount: int = -VOLATILE_INSNS
    is_out: bool = False
    value: int = 0
    touches: int = 0
    calm_touches: int = CALM_TOUCHES

    def come_back(self) -> None:
        """Its page may be mapped."""
        self.is_out = False
        self.changes = self.touches = 0
        self.calm_touches = min(2 * self.calm_touches, CALM_TOUCHES_MOST)


@dataclass(slots=True)
class VolatileEntries:
    """Entries of page tables whose pages were mapped when they changed, by offset of the table in RAM and by number.

    Attributes:
        counters: pages that were kept out, and that came back.
    """

    counters: dict[str, int] = field(default_factory=lambda: {"volatile pages": 0, "volatile pages calmed": 0})
    _tables: dict[int, dict[int, Entry]] = field(default_factory=dict)

    def change(self, table: int, index: int, icount: int) -> bool:
        """An entry has changed whose page is mapped, or was; whether the page is to be kept out from now on."""
        if len(self._tables) >= _TABLES:
            self._tables.clear()
        entries = self._tables.setdefault(table, {})
        entry = entries.get(index)
        if entry is None:
            entry = entries[index] = Entry()
        if icount != entry.changed_icount:  # else another window has it, too
            entry.changes = entry.changes + 1 if icount - entry.changed_icount < VOLATILE_INSNS else 0
            entry.changed_icount = icount
        if entry.changes >= VOLATILE_CHANGES and not entry.is_out:
            entry.is_out = True
            self.counters["volatile pages"] += 1
        return entry.is_out

    def kept_out(self, table: int) -> set[int]:
        """The numbers of a table's entries whose pages are kept out."""
        return {index for index, entry in self._tables.get(table, {}).items() if entry.is_out}

    def touch(self, table: int, index: int, value: int) -> bool:
        """A page is touched by an instruction without a soft form, or looked at: whether it stays out.

        Args:
            table: offset of its page table.
            index: number of its entry.
            value: what the entry says, without A and D.
        """
        entry = self._tables.get(table, {}).get(index)
        if entry is None or not entry.is_out:
            return False
        entry.touches = entry.touches + 1 if value == entry.value else 0
        entry.value = value
        if entry.touches >= entry.calm_touches:
            self.come_back(table, index)
        return entry.is_out

    def come_back(self, table: int, index: int) -> None:
        """A page is mapped in spite of all: it has calmed down, or is touched by what has no soft form."""
        entry = self._tables.get(table, {}).get(index)
        if entry is not None and entry.is_out:
            entry.come_back()
            self.counters["volatile pages calmed"] += 1

    def insist(self, table: int, index: int) -> None:
        """The same for a good while, as keeping the page out would not help."""
        self.come_back(table, index)
        entry = self._tables.get(table, {}).get(index)
        if entry is not None:
            entry.changes = -VOLATILE_CHANGES * 16
