"""What the VMM does with exits: which faults are whose, what is counted, and that nothing is adapted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from machine.debug import StopKind, Watchpoint
from tests.engine import trap, trap_nested
from tests.vmm.bare import ORIGIN, PAGE_TABLE, Bare, flat, handler_of, map_low_memory, set_page
from vmm.trap.engine import TrapEngine

Counts = dict[str, int | float | str]


@contextmanager
def guest(source: str, *, nested: bool = False) -> Iterator[Bare]:
    """With paging on; page 5000h is not mapped."""
    bare = flat(source, trap_nested if nested else trap)
    try:
        map_low_memory(bare)
        set_page(bare, 0x5000, 0)
        yield bare
    finally:
        bare.close()


@pytest.fixture(autouse=True)
def _any_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmm.bt.MIN_BUDGET_INSNS", 1)


def counts_of(source: str, *, nested: bool = False) -> Counts:
    with guest(source, nested=nested) as bare:
        assert bare.run(10_000).kind is StopKind.HALTED
        return dict(bare.engine.statistics())


def test_each_store_to_a_page_table_is_a_trace_however_often() -> None:
    touch = (
        f"mov eax, [0x6000]; mov ecx, 100; again: mov dword ptr [{PAGE_TABLE + 4 * 7:#x}], 0x7007; dec ecx; jne again"
    )
    counts = counts_of(f"{touch}; hlt")
    assert counts["exits EXCP_PF trace"] == 100
    assert counts["page tables given up"] == counts["adaptations"] == 0
    assert "exits EXCP_PF trace" not in counts_of(f"{touch}; hlt", nested=True)


@pytest.mark.parametrize("nested", [False, True])
def test_code_that_is_patched_is_translated_each_time(nested: bool) -> None:
    source = "mov esi, 60; again: mov [patched + 1], esi; patched: mov eax, 0x11111111; dec esi; jne again; hlt"
    counts = counts_of(source, nested=nested)
    assert int(counts["fragments dropped"]) >= 59
    assert counts["adaptations"] == counts["adaptations to written code"] == 0


def test_only_the_control_registers_that_are_intercepted_leave_emitted_code() -> None:
    source = "mov ecx, 50; again: mov eax, cr2; mov edx, cr3; mov cr3, edx; dec ecx; jne again; hlt"
    counts = counts_of(source, nested=True)
    assert "callouts of mov_to_cr" not in counts
    assert "callouts of mov_from_cr" not in counts
    assert not any(name.startswith("exits CR") for name in counts)
    counts = counts_of(source)
    assert counts["exits CR3_READ"] == counts["exits CR3_WRITE"] == 50
    assert counts["callouts of mov_from_cr"] == 50, "not those of CR2"


def test_stores_beside_code_are_no_exits() -> None:
    """The native core protects the page, for it holds code in emitted form; hardware does not."""
    counts = counts_of("mov ecx, 100; again: inc dword ptr [0x1f00]; dec ecx; jne again; hlt")
    assert counts["exits EXCP_PF hidden"] == 2, "the fetch, and the store that sets D"
    assert counts["exits"] == 2 + 1, "and HLT"


def test_true_faults_are_injected_under_shadow_paging_only() -> None:
    counts = counts_of("mov eax, [0x5678]")
    assert (counts["exits EXCP_PF true"], counts["injected #PF"], counts["exceptions #PF"]) == (1, 1, 1)
    counts = counts_of("mov eax, [0x5678]", nested=True)
    assert (counts["injected events"], counts["exceptions #PF"]) == (0, 1)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("source", "esp", "first"),
    [("pushad", 0x6008, 0x5FFC), ("pushaw", 0x6004, 0x5FFE), ("popad", 0x4FF8, 0x5000), ("popaw", 0x4FFC, 0x5000)],
)
def test_the_first_of_an_instructions_page_faults_is_told(source: str, esp: int, first: int, nested: bool) -> None:
    """Emitted code asks for the far end of some accesses before it changes anything."""
    with guest(f"nop; mov esp, {esp}; {source}; hlt", nested=nested) as bare:
        bare.debug.set_catches(frozenset({14}))
        stop = bare.run(100)
        assert stop.kind is StopKind.CATCH
        assert stop.level is not None
        assert stop.level.cr2 == first


@pytest.mark.parametrize(("touched", "prefills"), [(0x7027, 1), (0x7007, 0)])
def test_a_page_made_present_is_mapped_if_its_a_bit_says_so(touched: int, prefills: int) -> None:
    """Else the shadow would set A before the guest has touched the page."""
    entry = PAGE_TABLE + 4 * 7
    store = f"mov dword ptr [{entry:#x}], {touched:#x}"
    counts = counts_of(f"mov eax, [0x6000]; mov dword ptr [{entry:#x}], 0; {store}; mov eax, [0x7000]; hlt")
    assert counts["prefills of shadow pages"] == prefills
    hidden = counts_of(f"mov eax, [0x6000]; mov dword ptr [{entry:#x}], 0; {store}; hlt")["exits EXCP_PF hidden"]
    assert int(counts["exits EXCP_PF hidden"]) - int(hidden) == 1 - prefills


def test_what_is_not_intercepted_is_no_exit() -> None:
    source = "mov ecx, 50; again: pushfd; popfd; cli; sti; rdtsc; dec ecx; jne again; hlt"
    for nested in (False, True):
        counts = counts_of(source, nested=nested)
        assert {name for name in counts if name.startswith("exits ")} <= {"exits EXCP_PF hidden", "exits HLT"}


def test_the_same_guest_leaves_as_often_again() -> None:
    source = "mov ecx, 30; again: in al, 0x80; cpuid; mov eax, cr3; mov cr3, eax; mov ecx, 0; hlt"
    first, second = counts_of(source), counts_of(source)
    assert [first[name] for name in first if "second" not in name] == [
        second[name] for name in second if "second" not in name
    ]
    assert first["exits CR3_WRITE"] == first["exits CR3_READ"] == 1
    assert float(first["VMCB reads an exit"]) > 1
    assert float(first["VMCB writes an exit"]) > 0


def test_a_watchpoint_is_the_debuggers_exit() -> None:
    with guest("mov ecx, 5; again: mov [0x6000], ecx; in al, 0x80; dec ecx; jne again; hlt") as bare:
        bare.debug.set_watchpoints(frozenset({Watchpoint(0x6000, 4, on_read=False, on_write=True)}))
        for _ in range(5):
            assert bare.run(100).kind is StopKind.WATCHPOINT
        assert bare.run(100).kind is StopKind.HALTED
        assert bare.engine.statistics()["exits debugger"] == 5
        assert bare.engine.statistics()["exits IN from 0x0080"] == 5


def test_steps_are_world_switches_and_exits_are_handled_in_them() -> None:
    with guest("in al, 0x80; cpuid; mov eax, [0x5678]") as bare:
        for icount in (1, 2, 2):
            assert bare.engine.step().kind is StopKind.STEP
            assert bare.clock.icount == icount
        assert bare.state.cr2 == 0x5678
        assert bare.state.eip >= 0xB000, "the handler has been reached"
        counts = bare.engine.statistics()
        assert counts["exits IN from 0x0080"] == counts["exits CPUID"] == counts["exits EXCP_PF true"] == 1


def test_a_port_of_a_byte_leaves_the_rest_of_eax_alone() -> None:
    with guest("mov eax, 0x11223344; in al, 0x80; hlt") as bare:
        bare.run(100)
        assert bare.state.gpr[0] == 0x1122_33FF


@pytest.mark.parametrize("nested", [False, True])
def test_a_step_that_takes_an_interrupt_ends_in_its_handler(nested: bool) -> None:
    with guest("sti; nop; nop; hlt", nested=nested) as bare:
        bare.lines.set_intr(True)
        eips = []
        for _ in range(3):
            assert bare.engine.step().kind is StopKind.STEP
            eips.append(bare.state.eip)
        assert eips == [ORIGIN + 1, ORIGIN + 2, handler_of(0xFF)]
        assert bare.clock.icount == 2
        assert bare.engine.statistics()["injected INTR"] == 1


def test_addresses_of_exits() -> None:
    with guest("mov esi, 9; again: in al, 0x80; dec esi; jne again; hlt") as bare:
        bare.run(100)
        engine = bare.engine
        assert isinstance(engine, TrapEngine)
        assert {eip: exits for eip, exits, _ in engine.exit_sites(10)}[0x1005] == 9
