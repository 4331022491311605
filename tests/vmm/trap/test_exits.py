"""Exit conformance: for each intercept bit a guest that triggers it, and the EXITCODE and EXITINFO that the APM gives.

Each guest runs interpreted and as emitted code, intercepted and not. The bits that no guest can trigger are listed with
the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from machine.cpuid import MODELS
from machine.faults import Vector
from machine.flags import TF
from machine.lines import CpuLines
from machine.state import CR0_NE, EAX, ESP, SHADOW_STI
from tests.vmm import bare
from tests.vmm.bare import HANDLERS, ORIGIN, Bare
from tests.vmm.trap.guestmode import (
    AT,
    MOV,
    OTHER_TSS_SELECTOR,
    all_of,
    made,
    misaligned,
    nested_task,
    no_idt,
    nothing,
    pending_x87_error,
    ring3,
    segment_not_present,
    set_flag,
    task_switched,
    tasks,
    to_eax,
    to_ecx,
    unmapped,
    unmasked_sse,
)
from vmm.trap.exitcodes import ExitCode
from vmm.trap.exitinfo import Event, EventType, IoInfo, TaskSwitchCause, TaskSwitchInfo
from vmm.trap.intercepts import CR_WRITE_SHIFT, Intercept3, Intercept4, Intercept5
from vmm.trap.vmcb import NP_ENABLE, V_INTR_VECTOR_SHIFT, V_IRQ

pytestmark = pytest.mark.usefixtures("way")


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
        for n in range(8)
    },
    **{
        f"write DR{n}": Case(
            ("intercept_dr", 1 << n + CR_WRITE_SHIFT), f"mov dr{n}, eax", ExitCode.DR0_WRITE + n, length=3
        )
        for n in range(8)
    },
    "#DE": Case(exception(0), "div ecx", ExitCode.EXCP_DE),
    "#DB": Case(exception(1), "nop; nop", ExitCode.EXCP_DB, prepare=set_flag(TF)),
    "#BP": Case(exception(3), "int3", ExitCode.EXCP_BP, length=1),
    "#OF": Case(exception(4), "into", ExitCode.EXCP_OF, prepare=set_flag(1 << 11), length=1),
    "#BR": Case(exception(5), "bound eax, [0x6000]", ExitCode.EXCP_BR, prepare=lambda g: to_eax(g, 9), length=6),
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
    "#MF": Case(exception(16), "fwait", ExitCode.EXCP_MF, prepare=pending_x87_error),
    "#AC": Case(exception(17), "mov eax, [0x6001]", ExitCode.EXCP_AC, prepare=misaligned),
    "#XM": Case(exception(19), "divss xmm0, xmm1", ExitCode.EXCP_XF, prepare=unmasked_sse),
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
    "FERR": Case(three(Intercept3.FERR_FREEZE), "fwait", ExitCode.FERR_FREEZE, prepare=all_of(
        pending_x87_error, lambda guest: setattr(guest.state, "cr0", guest.state.cr0 & ~CR0_NE)
    )),
    "shutdown": Case(three(Intercept3.SHUTDOWN), "ud2", ExitCode.SHUTDOWN, prepare=no_idt),
    "INT1": Case(("intercept4", int(Intercept4.ICEBP)), ".byte 0xf1", ExitCode.ICEBP, length=1),
    "WBINVD": Case(("intercept4", int(Intercept4.WBINVD)), "wbinvd", ExitCode.WBINVD, length=2),
    "VINTR": Case(three(Intercept3.VINTR), "sti; nop; nop", ExitCode.VINTR, at=AT + 2),
    "RSM": Case(three(Intercept3.RSM), "rsm", ExitCode.RSM, length=2),
    "INVLPGA": Case(three(Intercept3.INVLPGA), ".byte 0x0f, 0x01, 0xdf", ExitCode.INVLPGA, length=3),
    **{
        member.name or "": Case(
            ("intercept4", int(member)), f".byte 0x0f, 0x01, {0xD8 + number}", ExitCode[member.name or ""], length=3
        )
        for number, member in enumerate(
            (Intercept4.VMRUN, Intercept4.VMMCALL, Intercept4.VMLOAD, Intercept4.VMSAVE, Intercept4.STGI,
             Intercept4.CLGI, Intercept4.SKINIT)
        )
    },
}  # fmt: skip
# #UD comes before these intercepts, and CPUID has none of them.
NOT_HERE = {
    "RDPMC": "0f 33", "RDTSCP": "0f 01 f9", "MONITOR": "0f 01 c8", "MWAIT": "0f 01 c9", "XSETBV": "0f 01 d1",
    "RDPRU": "0f 01 fd", "INVLPGB": "0f 01 fe", "INVPCID": "66 0f 38 82 00", "MCOMMIT": "f3 0f 01 fa",
    "TLBSYNC": "0f 01 ff", **{f"read CR{n}": f"0f 20 {0xC0 + 8 * n:02x}" for n in (1, 5, 6, 7)},
    **{f"write CR{n}": f"0f 22 {0xC0 + 8 * n:02x}" for n in (1, 5, 6, 7)},
    **{f"read CR{8 + n}": f"f0 0f 20 {0xC0 + 8 * n:02x}" for n in range(8)},
    **{f"write CR{8 + n}": f"f0 0f 22 {0xC0 + 8 * n:02x}" for n in range(8)},
    **{f"read DR{8 + n}": f"f0 0f 21 {0xC0 + 8 * n:02x}" for n in range(8)},
    **{f"write DR{8 + n}": f"f0 0f 23 {0xC0 + 8 * n:02x}" for n in range(8)},
}  # fmt: skip


def without_guest() -> dict[tuple[str, int], str]:
    """The bits that no guest can trigger, as a vector and a bit of it, and why."""
    registers = "#UD, see `NOT_HERE`: 32-bit code has no other encoding, and LOCK MOV CR8 is not in CPUID"
    reasons = {
        ("intercept_cr", 1 << n + shift): registers for n in range(16) if n not in (0, 2, 3, 4) for shift in (0, 16)
    }
    reasons |= {("intercept_dr", 1 << n + shift): registers for n in range(8, 16) for shift in (0, 16)}
    reasons |= {exception(n): "no exception of this CPU: see `Vector`" for n in range(32) if n not in set(Vector)}
    reasons[exception(Vector.NMI)] = "not implemented (APM 15.12.3): NMI has a bit of its own"
    reasons[exception(Vector.MC)] = "no machine checks: CPUID has no MCE"
    for unwired in (Intercept3.SMI, Intercept3.INIT):
        reasons[three(unwired)] = "nothing raises it: see `CpuLines`"
    reasons |= {("intercept4", 1 << bit): "a trap of CR writes, of SEV-ES guests" for bit in range(16, 32)}
    reasons |= {("intercept5", 1 << bit): "reserved" for bit in range(32)}
    reasons |= {
        (vector, int(member)): "#UD comes first, see `NOT_HERE`"
        for vector, members in (
            ("intercept3", Intercept3.__members__),
            ("intercept4", Intercept4.__members__),
            ("intercept5", Intercept5.__members__),
        )
        for name, member in members.items()
        if name in NOT_HERE
    }
    reasons["intercept4", int(Intercept4.MWAIT_CONDITIONAL)] = "#UD comes first, as of MWAIT"
    reasons["intercept4", int(Intercept4.EFER_WRITE_TRAP)] = "a trap, of SEV-ES guests"
    reasons["intercept5", int(Intercept5.INVLPGB_ILLEGAL)] = "as of INVLPGB"
    for rest in (Intercept5.BUSLOCK, Intercept5.IDLE_HLT):
        reasons["intercept5", int(rest)] = "a feature of its own in CPUID Fn8000_000A, which this hardware lacks"
    return reasons


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


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("VINTR", "VMRUN", "shutdown", "#DF")])
def test_without_the_intercept_there_is_no_exit(name: str) -> None:
    case = CASES[name]
    with made(case.source, case.prepare) as run:
        run.block.intercept3 = int(Intercept3.SHUTDOWN)
        code = run.vmrun()
        # Without a TSS ring 3 cannot be left, and the other task is all zeros.
        has_no_handler = name in ("#PF, user", "#AC") or name.startswith("task switch")
        assert ExitCode(code) == (ExitCode.SHUTDOWN if has_no_handler else ExitCode.INTR)
        if name == "FERR":  # the CPU stands still
            assert (run.guest.state.eip, run.guest.state.halted) == (AT, 1)
            return
        assert run.guest.state.eip not in (ORIGIN, AT) or code == ExitCode.SHUTDOWN


@pytest.mark.parametrize("name", NOT_HERE)
def test_what_this_cpu_has_not_is_undefined_whatever_is_intercepted(name: str) -> None:
    with made(".byte " + ", ".join(f"0x{byte}" for byte in NOT_HERE[name].split())) as run:
        run.block.intercept3 = 0xFFFF_FFFF & ~int(Intercept3.VINTR)
        run.block.intercept4 = run.block.intercept5 = 0xFFFF
        run.block.intercept_cr = run.block.intercept_dr = 0xFFFF_FFFF
        run.block.intercept_exceptions = 1 << 6
        assert ExitCode(run.vmrun()) == ExitCode.EXCP_UD
        assert run.block.rip == AT


VECTORS = ("intercept_cr", "intercept_dr", "intercept_exceptions", "intercept3", "intercept4", "intercept5")


def test_every_bit_has_a_guest_or_a_reason() -> None:
    covered = {case.bit for case in CASES.values()} | {three(Intercept3.INTR)}  # the timer, see below
    reasons = without_guest()
    assert covered | set(reasons) == {(name, 1 << bit) for name in VECTORS for bit in range(32)}
    assert not covered & set(reasons)
    assert not any(model.leaf(1)[3] >> 7 & 1 for model in MODELS.values()), "MCE"
    assert not {name for name in dir(CpuLines) if "smi" in name.lower() or "init" in name.strip("_").lower()} - {
        "__init__", "__init_subclass__"
    }  # fmt: skip


def test_every_code_of_an_intercept_has_a_case() -> None:
    codes = {int(case.code) for case in CASES.values()} | {ExitCode.INTR}
    missing = {
        ExitCode(code).name for code in range(ExitCode.INTR, ExitCode.NPF) if code in ExitCode._value2member_map_
    }
    missing -= {ExitCode(code).name for code in codes}
    excused = {member.name for kind in (Intercept3, Intercept4, Intercept5) for member in kind} & {
        *NOT_HERE, "SMI", "INIT", "MWAIT_CONDITIONAL", "EFER_WRITE_TRAP", "INVLPGB_ILLEGAL", "BUSLOCK", "IDLE_HLT"
    }  # fmt: skip
    assert missing == excused | {f"CR{n}_WRITE_TRAP" for n in range(16)}


def test_the_hosts_timer_is_a_physical_interrupt() -> None:
    with made("nop; nop; nop") as run:
        run.block.intercept3 = int(Intercept3.INTR)
        assert ExitCode(run.vmrun(2)) == ExitCode.INTR
        assert (run.block.rip, run.guest.clock.icount) == (AT + 1, 2)
        assert (run.block.exitinfo1, run.block.exitinfo2, run.block.nrip, run.block.exitintinfo) == (0, 0, 0, 0)


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

    @pytest.mark.parametrize(("kind", "rf"), [
        (EventType.INTR, 0), (EventType.SOFTWARE, 0), (EventType.EXCEPTION, 1 << 16),
    ])  # fmt: skip
    def test_rf_is_saved_of_an_injected_fault_alone(self, kind: EventType, rf: int) -> None:
        with made("nop") as run:
            run.block.eventinj = Event(6, kind).encode()
            assert run.vmrun(0) == ExitCode.INTR
            state = run.guest.state
            assert state.eip == HANDLERS + 6 * bare.HANDLER_BYTES
            assert run.guest.memory.load(state.gpr[ESP] + 8, 4) & 1 << 16 == rf

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
