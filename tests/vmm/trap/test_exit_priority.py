"""Which comes first, an intercept or an exception, and which of two: tables 15-1 and 15-7 of the APM, and 15.12."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from machine.faults import Vector
from machine.flags import NT, VM
from machine.state import (
    CR0_PE,
    CR0_PG,
    CR4_DE,
    CR4_PAE,
    CR4_TSD,
    DR6_BD,
    DR7_GD,
    DS,
    EAX,
    ECX,
    ESI,
    SEG_DB,
    SegmentRegister,
)
from tests.vmm import bare
from tests.vmm.bare import GDT_BASE, Bare, handler_of
from tests.vmm.trap.guestmode import (
    AT,
    OTHER_TSS_SELECTOR,
    TSS,
    Run,
    all_of,
    made,
    nothing,
    ring3,
    segment_not_present,
    tasks,
    to_eax,
    to_ecx,
    unmapped,
)
from vmm.trap.exitcodes import ExitCode
from vmm.trap.exitinfo import Event, EventType, IoInfo, TaskSwitchCause, TaskSwitchInfo
from vmm.trap.intercepts import CR_WRITE_SHIFT, Intercept3
from vmm.trap.permissions import IoPermissions, MsrPermissions

pytestmark = pytest.mark.usefixtures("way")


class TestWhatComesFirst:
    """Exceptions that the manual puts before an intercept, and intercepts that it puts before exceptions."""

    @pytest.mark.parametrize(
        "source",
        [
            "hlt",
            "invd",
            "in al, 0x80",
            "rdmsr",
            "invlpg [eax]",
            "mov eax, cr0",
            "mov cr3, eax",
            "mov eax, dr0",
            "lgdt [eax]",
        ],
    )
    def test_privilege_before_the_exit(self, source: str) -> None:
        with made(source, all_of(tasks, ring3)) as run:
            run.block.intercept3 = 0x3FFF_FFFF & ~int(Intercept3.VINTR)
            run.block.intercept_cr = run.block.intercept_dr = 0xFFFF_FFFF
            run.block.intercept_exceptions = 1 << 13
            assert ExitCode(run.vmrun()) == ExitCode.EXCP_GP

    def test_rdtsc_asks_for_tsd_first(self) -> None:
        with made("rdtsc", ring3) as run:
            run.guest.state.cr4 |= CR4_TSD
            run.block.intercept3 = int(Intercept3.RDTSC)
            run.block.intercept_exceptions = 1 << 13
            assert ExitCode(run.vmrun()) == ExitCode.EXCP_GP

    def test_ts_alone_is_no_selective_write(self) -> None:
        with made("mov eax, cr0; xor eax, 8; mov cr0, eax; clts") as run:
            run.block.intercept3 = int(Intercept3.CR0_SEL_WRITE)
            assert ExitCode(run.vmrun()) == ExitCode.INTR

    def test_a_port_is_asked_for_by_its_bit(self) -> None:
        with made("in al, 0x80; in al, 0x81; in ax, 0x7f") as run:
            run.mode.policy.io = IoPermissions()
            run.mode.policy.io.set(0x81, 0x81, intercept=True)
            run.block.intercept3 = int(Intercept3.IOIO_PROT)
            assert ExitCode(run.vmrun()) == ExitCode.IOIO
            assert run.block.rip == AT + 2

    def test_a_control_register_that_is_none(self) -> None:
        with made(".byte 0x0f, 0x20, 0xc8") as run:  # mov eax, cr1
            run.block.intercept_cr = 0xFFFF_FFFF
            run.block.intercept_exceptions = 1 << 6
            assert ExitCode(run.vmrun()) == ExitCode.EXCP_UD

    def test_no_iteration_is_no_access(self) -> None:
        with made("mov edx, 0x3f8; xor ecx, ecx; rep outsb") as run:
            run.block.intercept3 = int(Intercept3.IOIO_PROT)
            assert ExitCode(run.vmrun()) == ExitCode.INTR

    def test_rep_outs_tells_segment_and_repetition(self) -> None:
        with made("mov edx, 0x3f8; mov ecx, 3; fs rep outsb") as run:
            run.block.intercept3 = int(Intercept3.IOIO_PROT)
            assert ExitCode(run.vmrun()) == ExitCode.IOIO
            info = IoInfo.decode(run.block.exitinfo1, run.block.exitinfo2)
            assert (info.port, info.string, info.rep, info.is_in, info.segment.name) == (0x3F8, True, True, False, "FS")


def v86(guest: Bare) -> None:
    """Virtual-8086 mode with IOPL 0."""
    for segment in guest.state.segments:
        segment.load(0, 0, 0xFFFF, 0xF3)
    guest.state.eflags |= VM
    guest.cpu.set_cpl(3)


def real(guest: Bare) -> None:
    for segment in guest.state.segments:
        segment.load(0, 0, 0xFFFF, 0x93)
    guest.state.cr0 &= ~CR0_PE


def short_data(guest: Bare) -> None:
    """DS ends at 0FFFh."""
    guest.state.segments[DS].load(0x10, 0, 0xFFF, 0x93 | SEG_DB)


def bad_pdptes(guest: Bare) -> None:
    """ECX is the address of PDPTEs of which one has a reserved bit; PAE paging is on, with good ones."""
    memory, state = guest.memory, guest.state
    for at in range(4):
        memory.store(0x3_0000 + 8 * at, 4, 0x3_1000 + 0x1000 * at | 1)
        memory.store(0x3_0100 + 8 * at, 4, 0x3_1000 + 0x1000 * at | 1)
        for entry in range(2):
            memory.store(0x3_1000 + 0x1000 * at + 8 * entry, 4, entry << 21 | 0x83)
    memory.store(0x3_0104, 4, 1 << 31)
    state.cr3, state.cr4, state.cr0 = 0x3_0000, CR4_PAE, state.cr0 | CR0_PG
    state.gpr[ECX] = 0x3_0100
    guest.cpu.mmu.flush()


def two_levels(guest: Bare) -> None:
    """Paging without PAE, with a directory that would make bad PDPTEs; EAX is CR4 with PAE."""
    bare.map_low_memory(guest)
    guest.memory.store(bare.PAGE_DIRECTORY + 4, 4, 1 << 31)
    guest.state.gpr[EAX] = CR4_PAE


def caught(run: Run) -> ExitCode:
    """The first exit with every intercept on but those of physical and virtual interrupts, and of #PF."""
    block = run.block
    block.intercept_cr = block.intercept_dr = 0xFFFF_FFFF
    block.intercept_exceptions = 0xFFFF_FFFF & ~(1 << Vector.PF)
    block.intercept3 = 0xFFFF_FFFF & ~int(Intercept3.VINTR)
    block.intercept4 = 0xFFFF
    return ExitCode(run.vmrun())


FIRST: dict[str, tuple[str, Callable[[Bare], None], ExitCode]] = {
    "CR0: bits that are not allowed": (
        "mov cr0, eax", lambda g: to_eax(g, 1 << 31 | 0x10), ExitCode.EXCP_GP
    ),
    "CR4: a reserved bit": ("mov cr4, eax", lambda g: to_eax(g, 1 << 30), ExitCode.EXCP_GP),
    "CR4: PDPTEs": ("mov cr4, eax", two_levels, ExitCode.EXCP_GP),
    "CR3 before its PDPTEs": ("mov cr3, ecx", bad_pdptes, ExitCode.CR3_WRITE),
    "LMSW before memory": ("lmsw [0x5000]", unmapped, ExitCode.CR0_WRITE),
    "SMSW before memory": ("smsw [0x5000]", unmapped, ExitCode.CR0_READ),
    "CLTS: CPL": ("clts", ring3, ExitCode.EXCP_GP),
    "LMSW: CPL": ("lmsw ax", ring3, ExitCode.EXCP_GP),
    "SMSW has no CPL": ("smsw eax", ring3, ExitCode.CR0_READ),
    "LGDT: limit": ("lgdt [0x2000]", short_data, ExitCode.EXCP_GP),
    "SIDT: limit": ("sidt [0xffd]", short_data, ExitCode.EXCP_GP),
    "SLDT: limit": ("sldt [0xfff]", short_data, ExitCode.EXCP_GP),
    "LGDT before memory": ("lgdt [0x5000]", unmapped, ExitCode.GDTR_WRITE),
    "LLDT before its selector": ("lldt ax", lambda g: to_eax(g, 0x7770), ExitCode.LDTR_WRITE),
    "LTR before its selector": ("ltr ax", lambda g: to_eax(g, 0x7770), ExitCode.TR_WRITE),
    "LLDT in virtual-8086 mode": ("lldt ax", v86, ExitCode.EXCP_UD),
    "STR in real mode": ("str ax", real, ExitCode.EXCP_UD),
    "PUSHF before IOPL": ("pushfd", v86, ExitCode.PUSHF),
    "POPF before IOPL": ("popfd", v86, ExitCode.POPF),
    "IRET before IOPL": ("iretd", v86, ExitCode.IRET),
    "INT n before IOPL": ("int 0x21", v86, ExitCode.SWINT),
    "HLT in virtual-8086 mode": ("hlt", v86, ExitCode.EXCP_GP),
    "RSM before #UD": ("rsm", ring3, ExitCode.RSM),
    "VMMCALL before all": (".byte 0x0f, 0x01, 0xd9", v86, ExitCode.VMMCALL),
    "VMLOAD: CPL": (".byte 0x0f, 0x01, 0xda", ring3, ExitCode.EXCP_UD),
    "VMLOAD in real mode": (".byte 0x0f, 0x01, 0xda", real, ExitCode.EXCP_UD),
    "STGI in virtual-8086 mode": (".byte 0x0f, 0x01, 0xdc", v86, ExitCode.EXCP_UD),
    "IN: the TSS's bitmap": ("in al, 0x80", all_of(tasks, ring3), ExitCode.EXCP_GP),
    "OUTS before memory": (
        "outsb", all_of(unmapped, lambda g: g.state.gpr.__setitem__(ESI, 0x5000)), ExitCode.IOIO
    ),
    "RDMSR before the register is looked for": ("rdmsr", lambda g: to_ecx(g, 0x1FFF), ExitCode.MSR),
    "DR4 with CR4.DE": ("mov eax, dr4", lambda g: setattr(g.state, "cr4", CR4_DE), ExitCode.EXCP_UD),
    "guarded debug registers": (
        "mov eax, dr0", lambda g: g.state.dr.__setitem__(7, g.state.dr[7] | DR7_GD), ExitCode.EXCP_DB
    ),
    "INT1 is no #DB": (".byte 0xf1", nothing, ExitCode.ICEBP),
    "a task that is not present": (
        f"jmp {OTHER_TSS_SELECTOR}:0",
        all_of(tasks, lambda g: g.memory.store(GDT_BASE + OTHER_TSS_SELECTOR + 5, 1, 0x09)),
        ExitCode.EXCP_NP,
    ),
    "a TSS that is too small": (
        f"jmp {OTHER_TSS_SELECTOR}:0",
        all_of(tasks, lambda g: g.memory.store(GDT_BASE + OTHER_TSS_SELECTOR, 1, 0x66)),
        ExitCode.EXCP_TS,
    ),
    "a busy task": (
        f"jmp {OTHER_TSS_SELECTOR}:0",
        all_of(tasks, lambda g: g.memory.store(GDT_BASE + OTHER_TSS_SELECTOR + 5, 1, 0x8B)),
        ExitCode.EXCP_GP,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FIRST)
def test_what_comes_first(name: str) -> None:
    source, prepare, code = FIRST[name]
    bits = 16 if prepare in (v86, real) else 32
    with made(source, prepare, bits=bits) as run:
        assert caught(run) == code
        assert run.block.rip == AT


def test_a_debug_exception_has_written_its_registers() -> None:
    with made("mov eax, dr0", lambda g: g.state.dr.__setitem__(7, g.state.dr[7] | DR7_GD)) as run:
        assert caught(run) == ExitCode.EXCP_DB
        assert run.block.dr6 & DR6_BD
        assert not run.block.dr7 & DR7_GD


def test_an_instruction_breakpoint_comes_before_the_intercept() -> None:
    def prepare(guest: Bare) -> None:
        guest.state.dr[0] = AT
        guest.state.dr[7] |= 1

    with made("cpuid", prepare) as run:
        assert caught(run) == ExitCode.EXCP_DB
        assert (run.block.rip, run.block.dr6 & 0xF) == (AT, 1)


@pytest.mark.parametrize("source", ["mov cr0, eax", "lmsw ax"])
def test_all_writes_of_cr0_before_selected_ones(source: str) -> None:
    with made(source, lambda g: to_eax(g, g.state.cr0 ^ 1 << 5)) as run:
        run.block.intercept_cr = 1 << CR_WRITE_SHIFT
        run.block.intercept3 = int(Intercept3.CR0_SEL_WRITE)
        assert ExitCode(run.vmrun()) == ExitCode.CR0_WRITE


@pytest.mark.parametrize("source", ["lmsw ax", "lmsw [0x5000]"])
def test_lmsw_is_a_selected_write_whatever_it_writes(source: str) -> None:
    with made(source, lambda g: to_eax(g, g.state.cr0)) as run:
        run.block.intercept3 = int(Intercept3.CR0_SEL_WRITE)
        assert ExitCode(run.vmrun()) == ExitCode.CR0_SEL_WRITE
        assert (run.block.rip, run.block.exitinfo1) == (AT, 0)


@pytest.mark.parametrize("source", [".byte 0xcd, 3", ".byte 0xcd, 4", "int 1", "int 6", "int 13", ".byte 0xf1"])
def test_software_interrupts_are_no_exceptions(source: str) -> None:
    with made(source) as run:
        run.block.intercept_exceptions = 0xFFFF_FFFF & ~(1 << Vector.PF)
        assert ExitCode(run.vmrun()) == ExitCode.INTR
        assert run.guest.state.halted


@pytest.mark.parametrize("kind", [EventType.INTR, EventType.EXCEPTION])
def test_what_is_injected_is_not_intercepted(kind: EventType) -> None:
    with made("nop") as run:
        run.block.intercept_exceptions = 0xFFFF_FFFF & ~(1 << Vector.PF)
        run.block.eventinj = Event(6, kind).encode()
        assert ExitCode(run.vmrun(0)) == ExitCode.INTR
        assert run.block.rip == handler_of(6)


@pytest.mark.parametrize(("port", "size"), [(0x80, 1), (0x80, 2), (0x80, 4), (0x7F, 2), (0x7D, 4), (0xFFFF, 1)])
@pytest.mark.parametrize("is_in", [True, False])
def test_each_byte_of_an_access_has_its_bit(port: int, size: int, is_in: bool) -> None:
    register = {1: "al", 2: "ax", 4: "eax"}[size]
    source = f"mov dx, {port}; " + (f"in {register}, dx" if is_in else f"out dx, {register}")
    for bit in range(port - 1, port + size + 1):
        with made(source) as run:
            run.mode.policy.io = IoPermissions()
            if bit < 1 << 16:
                run.mode.policy.io.set(bit, bit, intercept=True)
            run.block.intercept3 = int(Intercept3.IOIO_PROT)
            expected = port <= bit < port + size
            assert ExitCode(run.vmrun()) == (ExitCode.IOIO if expected else ExitCode.INTR)
            if expected:
                length = 2 if size == 2 else 1
                info = IoInfo(port, size, is_in, next_eip=AT + 4 + length)
                assert (run.block.exitinfo1, run.block.exitinfo2) == info.encode()
                assert run.block.nrip == AT + 4 + length


@pytest.mark.parametrize(("source", "expected"), [
    ("insb", IoInfo(0x3F8, 1, True, string=True, next_eip=AT + 1)),
    ("insd", IoInfo(0x3F8, 4, True, string=True, next_eip=AT + 1)),
    ("outsw", IoInfo(0x3F8, 2, False, string=True, segment=SegmentRegister.DS, next_eip=AT + 2)),
    (".byte 0x64, 0x6e", IoInfo(0x3F8, 1, False, string=True, segment=SegmentRegister.FS, next_eip=AT + 2)),
    (".byte 0x64, 0x6c", IoInfo(0x3F8, 1, True, string=True, next_eip=AT + 2)),
    ("rep insd", IoInfo(0x3F8, 4, True, string=True, rep=True, next_eip=AT + 2)),
    (".byte 0x67, 0xf3, 0x6e", IoInfo(
        0x3F8, 1, False, string=True, rep=True, address_bits=16, segment=SegmentRegister.DS, next_eip=AT + 3
    )),
])  # fmt: skip
def test_what_is_told_of_strings(source: str, expected: IoInfo) -> None:
    def prepare(guest: Bare) -> None:
        guest.state.gpr[1:3] = [3, 0x3F8]

    with made(source, prepare) as run:
        assert caught(run) == ExitCode.IOIO
        assert (run.block.exitinfo1, run.block.exitinfo2) == expected.encode()
        assert run.guest.state.gpr[1] == 3


def test_16_bit_code_has_16_bit_addresses() -> None:
    with made("in al, 0x80", real, bits=16) as run:
        assert caught(run) == ExitCode.IOIO
        info = IoInfo(0x80, 1, True, address_bits=16, next_eip=AT + 2)
        assert (run.block.exitinfo1, run.block.exitinfo2) == info.encode()


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("msr", [0x10, 0x174, 0x1FFF, 0x2000, 0xC000_0080, 0xC000_1FFF, 0xC000_2000, 0xC001_0000])
def test_each_register_has_a_bit_for_reads_and_one_for_writes(msr: int, write: bool) -> None:
    in_map = msr not in (0x2000, 0xC000_2000)
    for read_bit, write_bit in ((False, False), (True, False), (False, True)):
        with made("wrmsr" if write else "rdmsr", lambda g: to_ecx(g, msr)) as run:
            run.mode.policy.msr = MsrPermissions()
            if in_map:
                run.mode.policy.msr.set(msr, read=read_bit, write=write_bit)
            run.block.intercept3 = int(Intercept3.MSR_PROT)
            run.block.intercept_exceptions = 1 << Vector.GP
            expected = ExitCode.INTR if msr in (0x10, 0x174) else ExitCode.EXCP_GP
            if not in_map or (write_bit if write else read_bit):
                expected = ExitCode.MSR
            assert ExitCode(run.vmrun()) == expected
            if expected == ExitCode.MSR:
                assert (run.block.exitinfo1, run.block.nrip) == (int(write), AT + 2)


class TestDeliveries:
    """What was being delivered when the exit came, and what becomes of two exceptions."""

    @staticmethod
    def gate(guest: Bare, vector: int, access: int, selector: int = 8) -> None:
        at = bare.IDT_BASE + 8 * vector
        guest.memory.write(at, (handler_of(vector) | selector << 16 | access << 40).to_bytes(8, "little"))

    @pytest.mark.parametrize(("exceptions", "code"), [
        ((Vector.GP, Vector.DF), ExitCode.EXCP_GP), ((Vector.DF,), ExitCode.EXCP_DF), ((), ExitCode.INTR),
    ])  # fmt: skip
    def test_the_second_exception_comes_before_the_double_fault(
        self, exceptions: tuple[Vector, ...], code: ExitCode
    ) -> None:
        """The example of APM 15.12."""

        def prepare(guest: Bare) -> None:
            segment_not_present(guest)
            self.gate(guest, Vector.NP, 0x8E, selector=0x50)

        with made("mov ds, eax", prepare) as run:
            run.block.intercept_exceptions = sum(1 << vector for vector in exceptions)
            assert ExitCode(run.vmrun()) == code
            if exceptions:
                assert Event.decode(run.block.exitintinfo) == Event(11, EventType.EXCEPTION, 0x18)
                assert run.block.rip == AT
            else:
                assert run.block.rip == handler_of(8) + 1

    @pytest.mark.parametrize(("source", "vector", "kind"), [
        ("int 0x44", 0x44, EventType.SOFTWARE), ("int3", 3, EventType.EXCEPTION),
        (".byte 0xf1", 1, EventType.EXCEPTION),
    ])  # fmt: skip
    def test_a_software_interrupt_whose_gate_is_not_there(self, source: str, vector: int, kind: EventType) -> None:
        with made(source, lambda g: self.gate(g, vector, 0x0E)) as run:
            run.block.intercept_exceptions = 1 << Vector.NP
            assert ExitCode(run.vmrun()) == ExitCode.EXCP_NP
            assert Event.decode(run.block.exitintinfo) == Event(vector, kind)
            assert run.block.rip == AT
            assert run.block.exitinfo1 & ~1 == vector << 3 | 2

    def test_a_software_interrupt_into_a_task(self) -> None:
        with made("int 0x40", tasks) as run:
            run.block.intercept3 = int(Intercept3.TASK_SWITCH)
            assert ExitCode(run.vmrun()) == ExitCode.TASK_SWITCH
            assert Event.decode(run.block.exitintinfo) == Event(0x40, EventType.SOFTWARE)

    @pytest.mark.parametrize(("source", "vector", "error_code", "rf"), [
        ("ud2", 6, None, True), ("mov ds, eax", 13, 0x50, True), ("int3", 3, None, False),
    ])  # fmt: skip
    def test_an_exception_into_a_task(self, source: str, vector: int, error_code: int | None, rf: bool) -> None:
        """RF as the old TSS would get it: a fault would have it set."""

        def prepare(guest: Bare) -> None:
            tasks(guest)
            to_eax(guest, 0x50)
            self.gate(guest, vector, 0x85, selector=OTHER_TSS_SELECTOR)

        with made(source, prepare) as run:
            run.block.intercept3 = int(Intercept3.TASK_SWITCH)
            assert ExitCode(run.vmrun()) == ExitCode.TASK_SWITCH
            expected = TaskSwitchInfo(OTHER_TSS_SELECTOR, error_code=error_code, rf=rf)
            assert (run.block.exitinfo1, run.block.exitinfo2) == expected.encode()
            assert Event.decode(run.block.exitintinfo) == Event(vector, EventType.EXCEPTION, error_code)

    def test_iret_into_a_task(self) -> None:
        def prepare(guest: Bare) -> None:
            tasks(guest)
            guest.memory.store(GDT_BASE + OTHER_TSS_SELECTOR + 5, 1, 0x8B)
            guest.memory.store(TSS, 2, OTHER_TSS_SELECTOR)
            guest.state.eflags |= NT

        with made("iretd", prepare) as run:
            run.block.intercept3 = int(Intercept3.TASK_SWITCH)
            assert ExitCode(run.vmrun()) == ExitCode.TASK_SWITCH
            expected = TaskSwitchInfo(OTHER_TSS_SELECTOR, TaskSwitchCause.IRET)
            assert (run.block.exitinfo1, run.block.exitinfo2) == expected.encode()
            assert run.block.exitintinfo == 0
