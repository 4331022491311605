"""Exit conformance: for each intercept bit a guest that triggers it, and the EXITCODE and EXITINFO that the APM gives.

Each guest runs interpreted and as emitted code, intercepted and not. What this CPU does not have is #UD whatever is
intercepted, and stands in a list of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from machine.cpu import Cpu
from machine.debug import DebugControl
from machine.flags import TF
from machine.state import CR0_TS, CR4_TSD, EAX, ESP, SHADOW_STI
from tests.oracles.assembler import assemble
from tests.vmm import bare
from tests.vmm.bare import GDT_BASE, HANDLERS, IDT_BASE, ORIGIN, Bare
from vmm.interp import PATIENCE_EVENTS
from vmm.native.signals import CORE
from vmm.trap.emulated import GuestMode
from vmm.trap.exitcodes import ExitCode
from vmm.trap.exitinfo import Event, EventType, IoInfo, TaskSwitchCause, TaskSwitchInfo
from vmm.trap.intercepts import CR_WRITE_SHIFT, Intercept3, Intercept4, Intercept5
from vmm.trap.permissions import IoPermissions, MsrPermissions
from vmm.trap.vmcb import NP_ENABLE, V_INTR_VECTOR_SHIFT, V_IRQ, Vmcb
from vmm.trap.vmcbstate import store_state

pytestmark = pytest.mark.usefixtures("way")

MOV = 1 << 63
AT = ORIGIN + 1  # every guest begins with a NOP, so that the instruction is not the first
TIMER_INSNS = 40
TSS, OTHER_TSS = 0x2_0000, 0x2_1000
TSS_SELECTOR, OTHER_TSS_SELECTOR = 0x18, 0x20


def guest_mode(cpu: Cpu, debug: DebugControl) -> GuestMode:
    return GuestMode(cpu, debug, verify=True)


def nothing(_bare: Bare) -> None:
    """No preparation."""


@dataclass(frozen=True, slots=True)
class Case:
    """A guest that is left.

    Attributes:
        bit: the intercept: name of the vector, and the bit in it.
        source: after a NOP, the instruction that is intercepted.
        code: EXITCODE.
        info1, info2: EXITINFO1 and EXITINFO2.
        prepare: done to the guest before.
        length: of the instruction, as far as NRIP says it.
        at: EIP at the exit.
    """

    bit: tuple[str, int]
    source: str
    code: int
    info1: int = 0
    info2: int = 0
    prepare: Callable[[Bare], None] = nothing
    length: int = 0
    at: int = AT


def three(bit: Intercept3) -> tuple[str, int]:
    return "intercept3", int(bit)


def exception(vector: int) -> tuple[str, int]:
    return "intercept_exceptions", 1 << vector


def tasks(guest: Bare) -> None:
    """Two tasks, the first one running; a task gate for vector 40h."""
    memory, state = guest.memory, guest.state
    for number, at in enumerate((TSS, OTHER_TSS)):
        busy = 2 if number == 0 else 0
        descriptor = 0x67 | (at & 0xFFFF) << 16 | (at >> 16 & 0xFF) << 32 | (0x89 | busy) << 40
        memory.write(GDT_BASE + TSS_SELECTOR + 8 * number, descriptor.to_bytes(8, "little"))
        memory.store(at + 0x66, 2, 0x68)  # no I/O bitmap
    state.gdtr.limit = 0x27
    state.tr.load(TSS_SELECTOR, TSS, 0x67, 0x8B)
    memory.write(IDT_BASE + 8 * 0x40, (OTHER_TSS_SELECTOR << 16 | 0x8500 << 32).to_bytes(8, "little"))


def ring3(guest: Bare) -> None:
    """At CPL 3 with IOPL 0."""
    for segment in guest.state.segments:
        selector, base, limit, attributes = segment.fields
        segment.load(selector | 3, base, limit, attributes | 0x60)
    guest.cpu.set_cpl(3)


def nested_task(guest: Bare) -> None:
    """IRET returns to a task whose selector in the back link is no TSS's."""
    tasks(guest)
    guest.memory.store(TSS, 2, 0x30)
    guest.state.eflags |= 1 << 14


def set_flag(flag: int) -> Callable[[Bare], None]:
    def prepare(guest: Bare) -> None:
        guest.state.eflags |= flag

    return prepare


def unmapped(guest: Bare) -> None:
    bare.map_low_memory(guest)
    bare.set_page(guest, 0x5000, 0)


def no_idt(guest: Bare) -> None:
    guest.state.idtr.limit = 0


def all_of(*steps: Callable[[Bare], None]) -> Callable[[Bare], None]:
    def prepare(guest: Bare) -> None:
        for step in steps:
            step(guest)

    return prepare


def segment_not_present(guest: Bare) -> None:
    guest.state.gpr[EAX] = 0x18
    guest.memory.write(GDT_BASE + 0x18, bytes.fromhex("ffff00000013cf00"))
    guest.state.gdtr.limit = 0x1F


def task_switched(guest: Bare) -> None:
    guest.state.cr0 |= CR0_TS | 2


def misaligned(guest: Bare) -> None:
    ring3(guest)
    guest.state.cr0 |= 1 << 18
    guest.state.eflags |= 1 << 18
    guest.cpu.mmu.update_alignment()


GPRS = ("eax", "ecx", "edx", "ebx")
CASES: dict[str, Case] = {
    **{
        f"read CR{n}": Case(("intercept_cr", 1 << n), f"mov ebx, cr{n}", ExitCode.CR0_READ + n, MOV | 3, length=3)
        for n in (0, 2, 3, 4)
    },
    "SMSW": Case(("intercept_cr", 1), "smsw ecx", ExitCode.CR0_READ, length=3),
    **{
        f"write CR{n}": Case(
            ("intercept_cr", 1 << n + CR_WRITE_SHIFT),
            f"mov cr{n}, ecx",
            ExitCode.CR0_WRITE + n,
            MOV | 1,
            prepare=lambda guest, n=n: guest.state.gpr.__setitem__(1, guest.state.cr0 if n == 0 else 0),  # type: ignore[misc]
            length=3,
        )
        for n in (0, 2, 3, 4)
    },
    "LMSW": Case(("intercept_cr", 1 << CR_WRITE_SHIFT), "lmsw ax", ExitCode.CR0_WRITE, length=3),
    "CLTS": Case(("intercept_cr", 1 << CR_WRITE_SHIFT), "clts", ExitCode.CR0_WRITE, length=2),
    "selective write of CR0": Case(
        three(Intercept3.CR0_SEL_WRITE),
        "mov cr0, eax",
        ExitCode.CR0_SEL_WRITE,
        MOV,
        prepare=lambda guest: guest.state.gpr.__setitem__(EAX, guest.state.cr0 ^ 1 << 5),
        length=3,
    ),
    **{
        f"read DR{n}": Case(("intercept_dr", 1 << n), f"mov edx, dr{n}", ExitCode.DR0_READ + n, 2, length=3)
        for n in (0, 1, 2, 3, 6, 7)
    },
    **{
        f"write DR{n}": Case(
            ("intercept_dr", 1 << n + CR_WRITE_SHIFT), f"mov dr{n}, eax", ExitCode.DR0_WRITE + n, length=3
        )
        for n in (0, 1, 2, 3, 6, 7)
    },
    "#DE": Case(exception(0), "div ecx", ExitCode.EXCP_DE),
    "#DB": Case(exception(1), "nop; nop", ExitCode.EXCP_DB, prepare=set_flag(TF)),
    "#BP": Case(exception(3), "int3", ExitCode.EXCP_BP, length=1),
    "#OF": Case(exception(4), "into", ExitCode.EXCP_OF, prepare=set_flag(1 << 11), length=1),
    "#BR": Case(exception(5), "bound eax, [0x6000]", ExitCode.EXCP_BR, prepare=lambda g: g.state.gpr.__setitem__(0, 9)),
    "#UD": Case(exception(6), "ud2", ExitCode.EXCP_UD),
    "#NM": Case(exception(7), "fwait", ExitCode.EXCP_NM, prepare=task_switched),
    "#DF": Case(exception(8), "ud2", ExitCode.EXCP_DF, prepare=no_idt),
    "#TS": Case(exception(10), "iretd", ExitCode.EXCP_TS, 0x30, prepare=nested_task),
    "#NP": Case(exception(11), "mov ds, eax", ExitCode.EXCP_NP, 0x18, prepare=segment_not_present),
    "#SS": Case(exception(12), "mov ss, eax", ExitCode.EXCP_SS, 0x18, prepare=segment_not_present),
    "#GP": Case(exception(13), "mov ds, eax", ExitCode.EXCP_GP, 0x50, prepare=lambda g: to_eax(g, 0x50)),
    "#PF, read": Case(exception(14), "mov eax, [0x5678]", ExitCode.EXCP_PF, 0, 0x5678, prepare=unmapped),
    "#PF, write": Case(exception(14), "mov [0x5678], eax", ExitCode.EXCP_PF, 2, 0x5678, prepare=unmapped),
    "#PF, user": Case(
        exception(14), "mov [0x5678], eax", ExitCode.EXCP_PF, 6, 0x5678, prepare=all_of(unmapped, ring3)
    ),
    "#AC": Case(exception(17), "mov eax, [0x6001]", ExitCode.EXCP_AC, prepare=misaligned),
    "NMI": Case(three(Intercept3.NMI), "nop", ExitCode.NMI, prepare=lambda g: g.lines.raise_nmi(), at=ORIGIN),
    **{
        name: Case(three(Intercept3[bit]), source, ExitCode[bit], length=length)
        for name, bit, source, length in (
            ("SIDT", "IDTR_READ", "sidt [0x6000]", 7),
            ("SGDT", "GDTR_READ", "sgdt [0x6000]", 7),
            ("SLDT", "LDTR_READ", "sldt eax", 3),
            ("STR", "TR_READ", "str eax", 3),
            ("LIDT", "IDTR_WRITE", "lidt [0x6000]", 7),
            ("LGDT", "GDTR_WRITE", "lgdt [0x6000]", 7),
            ("LLDT", "LDTR_WRITE", "lldt ax", 3),
            ("LTR", "TR_WRITE", "ltr ax", 3),
            ("RDTSC", "RDTSC", "rdtsc", 2),
            ("PUSHF", "PUSHF", "pushfd", 1),
            ("POPF", "POPF", "popfd", 1),
            ("CPUID", "CPUID", "cpuid", 2),
            ("IRET", "IRET", "iretd", 1),
            ("INVD", "INVD", "invd", 2),
            ("PAUSE", "PAUSE", "pause", 2),
            ("HLT", "HLT", "hlt", 1),
        )
    },
    "INT n": Case(three(Intercept3.SWINT), "int 0x80", ExitCode.SWINT, 0x80, length=2),
    "INVLPG": Case(
        three(Intercept3.INVLPG), "invlpg [eax + 0x345]", ExitCode.INVLPG, 0x12345,
        prepare=lambda g: to_eax(g, 0x12000), length=7,
    ),
    "IN": Case(
        three(Intercept3.IOIO_PROT), "in al, 0x80", ExitCode.IOIO, *IoInfo(0x80, 1, True, next_eip=AT + 2).encode()
    ),
    "OUT": Case(
        three(Intercept3.IOIO_PROT), "out dx, eax", ExitCode.IOIO, *IoInfo(0x3F8, 4, False, next_eip=AT + 1).encode(),
        prepare=lambda g: g.state.gpr.__setitem__(2, 0x3F8),
    ),
    "INS": Case(
        three(Intercept3.IOIO_PROT), "insw", ExitCode.IOIO,
        *IoInfo(0x3F8, 2, True, True, False, 32, next_eip=AT + 2).encode(),
        prepare=lambda g: g.state.gpr.__setitem__(2, 0x3F8),
    ),
    "RDMSR": Case(three(Intercept3.MSR_PROT), "rdmsr", ExitCode.MSR, 0, prepare=lambda g: to_ecx(g, 0x174), length=2),
    "WRMSR": Case(three(Intercept3.MSR_PROT), "wrmsr", ExitCode.MSR, 1, prepare=lambda g: to_ecx(g, 0x174), length=2),
    "task switch by JMP": Case(
        three(Intercept3.TASK_SWITCH), f"jmp {OTHER_TSS_SELECTOR}:0", ExitCode.TASK_SWITCH,
        *TaskSwitchInfo(OTHER_TSS_SELECTOR, TaskSwitchCause.JUMP).encode(), prepare=tasks,
    ),
    "task switch by CALL": Case(
        three(Intercept3.TASK_SWITCH), f"call {OTHER_TSS_SELECTOR}:0", ExitCode.TASK_SWITCH,
        *TaskSwitchInfo(OTHER_TSS_SELECTOR).encode(), prepare=tasks,
    ),
    "task switch by a gate": Case(
        three(Intercept3.TASK_SWITCH), "int 0x40", ExitCode.TASK_SWITCH,
        *TaskSwitchInfo(OTHER_TSS_SELECTOR).encode(), prepare=tasks,
    ),
    "shutdown": Case(three(Intercept3.SHUTDOWN), "ud2", ExitCode.SHUTDOWN, prepare=no_idt),
    "INT1": Case(("intercept4", int(Intercept4.ICEBP)), ".byte 0xf1", ExitCode.ICEBP, length=1),
    "WBINVD": Case(("intercept4", int(Intercept4.WBINVD)), "wbinvd", ExitCode.WBINVD, length=2),
    "VINTR": Case(three(Intercept3.VINTR), "sti; nop; nop", ExitCode.VINTR, at=AT + 2),
}  # fmt: skip
NOT_HERE = {
    "RDPMC": "0f 33", "RSM": "0f aa", "INVLPGA": "0f 01 df", "VMRUN": "0f 01 d8", "VMMCALL": "0f 01 d9",
    "VMLOAD": "0f 01 da", "VMSAVE": "0f 01 db", "STGI": "0f 01 dc", "CLGI": "0f 01 dd", "SKINIT": "0f 01 de",
    "RDTSCP": "0f 01 f9", "MONITOR": "0f 01 c8", "MWAIT": "0f 01 c9", "XSETBV": "0f 01 d1", "RDPRU": "0f 01 fd",
    "INVLPGB": "0f 01 fe", "INVPCID": "66 0f 38 82 00", "MCOMMIT": "f3 0f 01 fa", "TLBSYNC": "0f 01 ff",
}  # fmt: skip
# INTR is the timer in every run; the others have no source in this machine, or are forms of those above.
WITHOUT_CASE = {"INTR", "SMI", "INIT", "FERR_FREEZE", "MWAIT_CONDITIONAL", "EFER_WRITE_TRAP", "INVLPGB_ILLEGAL"}
WITHOUT_CASE |= {"BUSLOCK", "IDLE_HLT"}


def to_eax(guest: Bare, value: int) -> None:
    guest.state.gpr[EAX] = value


def to_ecx(guest: Bare, value: int) -> None:
    guest.state.gpr[1] = value


@dataclass(slots=True)
class Run:
    """A guest in guest mode, with a VMCB."""

    guest: Bare
    block: Vmcb = field(default_factory=Vmcb)

    @property
    def mode(self) -> GuestMode:
        assert isinstance(self.guest.engine, GuestMode)
        return self.guest.engine

    def vmrun(self, insns: int = TIMER_INSNS) -> int:
        """One world switch with the VMCB as the guest's state is; returns EXITCODE."""
        store_state(self.block, self.guest.state)
        self.mode._patience = PATIENCE_EVENTS
        CORE.arm()
        try:
            assert self.mode.vmrun(self.block, self.guest.clock.icount + insns) is None
        finally:
            CORE.disarm()
        return self.block.exitcode

    def vmrun_to_end(self) -> int:
        """Past hidden faults, which are filled as a VMM would do it."""
        for _ in range(20):
            code = self.vmrun()
            window = self.mode.fault_window
            if code != ExitCode.EXCP_PF or window is None:
                return code
            write = bool(self.block.exitinfo1 & 2)
            if not self.mode._windows.fill(self.block.exitinfo2, write=write, window=window):
                return code
        raise AssertionError("no end of hidden faults")


@contextmanager
def made(source: str, prepare: Callable[[Bare], None] = nothing) -> Iterator[Run]:
    """A guest with nothing intercepted but what VMRUN itself demands."""
    guest = bare.flat("hlt", guest_mode)
    try:
        guest.memory.write(ORIGIN, assemble(f"nop\n{source}\n" + "nop\n" * 8 + "hlt", origin=ORIGIN))
        prepare(guest)
        run = Run(guest)
        run.block.guest_asid = 1
        run.block.intercept4 = int(Intercept4.VMRUN)
        run.mode.policy.io = IoPermissions(intercept_all=True)
        run.mode.policy.msr = MsrPermissions(intercept_all=True)
        yield run
    finally:
        guest.close()


@pytest.fixture(params=["interpreted", "emitted"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the native core gets over the instructions."""
    way: str = request.param
    monkeypatch.setattr("vmm.bt.MIN_BUDGET_INSNS", 1 if way == "emitted" else 1 << 40)
    return way


@pytest.mark.parametrize("name", CASES)
def test_each_intercept(name: str) -> None:
    case = CASES[name]
    vector, bit = case.bit
    with made(case.source, case.prepare) as run:
        block, state = run.block, run.guest.state
        setattr(block, vector, getattr(block, vector) | bit)
        if name == "VINTR":
            block.v_intr = V_IRQ | 0x30 << V_INTR_VECTOR_SHIFT
        before = state.gpr[:]
        assert ExitCode(run.vmrun_to_end()) == case.code
        assert block.rip == state.eip == case.at
        assert (block.exitinfo1, block.exitinfo2) == (case.info1, case.info2)
        if case.length:
            assert block.nrip == case.at + case.length
        assert state.gpr == before
        assert block.rsp == before[ESP]
        assert block.rax == before[EAX]
        assert run.guest.clock.icount == case.at - ORIGIN


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("VINTR", "NMI", "shutdown", "#DF")])
def test_without_the_intercept_there_is_no_exit(name: str) -> None:
    case = CASES[name]
    with made(case.source, case.prepare) as run:
        run.block.intercept3 = int(Intercept3.SHUTDOWN)
        code = run.vmrun()
        # Without a TSS ring 3 cannot be left, and the other task is all zeros.
        has_no_handler = name in ("#PF, user", "#AC") or name.startswith("task switch")
        assert ExitCode(code) == (ExitCode.SHUTDOWN if has_no_handler else ExitCode.INTR)
        assert run.guest.state.eip != AT or run.guest.state.halted or code == ExitCode.SHUTDOWN


@pytest.mark.parametrize("name", NOT_HERE)
def test_what_this_cpu_has_not_is_undefined_whatever_is_intercepted(name: str) -> None:
    with made(".byte " + ", ".join(f"0x{byte}" for byte in NOT_HERE[name].split())) as run:
        run.block.intercept3 = 0xFFFF_FFFF & ~int(Intercept3.VINTR)
        run.block.intercept4 = run.block.intercept5 = 0xFFFF
        run.block.intercept_exceptions = 1 << 6
        assert ExitCode(run.vmrun()) == ExitCode.EXCP_UD
        assert run.block.rip == AT


def test_every_bit_has_a_case() -> None:
    covered = {case.bit for case in CASES.values()}
    for vector, kind in (("intercept3", Intercept3), ("intercept4", Intercept4), ("intercept5", Intercept5)):
        for name, member in kind.__members__.items():
            known = (vector, int(member)) in covered or name in NOT_HERE or name in WITHOUT_CASE
            assert known or name in ("IOIO_PROT", "MSR_PROT"), name
    assert {n for n in range(18) if exception(n) not in covered} == {2, 9, 15, 16}  # NMI, none, none, #MF without FPU


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


class TestEvents:
    def test_an_injected_exception_reaches_its_handler(self) -> None:
        with made("nop") as run:
            run.block.eventinj = Event(13, EventType.EXCEPTION, 0x18).encode()
            assert run.vmrun(0) == ExitCode.INTR
            state = run.guest.state
            assert state.eip == HANDLERS + 13 * bare.HANDLER_BYTES
            assert run.guest.memory.load(state.gpr[ESP], 4) == 0x18
            assert run.guest.memory.load(state.gpr[ESP] + 4, 4) == ORIGIN
            assert run.block.eventinj == 0

    def test_what_interrupts_a_delivery_is_told(self) -> None:
        with made("nop", no_idt) as run:
            run.block.intercept_exceptions = 1 << 13
            run.block.eventinj = Event(0x21, EventType.INTR).encode()
            assert ExitCode(run.vmrun()) == ExitCode.EXCP_GP
            assert Event.decode(run.block.exitintinfo) == Event(0x21, EventType.INTR)
            assert run.block.exitinfo1 == 0x21 << 3 | 2 | 1

    def test_a_task_gate_of_an_event(self) -> None:
        with made("nop", tasks) as run:
            run.block.intercept3 = int(Intercept3.TASK_SWITCH)
            run.block.eventinj = Event(0x40, EventType.INTR).encode()
            assert ExitCode(run.vmrun()) == ExitCode.TASK_SWITCH
            assert Event.decode(run.block.exitintinfo) == Event(0x40, EventType.INTR)

    def test_a_virtual_interrupt_without_intercept_is_delivered(self) -> None:
        with made("sti; nop; nop") as run:
            run.block.v_intr = V_IRQ | 0x30 << V_INTR_VECTOR_SHIFT
            assert run.vmrun() == ExitCode.INTR
            assert run.guest.state.halted
            assert run.guest.memory.load(run.guest.state.gpr[ESP], 4) == AT + 2
            assert not run.block.v_intr & V_IRQ

    def test_the_shadow_of_sti_is_in_the_block(self) -> None:
        with made("sti; cpuid") as run:
            run.block.intercept3 = int(Intercept3.CPUID)
            assert run.vmrun() == ExitCode.CPUID
            assert run.block.interrupt_state & 1
            assert run.guest.state.shadow == SHADOW_STI

    def test_a_block_that_is_not_valid(self) -> None:
        with made("nop") as run:
            run.block.guest_asid = 0
            assert ExitCode(run.vmrun()) == ExitCode.INVALID
            assert run.guest.state.eip == ORIGIN


@pytest.mark.parametrize(("source", "error", "physical"), [
    ("mov eax, [0x5123]", 4, 0xB_8123), ("mov [0x5123], eax", 6, 0xB_8123), ("mov [0x6123], al", 6, 0xF0_0123),
])  # fmt: skip
def test_nested_page_faults(source: str, error: int, physical: int) -> None:
    """Where there is no RAM; faults of the guest's own tables are none."""

    def prepare(guest: Bare) -> None:
        bare.map_low_memory(guest)
        bare.set_page(guest, 0x5000, 0xB_8007)
        bare.set_page(guest, 0x6000, 0xF0_0007)

    with made(source, prepare) as run:
        run.block.np_control = NP_ENABLE
        run.block.intercept_exceptions = 0
        assert ExitCode(run.vmrun()) == ExitCode.NPF
        assert run.block.exitinfo1 == error | 1 << 32
        assert run.block.exitinfo2 == physical
        assert run.block.rip == AT


def test_true_faults_do_not_leave_a_nested_guest() -> None:
    with made("mov eax, [0x5678]", unmapped) as run:
        run.block.np_control = NP_ENABLE
        assert run.vmrun() == ExitCode.INTR
        assert run.guest.state.eip == HANDLERS + 14 * bare.HANDLER_BYTES + 1
        assert run.guest.state.cr2 == 0x5678


def test_hidden_faults_are_page_faults_of_the_shadow(way: str) -> None:
    """Emitted code alone runs on shadow page tables; interpreted code reads the guest's own."""
    with made("mov eax, [0x6000]", bare.map_low_memory) as run:
        run.block.intercept_exceptions = 1 << 14
        codes = [ExitCode(run.vmrun())]
        if way == "emitted":
            assert codes == [ExitCode.EXCP_PF]
            assert run.block.exitinfo2 == ORIGIN  # the fetch
        assert ExitCode(run.vmrun_to_end()) == ExitCode.INTR
