"""Every engine at instruction boundaries: counts, traps, shadows, REP, HLT, self-modifying code, stops."""

from __future__ import annotations

import pytest

from machine.debug import CodeBreakpoint, Stop, StopKind, Watchpoint
from machine.faults import Vector
from machine.flags import IF, RF, TF
from machine.lines import ExitKind, ExitRequest
from machine.state import CR0_PG, CS, DR6_BS, EAX, EBX, ECX, EDI, EDX, ESI, ESP, SHADOW_STI
from tests.vmm.bare import ORIGIN, STACK_TOP, Bare, handler_of
from tests.vmm.engines import Make


def pushed(bare: Bare, slot: int) -> int:
    """A doubleword of the frame on the stack: 0 EIP (or error code), 1 CS, 2 EFLAGS."""
    return bare.memory.load(bare.state.gpr[ESP] + 4 * slot, 4)


def connect_timer(bare: Bare, at_ns: int, vector: int = 0x20) -> None:
    """Raise INTR at a virtual time; the acknowledge drops it."""

    def acknowledge() -> int:
        bare.lines.set_intr(False)
        return vector

    bare.lines.acknowledge = acknowledge
    bare.clock.schedule(at_ns, lambda: bare.lines.set_intr(True))


@pytest.mark.parametrize("insns", range(1, 12))
def test_a_run_stops_at_the_icount_it_was_given(flat: Make, insns: int) -> None:
    bare = flat("nop\nmov eax, 5\ninc eax\n1: add ebx, eax\ndec eax\njnz 1b\nhlt")
    assert bare.run(insns) == Stop(StopKind.BUDGET)
    assert bare.clock.icount == insns
    whole = flat("nop\nmov eax, 5\ninc eax\n1: add ebx, eax\ndec eax\njnz 1b\nhlt")
    for _ in range(insns):
        assert whole.engine.step().kind is StopKind.STEP
    assert whole.state.pack() == bare.state.pack()


def test_a_fault_retires_nothing_and_returns_to_its_instruction(flat: Make) -> None:
    bare = flat("inc eax\nud2")
    bare.run(1)
    bare.engine.run(2)
    assert bare.clock.icount == 2  # the handler's hlt
    assert bare.state.eip == handler_of(Vector.UD) + 1
    assert pushed(bare, 0) == ORIGIN + 1
    assert pushed(bare, 2) & RF


def test_int_n_retires_when_its_handler_is_entered(flat: Make) -> None:
    bare = flat("int 0x40")
    bare.run(1)
    assert bare.clock.icount == 1
    assert bare.state.eip == handler_of(0x40)
    assert pushed(bare, 0) == ORIGIN + 2


class TestTrapFlag:
    def test_the_instruction_after_popf_is_trapped(self, flat: Make) -> None:
        bare = flat("push 0x102\npopfd\nmov eax, 1\nmov eax, 2")
        bare.run(3)
        bare.engine.run(4)
        assert bare.state.gpr[EAX] == 1
        assert pushed(bare, 0) == ORIGIN + 11
        assert bare.state.dr[6] & DR6_BS

    def test_each_iteration_of_a_rep_is_trapped_and_retires_nothing(self, flat: Make) -> None:
        bare = flat("rep movsb\nnop")
        bare.state.gpr[ECX], bare.state.gpr[ESI], bare.state.gpr[EDI] = 3, 0x2000, 0x3000
        bare.state.eflags |= TF
        bare.engine.run(1)
        assert bare.state.gpr[ECX] == 2
        assert pushed(bare, 0) == ORIGIN
        assert bare.clock.icount == 1  # the handler's hlt alone

    def test_mov_ss_loses_the_trap_after_itself(self, flat: Make) -> None:
        bare = flat("mov ss, eax\nmov ebx, 1\nmov ebx, 2")
        bare.state.gpr[EAX] = 0x10
        bare.state.eflags |= TF
        bare.run(2)
        assert bare.state.gpr[EBX] == 1
        assert bare.state.eip == handler_of(Vector.DB)
        assert pushed(bare, 0) == ORIGIN + 2 + 5


class TestShadow:
    def test_sti_holds_interrupts_off_for_one_instruction(self, flat: Make) -> None:
        bare = flat("sti\ninc eax\ninc ebx")
        connect_timer(bare, at_ns=0)
        bare.run(2)
        assert bare.state.gpr[EAX] == 1
        bare.engine.run(3)
        assert bare.state.gpr[EBX] == 0
        assert pushed(bare, 0) == ORIGIN + 2

    def test_the_shadow_survives_the_end_of_a_run(self, flat: Make) -> None:
        bare = flat("sti\ninc eax\ninc ebx")
        connect_timer(bare, at_ns=0)
        bare.run(1)
        assert bare.state.shadow == SHADOW_STI
        bare.engine.step()
        assert bare.state.gpr[EAX] == 1

    def test_sti_with_interrupts_on_has_none(self, flat: Make) -> None:
        bare = flat("sti\ninc eax\ninc ebx")
        bare.state.eflags |= IF
        connect_timer(bare, at_ns=1)
        bare.engine.run(2)
        assert bare.state.gpr[EAX] == 0
        assert pushed(bare, 0) == ORIGIN + 1

    def test_mov_ss_holds_an_nmi_off(self, flat: Make) -> None:
        bare = flat("mov ss, eax\nmov esp, 0x7000\nnop")
        bare.state.gpr[EAX] = 0x10
        bare.run(1)
        bare.lines.raise_nmi()
        bare.run(1)
        assert bare.state.gpr[ESP] == 0x7000
        bare.run(1)
        assert bare.memory.load(0x7000 - 12, 4) == ORIGIN + 7
        assert bare.state.eip == handler_of(Vector.NMI) + 1


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a REP of 100 iterations be a long one for every engine."""
    monkeypatch.setattr("machine.instructions.strings.CHUNK_ITERATIONS", 8)
    monkeypatch.setattr("vmm.interp.PATIENCE_EVENTS", 4)
    monkeypatch.setattr("vmm.native.strings.LIMIT_LOG2", 4)


class TestRep:
    @pytest.mark.usefixtures("short_chunks")
    def test_a_long_rep_is_interrupted_for_the_debugger_and_retires_once(self, flat: Make) -> None:
        bare = flat("rep lodsb\nnop")
        bare.state.gpr[ECX], bare.state.gpr[ESI] = 100, 0x10_0000
        stop = bare.engine.run(1)
        assert stop == Stop(StopKind.BUDGET)
        assert bare.clock.icount == 0
        assert 0 < bare.state.gpr[ECX] < 100
        bare.run(1)
        assert bare.state.gpr[ECX] == 0
        assert bare.clock.icount == 1
        assert bare.state.eip == ORIGIN + 2

    @pytest.mark.usefixtures("short_chunks")
    def test_interrupts_wait_for_its_end(self, flat: Make) -> None:
        bare = flat("rep lodsb\nnop")
        bare.state.gpr[ECX], bare.state.gpr[ESI] = 100, 0x10_0000
        bare.state.eflags |= IF
        bare.engine.run(1)
        connect_timer(bare, at_ns=0)
        bare.run(1)
        assert bare.state.gpr[ECX] == 0
        bare.engine.run(2)
        assert pushed(bare, 0) == ORIGIN + 2

    def test_a_step_is_one_iteration(self, flat: Make) -> None:
        bare = flat("rep movsb\nnop")
        bare.state.gpr[ECX], bare.state.gpr[ESI], bare.state.gpr[EDI] = 2, 0x2000, 0x3000
        assert bare.engine.step().kind is StopKind.STEP
        assert (bare.state.gpr[ECX], bare.state.eip, bare.clock.icount) == (1, ORIGIN, 0)
        bare.engine.step()
        assert (bare.state.gpr[ECX], bare.state.eip, bare.clock.icount) == (0, ORIGIN + 2, 1)

    def test_a_fault_leaves_the_iterations_that_were_done(self, flat: Make) -> None:
        bare = flat("rep stosd")
        bare.state.segments[0].load(0x10, 0, 0x3007, 0x93)
        bare.state.gpr[ECX], bare.state.gpr[EDI] = 4, 0x3000
        bare.engine.run(1)
        assert bare.state.eip == handler_of(Vector.GP) + 1
        assert (bare.state.gpr[ECX], bare.state.gpr[EDI]) == (2, 0x3008)

    def test_scas_ends_at_the_first_match(self, flat: Make) -> None:
        bare = flat("repne scasb\nhlt")
        bare.memory.write(0x3000, b"hello\0rest")
        bare.state.gpr[ECX], bare.state.gpr[EDI] = 0xFFFF_FFFF, 0x3000
        bare.run(1)
        assert bare.state.gpr[EDI] == 0x3006
        assert bare.state.gpr[ECX] == 0xFFFF_FFFF - 6


class TestHalt:
    def test_it_waits_in_virtual_time_for_the_next_event(self, flat: Make) -> None:
        bare = flat("sti\nhlt\nnop")
        connect_timer(bare, at_ns=1_000_000)
        bare.run(3)
        assert bare.clock.now_ns == 1_000_001
        assert bare.clock.icount == 3
        assert pushed(bare, 0) == ORIGIN + 2
        assert bare.state.eip == handler_of(0x20) + 1

    def test_with_interrupts_off_it_is_the_end(self, flat: Make) -> None:
        bare = flat("cli\nhlt")
        assert bare.run(10).kind is StopKind.HALTED
        assert bare.clock.icount == 2

    def test_a_step_on_it_wakes_at_the_next_event(self, flat: Make) -> None:
        bare = flat("sti\nhlt\nnop")
        connect_timer(bare, at_ns=1_000_000)
        bare.engine.step()
        bare.engine.step()
        assert bare.state.halted
        assert bare.engine.step().kind is StopKind.STEP
        assert bare.state.eip == handler_of(0x20)

    def test_a_step_without_interrupts_goes_to_the_next_instruction(self, flat: Make) -> None:
        bare = flat("sti\nhlt\nmov eax, 1")
        bare.debug.step_interrupts = False
        connect_timer(bare, at_ns=1_000_000)
        for _ in range(4):
            bare.engine.step()
        assert bare.state.gpr[EAX] == 1
        assert bare.lines.intr
        bare.engine.run(bare.clock.icount + 1)
        assert bare.state.segments[CS].selector == 8
        assert pushed(bare, 0) == ORIGIN + 7


class TestChangingCode:
    def test_a_store_into_the_next_instruction_acts_at_once(self, flat: Make) -> None:
        bare = flat("mov byte ptr [1f + 1], 7\n1: mov al, 1\nhlt")
        bare.run(2)
        assert bare.state.gpr[EAX] & 0xFF == 7

    def test_a_loop_that_patches_itself(self, flat: Make) -> None:
        bare = flat("inc byte ptr [1f + 2]\n1: add eax, 0\nhlt")
        for turn in range(1, 4):
            bare.state.eip = ORIGIN
            bare.run(2)
            assert bare.state.gpr[EAX] == turn * (turn + 1) // 2

    def test_a_debuggers_write_is_seen(self, flat: Make) -> None:
        bare = flat("1: mov al, 1\njmp 1b")
        bare.run(20)
        bare.memory.write(ORIGIN + 1, b"\x09")
        bare.run(2)
        assert bare.state.gpr[EAX] & 0xFF == 9

    def test_data_beside_code_does_not_drop_it(self, flat: Make) -> None:
        bare = flat("1: inc dword ptr [data]\njmp 1b\n.balign 64\ndata: .long 0")
        bare.run(48)  # bt gives the page up as one of data later
        assert bare.engine.statistics()["invalidations"] == 0
        bare.run(2000 - 48)
        assert bare.memory.load(ORIGIN + 64, 4) == 1000

    def test_an_instruction_across_two_pages(self, flat: Make) -> None:
        bare = flat("nop")
        bare.memory.write(0x1FFD, b"\xb8\x78\x56\x34\x12\xf4")  # mov eax, 0x12345678; hlt
        bare.state.eip = 0x1FFD
        bare.run(1)
        assert (bare.state.gpr[EAX], bare.state.eip) == (0x1234_5678, 0x2002)
        bare.memory.write(0x2000, b"\x99")
        bare.state.eip = 0x1FFD
        bare.run(1)
        assert bare.state.gpr[EAX] == 0x1299_5678

    @pytest.mark.parametrize("way", ["run", "step", "breakpoint near"])
    def test_code_that_is_mapped_elsewhere(self, flat: Make, way: str) -> None:
        """The same linear address is called before and after its page-table entry changes."""
        directory, table, page = 0x10_0000, 0x10_1000, 0x3000
        bare = flat(f"call {page:#x}\nmov dword ptr [{table + 4 * (page >> 12):#x}], 0x4003\ncall {page:#x}\n1: jmp 1b")
        bare.memory.write(0x3000, b"\x40\xc3\xcc")  # inc eax; ret
        bare.memory.write(0x4000, b"\x43\xc3\xcc")  # inc ebx; ret
        bare.memory.write(directory, (table | 3).to_bytes(4, "little"))
        bare.memory.write(table, b"".join((n << 12 | 3).to_bytes(4, "little") for n in range(1024)))
        bare.state.cr3 = directory
        bare.state.cr0 |= CR0_PG
        bare.cpu.mmu.flush()
        if way == "breakpoint near":
            bare.debug.set_breakpoints(frozenset({CodeBreakpoint(page + 2)}))
        if way == "step":
            for _ in range(7):
                assert bare.engine.step().kind is StopKind.STEP
        else:
            assert bare.run(7) == Stop(StopKind.BUDGET)
        assert (bare.state.gpr[EAX], bare.state.gpr[EBX]) == (1, 1)


class TestLength:
    def test_fifteen_bytes_are_the_limit(self, flat: Make) -> None:
        bare = flat(".byte " + "0x2e," * 14 + "0x90")
        bare.run(1)
        assert bare.state.eip == ORIGIN + 15

    @pytest.mark.parametrize("code", [b"\x2e" * 15 + b"\x90", b"\x66" * 10 + b"\xc7\x05" + bytes(8)])
    def test_beyond_it_is_general_protection(self, flat: Make, code: bytes) -> None:
        bare = flat("nop")
        bare.memory.write(ORIGIN, code)
        bare.engine.run(1)
        assert bare.state.eip == handler_of(Vector.GP) + 1
        assert pushed(bare, 0) == 0
        assert pushed(bare, 1) == ORIGIN

    @pytest.mark.parametrize("code", ["f001c0", "f0f4", "0f0b", "0f0d00", "0fff", "f3f00f10c0", "0f6fc0", "0f58c0"])
    def test_what_the_cpu_does_not_have_is_undefined(self, flat: Make, code: str) -> None:
        bare = flat("nop")
        bare.memory.write(ORIGIN, bytes.fromhex(code).ljust(16, b"\xc0"))
        bare.engine.run(1)
        assert bare.state.eip == handler_of(Vector.UD) + 1
        assert pushed(bare, 0) == ORIGIN


class TestStops:
    def test_a_breakpoint_stops_before_its_instruction_each_time(self, flat: Make) -> None:
        bare = flat("1: inc eax\nx: inc ebx\njmp 1b")
        breakpoint_ = CodeBreakpoint(ORIGIN + 1)
        bare.debug.set_breakpoints(frozenset({breakpoint_}))
        for turn in range(1, 4):
            stop = bare.engine.run(100, skip_breakpoint=True)
            assert stop == Stop(StopKind.BREAKPOINT, linear=ORIGIN + 1, breakpoint=breakpoint_)
            assert (bare.state.gpr[EAX], bare.state.gpr[EBX]) == (turn, turn - 1)

    def test_a_physical_breakpoint_and_one_for_another_address_space(self, flat: Make) -> None:
        bare = flat("inc eax\ninc ebx\ninc edx")
        physical = CodeBreakpoint(ORIGIN + 2, physical=True)
        elsewhere = CodeBreakpoint(ORIGIN + 1, cr3=0x5000)
        bare.debug.set_breakpoints(frozenset({physical, elsewhere}))
        stop = bare.engine.run(100)
        assert stop.breakpoint == physical
        assert bare.state.gpr[EBX] == 1

    def test_a_watchpoint_stops_after_the_write_and_names_the_byte(self, flat: Make) -> None:
        bare = flat("mov dword ptr [0x3000], 1\nmov dword ptr [0x3004], 2\nnop")
        watchpoint = Watchpoint(0x3006, 1, on_read=False, on_write=True)
        bare.debug.set_watchpoints(frozenset({watchpoint}))
        stop = bare.engine.run(100)
        assert (stop.kind, stop.linear, stop.was_write) == (StopKind.WATCHPOINT, 0x3006, True)
        assert bare.clock.icount == 2
        assert bare.memory.load(0x3004, 4) == 2

    def test_a_read_watchpoint_ignores_writes(self, flat: Make) -> None:
        bare = flat("mov dword ptr [0x3000], 1\nmov eax, [0x3000]\nnop")
        bare.debug.set_watchpoints(frozenset({Watchpoint(0x3000, 4, on_read=True, on_write=False)}))
        stop = bare.engine.run(100)
        assert (stop.kind, stop.was_write, bare.clock.icount) == (StopKind.WATCHPOINT, False, 2)

    def test_a_physical_watchpoint(self, flat: Make) -> None:
        bare = flat("mov dword ptr [0x3000], 1\nnop")
        bare.debug.set_watchpoints(frozenset({Watchpoint(0x3002, 1, on_read=False, on_write=True, physical=True)}))
        assert bare.engine.run(100).kind is StopKind.WATCHPOINT

    def test_a_caught_exception_stops_before_delivery_and_goes_on(self, flat: Make) -> None:
        bare = flat("xor ecx, ecx\ndiv ecx")
        bare.debug.set_catches(frozenset({Vector.DE}))
        stop = bare.engine.run(100)
        assert stop.kind is StopKind.CATCH
        assert stop.level is not None
        assert (stop.level.vector, stop.level.eip, bare.state.eip) == (Vector.DE, ORIGIN + 2, ORIGIN + 2)
        assert bare.engine.run(100).kind is StopKind.CATCH
        bare.engine.run(2, deliver_caught=True)
        assert bare.state.eip == handler_of(Vector.DE) + 1

    def test_a_caught_interrupt_names_its_vector(self, flat: Make) -> None:
        bare = flat("sti\n1: jmp 1b")
        connect_timer(bare, at_ns=10, vector=0x21)
        bare.lines.peek = lambda: 0x21
        bare.debug.set_catches(frozenset(), interrupts=True)
        stop = bare.engine.run(100)
        assert stop.level is not None
        assert (stop.kind, stop.level.vector, stop.level.external) == (StopKind.CATCH, 0x21, True)
        bare.engine.step(deliver_caught=True)
        assert bare.state.eip == handler_of(0x21)

    def test_a_triple_fault_shows_its_chain(self, flat: Make) -> None:
        bare = flat("ud2")
        bare.state.idtr.limit = 0
        stop = bare.engine.run(100)
        assert stop.kind is StopKind.TRIPLE_FAULT
        assert [level.vector for level in stop.chain][:2] == [Vector.UD, Vector.GP]
        assert [level.vector for level in stop.chain][-2:] == [Vector.DF, Vector.GP]
        assert bare.state.eip == ORIGIN

    def test_a_device_ends_the_run(self, flat: Make) -> None:
        bare = flat("mov al, 3\nout 0x50, al\nnop")

        class ExitPort:
            def load_port(self, port: int, size_bytes: int) -> int:
                return port + size_bytes

            def store_port(self, port: int, size_bytes: int, value: int) -> None:
                assert (port, size_bytes) == (0x50, 1)
                bare.lines.request_exit(ExitRequest(ExitKind.DEBUG_EXIT, value))

        bare.ports.register(0x50, 0x50, ExitPort())
        stop = bare.engine.run(100)
        assert stop.exit_request == ExitRequest(ExitKind.DEBUG_EXIT, 3)
        assert bare.clock.icount == 2

    def test_a_guest_that_never_retires_anything_lets_the_debugger_in(self, flat: Make) -> None:
        bare = flat("ud2")
        bare.memory.write(handler_of(Vector.UD), b"\x0f\x0b")
        bare.state.segments[2].load(0x10, 0, 0xFFFF_FFFF, 0x893 | 0x400)
        assert bare.engine.run(100) == Stop(StopKind.BUDGET)
        assert bare.clock.icount == 0


class TestDebugRegisters:
    def test_an_instruction_breakpoint_faults_once(self, flat: Make) -> None:
        bare = flat("inc eax\ninc ebx\nhlt")
        bare.state.dr[0], bare.state.dr[7] = ORIGIN + 1, 0x402
        bare.run(1)
        bare.engine.run(2)
        assert bare.state.eip == handler_of(Vector.DB) + 1
        assert pushed(bare, 0) == ORIGIN + 1
        assert bare.state.dr[6] & 0xF == 1
        bare.memory.write(handler_of(Vector.DB), b"\xcf")  # iretd, with RF in the image set by hand
        frame = bare.state.gpr[ESP]
        bare.memory.store(frame + 8, 4, bare.memory.load(frame + 8, 4) | RF)
        bare.state.eip, bare.state.halted = handler_of(Vector.DB), 0
        bare.run(2)
        assert bare.state.gpr[EBX] == 1
        assert not bare.state.eflags & RF

    def test_a_data_breakpoint_traps_after_the_write(self, flat: Make) -> None:
        bare = flat("mov eax, [0x3000]\nmov [0x3000], eax\nnop")
        bare.state.dr[1], bare.state.dr[7] = 0x3000, 0x400 | 1 << 3 | 0xD << 20
        bare.run(2)
        assert bare.state.eip == handler_of(Vector.DB)
        assert pushed(bare, 0) == ORIGIN + 10
        assert bare.state.dr[6] & 0xF == 2

    def test_dr7_written_by_the_guest_takes_effect_at_the_next_instruction(self, flat: Make) -> None:
        bare = flat("mov eax, offset x\nmov dr0, eax\nmov eax, 0x402\nmov dr7, eax\nx: inc ebx\nhlt")
        bare.run(4)
        bare.engine.run(5)
        assert bare.state.eip == handler_of(Vector.DB) + 1
        assert bare.state.gpr[EBX] == 0


class TestRealMode:
    def test_code_runs_up_to_the_limit_and_faults_beyond(self, real: Make) -> None:
        bare = real("nop")
        bare.memory.write(0xFFFF, b"\x90")
        bare.memory.write(13 * 4, (0x500).to_bytes(4, "little"))
        bare.memory.write(0x500, b"\xf4")
        bare.state.eip = 0xFFFF
        bare.run(1)
        bare.engine.run(2)
        assert bare.state.eip == 0x501
        assert bare.memory.load(bare.state.gpr[ESP], 2) == 0  # EIP 10000h, of which 16 bits are pushed

    def test_a_word_at_the_end_of_a_segment_faults(self, real: Make) -> None:
        bare = real("mov bx, 0xffff\nmov ax, [bx]")
        bare.memory.write(13 * 4, (0x500).to_bytes(4, "little"))
        bare.memory.write(0x500, b"\xf4")
        bare.run(2)
        assert bare.state.eip == 0x501


def test_the_same_program_twice_is_the_same_run(flat: Make) -> None:
    def once() -> tuple[bytes, bytes, int]:
        bare = flat("sti\n1: inc eax\nadd [0x3000], eax\nrdtsc\nxor edx, eax\njmp 1b")
        bare.memory.write(handler_of(0x20), b"\x43\xcf")  # inc ebx; iretd
        for tick in range(100):
            connect_timer(bare, at_ns=tick * 37)
        bare.run(4321)
        return bare.state.pack(), bare.memory.read(0, 0x1_0000), bare.clock.icount

    assert once() == once()
    assert once()[2] == 4321


class RaisesIntr:
    """A device that interrupts when it is written to."""

    def __init__(self, bare: Bare) -> None:
        self.lines = bare.lines
        connect_timer(bare, at_ns=1 << 40)

    def load_port(self, _port: int, _size_bytes: int) -> int:
        return 0

    def store_port(self, _port: int, _size_bytes: int, _value: int) -> None:
        self.lines.set_intr(True)


@pytest.mark.parametrize("output", ["out dx, al", "outsb", "rep outsb"])
def test_an_interrupt_caused_by_output_comes_before_the_next_instruction(flat: Make, output: str) -> None:
    bare = flat(f"sti\nmov ecx, 3\nmov esi, 0x3000\nmov edx, 0x300\n{output}\n1: nop\nnop\nnop\njmp 1b")
    bare.ports.register(0x300, 0x300, RaisesIntr(bare))
    bare.engine.run(100)
    assert bare.state.eip == handler_of(0x20) + 1
    assert bare.memory.read(pushed(bare, 0), 5) == bytes.fromhex("909090ebfb")


def test_rdtsc_in_the_middle_of_a_block_sees_the_exact_icount(flat: Make) -> None:
    bare = flat("nop\nnop\nnop\nrdtsc\nmov ebx, eax\nnop\nrdtsc\nhlt")
    bare.run(8)
    assert (bare.state.gpr[EBX], bare.state.gpr[EAX], bare.state.gpr[EDX]) == (3, 6, 0)


def test_state_of_a_stack_at_its_top(flat: Make) -> None:
    bare = flat("push 1\npop eax")
    bare.run(2)
    assert (bare.state.gpr[EAX], bare.state.gpr[ESP]) == (1, STACK_TOP)
