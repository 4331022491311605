"""Spaces: where guest code runs at a time, which is a window, a mode and the dispatch table of both.

It keeps what emitted code needs to change spaces by itself in the state block: the spaces of both privilege levels of
the current page tables, and of some page tables used lately. It must not know fragments.
"""

from __future__ import annotations

from collections import OrderedDict

from machine.cpu import Cpu
from machine.memory import PAGE_SHIFT
from machine.segmentation import REAL_ATTRIBUTES
from machine.state import CR0_PG, CR0_WP, CR4_PAE, CR4_PGE, CR4_PSE, CS
from vmm.native import stateblock
from vmm.native.dispatch import DispatchTable
from vmm.native.modes import Mode, Modes
from vmm.native.regions import Region
from vmm.native.sharing import Sharing, Space
from vmm.native.stateblock import StateBlock
from vmm.native.windows import Window, Windows

MAX_OTHER_TABLES = 48  # real-mode code uses many bases of CS, each of which has a table
_PAGING_IN_CR0 = CR0_PG | CR0_WP
_PAGING_IN_CR4 = CR4_PAE | CR4_PSE | CR4_PGE


class Spaces:
    """All spaces of an engine.

    Attributes:
        current: the space that the CPU is in; `select` and `adopt` set it.
        modes: the modes.
        windows: the windows.
        sharing: what dispatch tables have in common.
        drops: how many pages of windows have been unmapped.
    """

    def __init__(self, cpu: Cpu, block: StateBlock, windows: Windows | None = None) -> None:
        """Prepare.

        Args:
            cpu: whose page tables and privilege they are for.
            block: the state block of the emitted code that runs in them.
            windows: of another engine on the same CPU, which attaches and detaches them.
        """
        self._cpu = cpu
        self._block = block
        self._has_own_windows = windows is None
        self.modes = Modes(cpu)
        self.windows = windows or Windows(cpu)
        self.sharing = Sharing(self.windows)
        self.current: Space | None = None
        self.drops = 0
        self._by_window: dict[int, dict[Mode, Space]] = {}
        self._by_table: dict[int, Space] = {}
        self._published: Space | None = None
        self._tables_of_others: OrderedDict[int, Space] = OrderedDict()  # of modes that are not plain; in order of use
        self._real_regime: tuple[int, Mode] | None = None  # what all code segments in the state block have in common
        self._regime: tuple[Mode, int, int] | None = None

    def attach(self) -> None:
        """Begin to follow changes of page tables."""
        if self._has_own_windows:
            self.windows.attach()
        self.windows.on_drop.append(self._page_dropped)
        self.windows.on_close.append(self._region_closed)
        self.windows.on_evict.append(self._window_evicted)

    def detach(self) -> None:
        """Give all address space back."""
        if self._has_own_windows:
            self.windows.detach()
        for host in list(self._by_window):
            self._window_evicted(host)
        self.windows.on_drop.remove(self._page_dropped)
        self.windows.on_close.remove(self._region_closed)
        self.windows.on_evict.remove(self._window_evicted)
        for space in self._by_table.values():
            space.table.close()
        self._by_window.clear()
        self._by_table.clear()
        self._tables_of_others.clear()
        self.current = self._published = None

    def select(self, mode: Mode) -> Space:
        """Make the space of the CPU's page tables and privilege for `mode` the current one, in the state block too."""
        space = self._of(self.windows.select(), mode)
        if space.window.host in self.sharing.cold:
            self.sharing.warm(space)
        self.current = space
        quads = self._block.quads
        quads[stateblock.WINDOW] = space.window.host
        quads[stateblock.DISPATCH] = space.table.host
        if space is not self._published:
            self._publish(space)
        if mode.is_real and not mode.user:
            self._remember_code(space)
        return space

    def adopt(self) -> Space:
        """Emitted code may have gone to another space: the CPU's CR3 and CPL follow it; returns the space."""
        cpu, space = self._cpu, self._by_table[self._block.quads[stateblock.DISPATCH]]
        cr3 = self._block.words[stateblock.CR3]
        if space is not self.current or cr3 != cpu.state.cr3:  # values that differ in PCD and PWT have one space
            self.current = space
            if cr3 != cpu.state.cr3:
                cpu.state.cr3 = cr3
                cpu.mmu.flush()
            cpu.set_cpl(3 if space.mode.user else 0)
            self.windows.select()
            if self._published is None:
                self._publish(space)
            else:
                self._published = space  # as emitted code has done, which goes by what was published
            if not space.mode.is_plain:
                self._tables_of_others.move_to_end(space.table.host)
        return space

    def entry_counts(self) -> list[int]:
        """How many entries each dispatch table has."""
        return [space.table.count() for space in self._by_table.values()]

    def clear_tables(self) -> None:
        """Forget all offsets."""
        for space in self._by_table.values():
            space.table.clear()

    def _of(self, window: Window, mode: Mode) -> Space:
        spaces = self._by_window.setdefault(window.host, {})
        space = spaces.get(mode)
        if space is None:
            if not mode.is_plain and len(self._tables_of_others) >= MAX_OTHER_TABLES:
                self._give_up(next(iter(self._tables_of_others.values())))
            table = DispatchTable(mode.code_base, window.region_shift - PAGE_SHIFT)
            space = spaces[mode] = Space(window, mode, table)
            self.sharing.cold.add(window.host)
            self._by_table[space.table.host] = space
            if not mode.is_plain:
                self._tables_of_others[space.table.host] = space
        elif not mode.is_plain:
            self._tables_of_others.move_to_end(space.table.host)
        return space

    def _give_up(self, space: Space) -> None:
        """Close the table of a space."""
        self._by_window[space.window.host].pop(space.mode, None)
        self._forget_table(space)
        self._published = None
        self._forget_address_spaces()
        self._forget_code()

    def _forget_table(self, space: Space) -> None:
        for number in list(space.shared):
            self.sharing.leave(space, number)
        del self._by_table[space.table.host]
        self._tables_of_others.pop(space.table.host, None)
        space.table.close()
        if space is self.current:
            self.current = None

    def _publish(self, space: Space) -> None:
        """Tell emitted code about the two privilege levels of this address space, as far as they have been used."""
        quads = self._block.quads
        self._published = space
        if space.mode.is_real and not space.mode.user:
            self._forget_privileges()
            if self._regime is not None:
                self._forget_address_spaces()
                self._regime = None
            return
        cr3 = self._cpu.state.cr3
        for user, fields in ((False, stateblock.KERNEL_SPACE), (True, stateblock.USER_SPACE)):
            mode = self.modes.with_privilege(space.mode, user=user)
            window = self.windows.lookup(cr3, user=user)
            other = None if window is None else self._by_window.get(window.host, {}).get(mode)
            quads[fields] = 0 if other is None else other.window.host
            quads[fields + 1] = 0 if other is None else other.table.host
        self._remember(cr3, space.mode)

    def _forget_privileges(self) -> None:
        quads = self._block.quads
        for fields in (stateblock.KERNEL_SPACE, stateblock.USER_SPACE):
            quads[fields] = quads[fields + 1] = 0

    def _remember(self, cr3: int, mode: Mode) -> None:
        """Let emitted code load this value into CR3 by itself, as long as mode and paging stay what they are."""
        state, quads = self._cpu.state, self._block.quads
        regime = self.modes.with_privilege(mode, user=False), state.cr0 & _PAGING_IN_CR0, state.cr4 & _PAGING_IN_CR4
        if regime != self._regime:
            self._forget_address_spaces()
            self._regime = regime
        if state.cr0 & CR0_PG and not state.cr4 & CR4_PAE:  # PAE checks PDPTEs at each load
            at = _slot_of(cr3)
            quads[at] = cr3
            for number in range(2):
                quads[at + 1 + number] = quads[stateblock.KERNEL_SPACE + number]
                quads[at + 3 + number] = quads[stateblock.USER_SPACE + number]

    def _remember_code(self, space: Space) -> None:
        """Let emitted code load the selector in CS by itself in real mode, as long as all but that is what it is."""
        cs = self._cpu.state.segments[CS]
        if cs.selector << 4 != space.mode.code_base or cs.attributes != REAL_ATTRIBUTES:
            return
        regime = space.window.host, self.modes.at_zero(space.mode)
        if regime != self._real_regime:
            self._forget_code()
            self._real_regime = regime
        at = stateblock.real_space_at(cs.selector)
        self._block.quads[at] = cs.selector
        self._block.quads[at + 1] = space.table.host

    def _forget_code(self) -> None:
        size_bytes = stateblock.REAL_SPACES * stateblock.REAL_SPACE_BYTES
        at = 8 * stateblock.REAL_SPACES_AT
        self._block.data[at : at + size_bytes] = bytes(size_bytes)

    def _forget_address_space(self, cr3: int) -> None:
        at = _slot_of(cr3)
        if self._block.quads[at] & ~0xFFF == cr3:
            self._block.quads[at] = self._block.quads[at + 2] = 0

    def _forget_address_spaces(self) -> None:
        size_bytes = stateblock.ADDRESS_SPACES * stateblock.ADDRESS_SPACE_BYTES
        at = 8 * stateblock.ADDRESS_SPACES_AT
        self._block.data[at : at + size_bytes] = bytes(size_bytes)

    def _page_dropped(self, host: int, page: int) -> None:
        """A page of a window is mapped no more: its addresses are looked up anew."""
        self.drops += 1
        for space in self._by_window.get(host, {}).values():
            space.table.clear_page(page)

    def _region_closed(self, window: Window, region: Region) -> None:
        """What the entries above a page table say is not certain any more, so it may not be what others' say."""
        for space in self._by_window.get(window.host, {}).values():
            self.sharing.leave(space, region.first_page >> space.table.slice_shift)
        if window.host in self.sharing.cold:  # emitted code that loads CR3 would not warm it
            self._forget_address_space(window.key & ~0xFFF)

    def _window_evicted(self, host: int) -> None:
        """The window at `host` stands for other page tables from now on."""
        self.sharing.cold.discard(host)
        for space in self._by_window.pop(host, {}).values():
            self._forget_table(space)
        self._published = None
        self._forget_address_spaces()
        self._forget_code()
        self._forget_privileges()


def _slot_of(cr3: int) -> int:
    """Where the state block has the spaces of a CR3, if it has."""
    slot = cr3 >> PAGE_SHIFT & stateblock.ADDRESS_SPACES - 1
    return stateblock.ADDRESS_SPACES_AT + slot * stateblock.ADDRESS_SPACE_BYTES // 8
