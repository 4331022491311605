"""A guest in guest mode with a VMCB, and what is done to it before it runs.

It must not know what is expected of an exit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from machine.cpu import Cpu
from machine.debug import DebugControl
from machine.state import CR0_NE, CR0_TS, CR4_OSFXSR, CR4_OSXMMEXCPT, EAX
from tests.machine.fpu_batch import image
from tests.oracles.assembler import assemble
from tests.vmm import bare
from tests.vmm.bare import GDT_BASE, IDT_BASE, ORIGIN, Bare
from tests.vmm.float_streams import give_fpu
from vmm.interp import PATIENCE_EVENTS
from vmm.native.signals import CORE
from vmm.trap.emulated import GuestMode
from vmm.trap.exitcodes import ExitCode
from vmm.trap.intercepts import Intercept4
from vmm.trap.permissions import IoPermissions, MsrPermissions
from vmm.trap.vmcb import Vmcb
from vmm.trap.vmcbstate import store_state

MOV = 1 << 63
AT = ORIGIN + 1  # every guest begins with a NOP, so that the instruction is not the first
TIMER_INSNS = 40
TSS, OTHER_TSS = 0x2_0000, 0x2_1000
TSS_SELECTOR, OTHER_TSS_SELECTOR = 0x18, 0x20


def guest_mode(cpu: Cpu, debug: DebugControl) -> GuestMode:
    return GuestMode(cpu, debug, verify=True)


def nothing(_bare: Bare) -> None:
    """No preparation."""


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


def pending_x87_error(guest: Bare) -> None:
    """A division by zero that the next x87 instruction tells of."""
    give_fpu(guest)
    guest.state.cr0 |= CR0_NE
    guest.state.fpu.unpack(image(fcw=0x37B, fsw=0x8084))


def unmasked_sse(guest: Bare) -> None:
    """1.0 by 0.0, which is not masked."""
    give_fpu(guest)
    guest.state.cr4 |= CR4_OSFXSR | CR4_OSXMMEXCPT
    guest.state.fpu.unpack(image(mxcsr=0x1D80, xmm=[0x3F80_0000, *[0] * 7]))


def task_switched(guest: Bare) -> None:
    guest.state.cr0 |= CR0_TS | 2


def misaligned(guest: Bare) -> None:
    ring3(guest)
    guest.state.cr0 |= 1 << 18
    guest.state.eflags |= 1 << 18
    guest.cpu.mmu.update_alignment()


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
def made(source: str, prepare: Callable[[Bare], None] = nothing, *, bits: int = 32) -> Iterator[Run]:
    """A guest with nothing intercepted but what VMRUN itself demands."""
    guest = bare.flat("hlt", guest_mode)
    try:
        guest.memory.write(ORIGIN, assemble(f"nop\n{source}\n" + "nop\n" * 8 + "hlt", bits=bits, origin=ORIGIN))
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
