"""One stay of the guest on KVM: it is entered again and again, and its devices answer what it comes out for.

It owns the loop around KVM_RUN: the alarm, virtual time, interrupts, I/O. How the state gets in and out, and what a
stop means to a debugger, is the engine's business.
"""

from __future__ import annotations

import time

from machine.bios.firmware import FIRMWARE_PORT
from machine.cpu import Cpu
from machine.flags import IF
from vmm.trap.exits import ExitCounters
from vmm.trap.kick import Kick
from vmm.trap.kvm import DebugExit, ExitReason, KvmError, Vcpu
from vmm.trap.kvmstate import load_system_registers

# How long the guest may go on at the end of a stay, and how often, so that an event under way reaches its handler.
_DELIVERY_NS = 100_000
_DELIVERY_ATTEMPTS = 10
_EMULATION = 1

Outcome = ExitReason | DebugExit | None


class KvmStay:
    """The virtual CPU with the registers of `cpu` in it, for as long as it keeps them.

    Attributes:
        guest_ns: time of the host in KVM_RUN.
        injected: interrupts given to KVM.
        patience: how many interrupts and waits in HLT are left before the caller is to look around.
    """

    def __init__(self, cpu: Cpu, vcpu: Vcpu, kick: Kick, exits: ExitCounters, patience: int) -> None:
        self._cpu = cpu
        self._vcpu = vcpu
        self._kick = kick
        self._exits = exits
        self._first_icount = cpu.clock.icount
        self._first_ns = time.monotonic_ns()
        self._ready = bool(cpu.state.eflags & IF) and not cpu.state.shadow
        self._halted = False
        self._unfinished = False  # an access whose result KVM takes when it is entered again
        self.guest_ns = 0
        self.injected = 0
        self.patience = patience

    def run(self, end_ns: int) -> Outcome:
        """Run the guest until `time.monotonic_ns` reaches `end_ns`.

        Returns:
            None then, or when a device wants attention; else the exit for the caller to judge: HLT with nothing to wake
            the CPU, SHUTDOWN, INTERNAL_ERROR for an instruction that KVM does not emulate, or what a debug exit tells.

        Raises:
            KvmError: KVM cannot run this guest; the registers can still be read.
        """
        lines = self._cpu.lines
        attempts = 0
        while True:
            now_ns = self._pass_time()
            ending = now_ns >= end_ns or lines.exit_requested is not None or lines.reset_requested
            if self._halted and not self._wakes():
                if ending or not self._sleep():
                    return ExitReason.HLT
                continue
            came_out = False
            if ending and self._unfinished:
                self._unfinished = False
                came_out = self._vcpu.complete()
                if not came_out:
                    continue
            elif ending:
                if attempts == _DELIVERY_ATTEMPTS or not self._vcpu.get_events().in_delivery:
                    return None
                attempts += 1
                end_ns = now_ns + _DELIVERY_NS
            if not came_out:
                came_out = self._enter_guest(end_ns)
            begun_ns = self._pass_time(run_due=False)
            self._ready = self._vcpu.ready_for_interrupt
            label, outcome = self._serve() if came_out else self._note_alarm()
            self._exits.note(label, time.monotonic_ns() - begun_ns)
            if outcome is not None:
                return outcome

    def _pass_time(self, *, run_due: bool = True) -> int:
        """Let virtual time follow the host's clock, and return that."""
        clock = self._cpu.clock
        now_ns = time.monotonic_ns()
        clock.icount = max(clock.icount, self._first_icount + (now_ns - self._first_ns) // clock.ns_per_insn)
        if run_due and clock.icount >= clock.deadline_icount:
            clock.run_due()
        return now_ns

    def _wakes(self) -> bool:
        """Whether there is an event that ends HLT."""
        lines = self._cpu.lines
        self._halted = not (lines.nmi_pending or (lines.intr and self._vcpu.interrupts_enabled))
        return not self._halted

    def _sleep(self) -> bool:
        """Let virtual time skip to the next event; False if there is none, or it is time to look around."""
        self.patience -= 1
        return self._vcpu.interrupts_enabled and self.patience >= 0 and self._cpu.clock.skip_to_next()

    def _enter_guest(self, end_ns: int) -> bool:
        """KVM_RUN, with what is pending; False if the alarm ended it."""
        vcpu, lines, clock = self._vcpu, self._cpu.lines, self._cpu.clock
        if lines.nmi_pending:
            lines.take_nmi()
            vcpu.nmi()
        if lines.intr and self._ready:
            vcpu.interrupt(lines.acknowledge())
            self.injected += 1
            self.patience -= 1
        vcpu.request_window(lines.intr)
        room_insns = clock.deadline_icount - self._first_icount
        if room_insns * clock.ns_per_insn < end_ns - self._first_ns:
            end_ns = self._first_ns + room_insns * clock.ns_per_insn
        self._kick.arm(max(1, end_ns))
        self._unfinished = False
        entered_ns = time.monotonic_ns()
        came_out = vcpu.run()
        self.guest_ns += time.monotonic_ns() - entered_ns
        return came_out

    def _note_alarm(self) -> tuple[str, Outcome]:
        self._kick.drain()
        return "the host's alarm", None

    def _serve(self) -> tuple[str, Outcome]:
        """Do what the guest has come out for: its name for the statistics, and what is left to the caller."""
        vcpu = self._vcpu
        reason = vcpu.exit_reason
        if reason == ExitReason.IO:
            return self._serve_io(), None
        if reason == ExitReason.MMIO:
            return self._serve_mmio(), None
        if reason == ExitReason.HLT:
            self._halted = True
            return "HLT", None
        if reason == ExitReason.IRQ_WINDOW_OPEN:
            return "interrupt window", None
        if reason == ExitReason.INTR:
            return self._note_alarm()
        if reason == ExitReason.DEBUG:
            return "debug register", vcpu.debug_exit()
        if reason == ExitReason.SHUTDOWN:
            return "triple fault", ExitReason.SHUTDOWN
        if reason == ExitReason.INTERNAL_ERROR and vcpu.internal_error() == _EMULATION:
            return "instruction not emulated", ExitReason.INTERNAL_ERROR
        raise KvmError(f"KVM came out of the guest for reason {reason}, which has no answer here")

    def _serve_io(self) -> str:
        """IN and OUT, or a batch of INS or OUTS, at our ports."""
        ports = self._cpu.ports
        is_out, size_bytes, port, times, offset = self._vcpu.io_exit()
        shared = self._vcpu.shared
        if port == FIRMWARE_PORT:
            load_system_registers(self._vcpu, self._cpu.state)  # the one device that looks at who calls
        for at in range(offset, offset + times * size_bytes, size_bytes):
            if is_out:
                ports.store(port, size_bytes, int.from_bytes(shared[at : at + size_bytes], "little"))
            else:
                shared[at : at + size_bytes] = ports.load(port, size_bytes).to_bytes(size_bytes, "little")
        self._unfinished = True
        return f"{'OUT to' if is_out else 'IN from'} {port:#06x}"

    def _serve_mmio(self) -> str:
        """A read or write where no RAM is: devices, ROM, nothing."""
        vcpu, memory = self._vcpu, self._cpu.memory
        physical, data, length, is_write = vcpu.mmio_exit()
        if length in (1, 2, 4):
            if is_write:
                memory.store(physical, length, int.from_bytes(data, "little"))
            else:
                vcpu.answer_mmio(memory.load(physical, length).to_bytes(length, "little"))
        elif is_write:
            for at in range(length):
                memory.store(physical + at, 1, data[at])
        else:
            vcpu.answer_mmio(bytes(memory.load(physical + at, 1) for at in range(length)))
        self._unfinished = True
        return f"{'write to' if is_write else 'read of'} page {physical & ~0xFFF:#x}"
