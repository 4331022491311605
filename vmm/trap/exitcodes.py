"""Why guest mode was left: SVM's exit codes under the names of the manual, and what each means in words.

It knows numbers and names; what EXITINFO1 and EXITINFO2 hold for each is in `vmm.trap.exitinfo`.

Source: AMD64 APM Vol. 2, appendix C "SVM Intercept Exit Codes".
"""

from __future__ import annotations

from enum import IntEnum

_ALL_ONES = (1 << 64) - 1


class ExitCode(IntEnum):
    """EXITCODE of a VMCB; the manual writes each with the prefix `VMEXIT_`."""

    CR0_READ, CR1_READ, CR2_READ, CR3_READ, CR4_READ, CR5_READ, CR6_READ, CR7_READ = range(0x08)
    CR8_READ, CR9_READ, CR10_READ, CR11_READ, CR12_READ, CR13_READ, CR14_READ, CR15_READ = range(0x08, 0x10)
    CR0_WRITE, CR1_WRITE, CR2_WRITE, CR3_WRITE, CR4_WRITE, CR5_WRITE, CR6_WRITE, CR7_WRITE = range(0x10, 0x18)
    CR8_WRITE, CR9_WRITE, CR10_WRITE, CR11_WRITE, CR12_WRITE, CR13_WRITE, CR14_WRITE, CR15_WRITE = range(0x18, 0x20)
    DR0_READ, DR1_READ, DR2_READ, DR3_READ, DR4_READ, DR5_READ, DR6_READ, DR7_READ = range(0x20, 0x28)
    DR8_READ, DR9_READ, DR10_READ, DR11_READ, DR12_READ, DR13_READ, DR14_READ, DR15_READ = range(0x28, 0x30)
    DR0_WRITE, DR1_WRITE, DR2_WRITE, DR3_WRITE, DR4_WRITE, DR5_WRITE, DR6_WRITE, DR7_WRITE = range(0x30, 0x38)
    DR8_WRITE, DR9_WRITE, DR10_WRITE, DR11_WRITE, DR12_WRITE, DR13_WRITE, DR14_WRITE, DR15_WRITE = range(0x38, 0x40)
    EXCP_DE, EXCP_DB, EXCP_NMI, EXCP_BP, EXCP_OF, EXCP_BR, EXCP_UD, EXCP_NM = range(0x40, 0x48)
    EXCP_DF, EXCP_9, EXCP_TS, EXCP_NP, EXCP_SS, EXCP_GP, EXCP_PF, EXCP_15 = range(0x48, 0x50)
    EXCP_MF, EXCP_AC, EXCP_MC, EXCP_XF, EXCP_20, EXCP_CP, EXCP_22, EXCP_23 = range(0x50, 0x58)
    EXCP_24, EXCP_25, EXCP_26, EXCP_27, EXCP_HV, EXCP_VC, EXCP_SX, EXCP_31 = range(0x58, 0x60)
    INTR, NMI, SMI, INIT, VINTR, CR0_SEL_WRITE = range(0x60, 0x66)
    IDTR_READ, GDTR_READ, LDTR_READ, TR_READ, IDTR_WRITE, GDTR_WRITE, LDTR_WRITE, TR_WRITE = range(0x66, 0x6E)
    RDTSC, RDPMC, PUSHF, POPF, CPUID, RSM, IRET, SWINT, INVD, PAUSE, HLT = range(0x6E, 0x79)
    INVLPG, INVLPGA, IOIO, MSR, TASK_SWITCH, FERR_FREEZE, SHUTDOWN = range(0x79, 0x80)
    VMRUN, VMMCALL, VMLOAD, VMSAVE, STGI, CLGI, SKINIT, RDTSCP, ICEBP, WBINVD = range(0x80, 0x8A)
    MONITOR, MWAIT, MWAIT_CONDITIONAL, XSETBV, RDPRU, EFER_WRITE_TRAP = range(0x8A, 0x90)
    CR0_WRITE_TRAP, CR1_WRITE_TRAP, CR2_WRITE_TRAP, CR3_WRITE_TRAP, CR4_WRITE_TRAP = range(0x90, 0x95)
    CR5_WRITE_TRAP, CR6_WRITE_TRAP, CR7_WRITE_TRAP, CR8_WRITE_TRAP, CR9_WRITE_TRAP = range(0x95, 0x9A)
    CR10_WRITE_TRAP, CR11_WRITE_TRAP, CR12_WRITE_TRAP, CR13_WRITE_TRAP, CR14_WRITE_TRAP = range(0x9A, 0x9F)
    CR15_WRITE_TRAP, INVLPGB, INVLPGB_ILLEGAL, INVPCID, MCOMMIT, TLBSYNC, BUSLOCK, IDLE_HLT = range(0x9F, 0xA7)
    NPF, AVIC_INCOMPLETE_IPI, AVIC_NOACCEL, VMGEXIT = range(0x400, 0x404)
    IDLE_REQUIRED, BUSY, INVALID = range(_ALL_ONES - 2, _ALL_ONES + 1)


_TITLES = {
    ExitCode.INTR: "a physical interrupt has come",
    ExitCode.NMI: "a physical NMI has come",
    ExitCode.SMI: "a physical SMI has come",
    ExitCode.INIT: "INIT has come",
    ExitCode.VINTR: "the guest can take a virtual interrupt",
    ExitCode.CR0_SEL_WRITE: "a write changes CR0 bits other than TS and MP",
    ExitCode.SWINT: "INT n",
    ExitCode.IOIO: "IN, OUT, INS or OUTS on a port whose bit is set",
    ExitCode.MSR: "RDMSR or WRMSR of a register whose bit is set",
    ExitCode.TASK_SWITCH: "a task switch",
    ExitCode.FERR_FREEZE: "the FPU waits for its error to be handled",
    ExitCode.SHUTDOWN: "a triple fault",
    ExitCode.NPF: "a nested page fault",
    ExitCode.AVIC_INCOMPLETE_IPI: "an interrupt between virtual processors was not delivered",
    ExitCode.AVIC_NOACCEL: "an APIC register that is not accelerated",
    ExitCode.VMGEXIT: "VMGEXIT",
    ExitCode.INVALID: "the control block is not valid",
    ExitCode.BUSY: "the save area is in use",
    ExitCode.IDLE_REQUIRED: "a sibling thread is not idle",
    ExitCode.INVLPGB_ILLEGAL: "INVLPGB with an illegal operand",
    ExitCode.BUSLOCK: "a bus lock, past the threshold",
    ExitCode.IDLE_HLT: "HLT with no virtual interrupt pending",
    ExitCode.MWAIT_CONDITIONAL: "MWAIT with the monitor armed",
}
_FIRST_EXCEPTION, _LAST_EXCEPTION = ExitCode.EXCP_DE, ExitCode.EXCP_31


def exception_code(vector: int) -> ExitCode:
    """The exit code of an intercepted exception; ValueError beyond vector 31."""
    if not 0 <= vector < 32:
        raise ValueError(f"there is no exception with vector {vector}")
    return ExitCode(_FIRST_EXCEPTION + vector)


def exception_vector(code: int) -> int | None:
    """The vector of an exit that an exception caused, or None."""
    return code - _FIRST_EXCEPTION if _FIRST_EXCEPTION <= code <= _LAST_EXCEPTION else None


def name_of(code: int) -> str:
    """`VMEXIT_HLT`, or the number of a code that the manual does not name."""
    try:
        return f"VMEXIT_{ExitCode(code).name}"
    except ValueError:
        return f"VMEXIT {code:#x}"


def describe(code: int) -> str:
    """What has happened, in a few words."""
    try:
        known = ExitCode(code)
    except ValueError:
        return "a code that the manual does not name"
    if known in _TITLES:
        return _TITLES[known]
    vector = exception_vector(known)
    if vector is not None:
        return f"exception {vector}"
    register, _, access = known.name.partition("_")
    if access in ("READ", "WRITE"):
        return f"a {access.lower()} of {register}"
    if access == "WRITE_TRAP":
        return f"{register} was written"
    return f"the instruction {known.name}"
