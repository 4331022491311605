"""Adaptation: when the native core changes its mind about guest code and memory, and back, in one place.

It owns thresholds, the counts that are held against them, and the measurements behind them; what is done then is the
business of who asks. It must not know instructions, windows or fragments.

A hidden fault costs 10 to 15 us (signal 2, mmap 4, Python the rest), a store to a traced page by way of the
interpreter about as much, giving up a region of a window 5 us and 0.1 us for each page that was touched in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# A guest that writes a table again and again, with no page of it touched in between, builds, copies or tears down an
# address space, or has made another use of the memory: windows let go of the table, and its other entries are written
# at full speed. The kernel may need the table for itself at once; so each time it takes twice as many.
TABLE_WRITES = 8
TABLE_WRITES_MOST = 1024
_TABLES = 4096


@dataclass(slots=True)
class TableWrites:
    """How many stores in a row to each page table are put up with."""

    _limits: dict[int, int] = field(default_factory=dict)

    def is_enough(self, table: int, writes: int) -> bool:
        """Whether to let go of a table after so many stores since a page of it was touched."""
        limit = self._limits.get(table, TABLE_WRITES)
        if writes < limit:
            return False
        if len(self._limits) >= _TABLES:
            self._limits.clear()
        self._limits[table] = min(2 * limit, TABLE_WRITES_MOST)
        return True

    def clear(self) -> None:
        """Forget all."""
        self._limits.clear()
