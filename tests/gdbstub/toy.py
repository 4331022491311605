"""A toy machine behind the `Target` protocol: a few IA-32 instructions, one flat RAM, everything visible.

Its program is toy.s, so that real debuggers disassemble what they see; it must not depend on `machine`.
"""

import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from gdbstub.target import (
    Breakpoint,
    BreakpointKind,
    Description,
    Feature,
    Field,
    FlagsType,
    MemoryRegion,
    QuitRequested,
    Register,
    Resume,
    ResumeMode,
    Signal,
    StintEnd,
    StopEvent,
    StopReason,
    TargetError,
    Thread,
    Verdict,
)

RAM_BYTES = 0x10_0000
TEXT = 0x1000
DATA = 0x2000
# `_start` of toy.s, assembled; tests that have no debugger need no assembler either.
LOOP = 0x100A
TICK = 0x1011
TICK_STORE = 0x1015
BUMP = 0x1021
TRAP_HERE = 0x1027
LEAVE = 0x102C
IDLE = 0x102F
COUNTER = DATA
GREETING = DATA + 4
TEXT_BYTES = bytes.fromhex(
    "b800000000 bc00800000 e802000000 ebf9"
    "55 89e5 40 a300200000 e802000000 5d c3"
    "55 89e5 41 5d c3"
    "0f0b 90 ebde"
    "e6f4 90"
    "f4 ebfd",
)
DATA_BYTES = bytes(4) + b"hello, debugger\0"

_GPR = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi")
_POINTERS = {"esp": "data_ptr", "ebp": "data_ptr", "eip": "code_ptr"}
EFLAGS = FlagsType(
    "i386_eflags", 4, (Field("CF", 0, 0), Field("", 1, 1), Field("ZF", 6, 6), Field("IF", 9, 9), Field("IOPL", 12, 13))
)
CORE = Feature(
    "org.gnu.gdb.i386.core",
    (
        *(Register(name, type=_POINTERS.get(name, "int32")) for name in (*_GPR, "eip")),
        Register("eflags", type="i386_eflags"),
        *(Register(name) for name in ("cs", "ss", "ds", "es", "fs", "gs")),
        *(Register(f"st{number}", 80, "i387_ext") for number in range(8)),
        *(
            Register(name, type="int", group="float")
            for name in ("fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop")
        ),
    ),
    (EFLAGS,),
)
TOY = Feature(
    "org.trapgate.toy",
    (Register("cr0", 32, "cr0_flags", "system"), Register("icount", 64, "uint64", "system", save_restore=False)),
    (FlagsType("cr0_flags", 4, (Field("PE", 0, 0), Field("PG", 31, 31))),),
)
DESCRIPTION = Description((CORE, TOY))
ESP, EBP, EIP, EFLAGS_NUMBER, CS, ST0 = 4, 5, 8, 9, 10, 16
CR0, ICOUNT = len(CORE.registers), len(CORE.registers) + 1


def assemble(directory: Path) -> Path:
    """Build toy.s with its symbols and lines; return the ELF file."""
    source = Path(__file__).with_name("toy.s")
    for tool in ("as", "ld"):
        assert shutil.which(tool), f"{tool} is missing: apt-get install binutils"
    elf = directory / "toy.elf"
    subprocess.run(["as", "--32", "-g", "-o", directory / "toy.o", source], check=True, timeout=60)
    link = ["ld", "-m", "elf_i386", f"-Ttext={TEXT:#x}", f"-Tdata={DATA:#x}", "-e", "_start", "-o", str(elf)]
    subprocess.run([*link, str(directory / "toy.o")], check=True, timeout=60)
    return elf


class ToyTarget:
    """The toy machine."""

    def __init__(self, ram_bytes: int = RAM_BYTES, exec_file: str | None = None) -> None:
        self.ram = bytearray(ram_bytes)
        self.exec_path = exec_file
        self.registers: list[int | None] = []
        self.code: dict[tuple[BreakpointKind, int, int], Breakpoint] = {}
        self.watches: dict[tuple[BreakpointKind, int, int], Breakpoint] = {}
        self.passed: frozenset[int] = frozenset()
        self.delivered: list[int] = []
        self.calls: list[str] = []
        self.attached = False
        self.slow_commands = 0
        self.dead = False
        self.map: Sequence[MemoryRegion] | None = None
        self._action = Resume(ResumeMode.CONTINUE)
        self._fresh = False
        self._ignored_at: int | None = None
        self._touched: tuple[int, bool] | None = None
        self.reset()

    @property
    def description(self) -> Description:
        return DESCRIPTION

    def reset(self) -> None:
        self.ram[:] = bytes(len(self.ram))
        self.ram[TEXT : TEXT + len(TEXT_BYTES)] = TEXT_BYTES
        self.ram[DATA : DATA + len(DATA_BYTES)] = DATA_BYTES
        self.registers = [0] * len(DESCRIPTION.registers)
        self.registers[ST0 : ST0 + 8] = [None] * 8
        self.registers[EIP] = TEXT
        self.registers[EFLAGS_NUMBER] = 2
        self.registers[CS] = 8
        self.registers[CR0] = 1
        self.dead = False

    def get(self, number: int) -> int:
        value = self.registers[number]
        assert value is not None
        return value

    def threads(self) -> Sequence[Thread]:
        return [Thread(1, "CPU 1", "halted" if self.read_memory(self.get(EIP), 1) == b"\xf4" else "running")]

    def read_registers(self, thread_id: int) -> Sequence[int | None]:
        assert thread_id == 1
        return self.registers

    def read_register(self, thread_id: int, number: int) -> int | None:
        assert thread_id == 1
        return self.registers[number]

    def write_register(self, thread_id: int, number: int, value: int) -> None:
        assert thread_id == 1
        if number == ICOUNT:
            raise TargetError("icount cannot be written: it counts what #happened")
        if self.registers[number] is None:
            raise TargetError("there is no x87 here")
        self.registers[number] = value

    def read_memory(self, address: int, length: int) -> bytes:
        return bytes(self.ram[address : address + length])

    def write_memory(self, address: int, data: bytes) -> None:
        if address + len(data) > len(self.ram):
            raise TargetError(f"no memory at {address + len(data) - 1:#x}")
        self.ram[address : address + len(data)] = data

    def memory_map(self) -> Sequence[MemoryRegion] | None:
        return self.map

    def region_at(self, address: int) -> MemoryRegion | None:
        if address < len(self.ram):
            return MemoryRegion(0, len(self.ram), name="ram")
        return MemoryRegion(len(self.ram), (1 << 32) - len(self.ram), permissions="")

    def insert_breakpoint(self, breakpoint: Breakpoint) -> None:  # noqa: A002 - the protocol's name
        table = self.code if breakpoint.kind <= BreakpointKind.HARDWARE else self.watches
        table[breakpoint.kind, breakpoint.address, breakpoint.length] = breakpoint

    def remove_breakpoint(self, kind: BreakpointKind, address: int, length: int) -> None:
        self.code.pop((kind, address, length), None)
        self.watches.pop((kind, address, length), None)

    def pass_signals(self, signals: frozenset[int]) -> None:
        self.passed = signals

    def resume(self, actions: Sequence[Resume]) -> None:
        assert not self.dead
        self._action = next(action for action in actions if action.thread_id in (None, 1))
        self._fresh = True

    def run(self, budget_insns: int) -> StopEvent | StintEnd:
        assert not self.dead
        for _ in range(budget_insns):
            outcome = self._run_one()
            if outcome is not None:
                return outcome
        return StintEnd.BUDGET

    def _run_one(self) -> StopEvent | StintEnd | None:
        action = self._action
        eip = self.get(EIP)
        verdict: Verdict | None = None
        if action.mode is ResumeMode.CONTINUE or not self._fresh:
            verdict, reason = self._check_code(eip)
            if verdict is Verdict.STOP:
                self._ignored_at = eip
                return StopEvent(reason)
        self._ignored_at = None
        signal = action.signal if self._fresh else 0
        self._fresh = False
        self._touched = None
        outcome = self._execute(eip, signal)
        if outcome is not None:
            return outcome
        self.registers[ICOUNT] = self.get(ICOUNT) + 1
        stop = self._check_watches()
        if stop is not None:
            return stop
        if action.mode is ResumeMode.STEP:
            return StopEvent(StopReason.STEP)
        if action.mode is ResumeMode.RANGE_STEP and not action.range_start <= self.get(EIP) < action.range_end:
            return StopEvent(StopReason.STEP)
        return StintEnd.BUDGET if verdict is Verdict.GO_ON_AND_YIELD else None

    def _check_code(self, eip: int) -> tuple[Verdict | None, StopReason]:
        verdict: Verdict | None = None
        reason = StopReason.SWBREAK
        if eip == self._ignored_at:
            return verdict, reason
        for (kind, address, _), found in self.code.items():
            if address == eip:
                verdict = found.check() if found.check else Verdict.STOP
                reason = StopReason.SWBREAK if kind is BreakpointKind.SOFTWARE else StopReason.HWBREAK
                if verdict is Verdict.STOP:
                    break
        return verdict, reason

    def _check_watches(self) -> StopEvent | None:
        if self._touched is None:
            return None
        touched, wrote = self._touched
        reasons = {
            BreakpointKind.WRITE: StopReason.WATCH,
            BreakpointKind.READ: StopReason.RWATCH,
            BreakpointKind.ACCESS: StopReason.AWATCH,
        }
        for kind, address, length in self.watches:
            hit = kind is BreakpointKind.ACCESS or (kind is BreakpointKind.WRITE) == wrote
            if hit and address < touched + 4 and touched < address + length:
                return StopEvent(reasons[kind], address=address)
        return None

    def _execute(self, eip: int, signal: int) -> StopEvent | StintEnd | None:
        code = self.ram[eip : eip + 6] or b"\x0f"
        op = code[0]
        immediate = int.from_bytes(code[1:5], "little")
        after = eip + 1
        if op == 0x90:
            pass
        elif 0xB8 <= op < 0xC0:
            self.registers[op & 7] = immediate
            after = eip + 5
        elif 0x40 <= op < 0x48:
            self.registers[op & 7] = (self.get(op & 7) + 1) & 0xFFFF_FFFF
        elif 0x50 <= op < 0x58:
            self._push(self.get(op & 7))
        elif 0x58 <= op < 0x60:
            self.registers[op & 7] = self._pop()
        elif code[:2] == b"\x89\xe5":
            self.registers[EBP] = self.get(ESP)
            after = eip + 2
        elif op == 0xA3:
            self._store(immediate, self.get(0))
            after = eip + 5
        elif op == 0xE8:
            self._push(eip + 5)
            after = eip + 5 + immediate & 0xFFFF_FFFF
        elif op == 0xEB:
            after = eip + 2 + int.from_bytes(code[1:2], "little", signed=True)
        elif op == 0xC3:
            after = self._pop()
        elif op == 0xF4:
            return StintEnd.IDLE
        elif code[:2] == b"\xe6\xf4":
            self.dead = True
            return StopEvent(StopReason.EXITED, status=(self.get(0) & 0xFF) << 1 | 1)
        elif signal == Signal.ILL or Signal.ILL in self.passed:
            self.delivered.append(eip)
            after = eip + 2
        else:
            return StopEvent(StopReason.SIGNAL, Signal.ILL, text="an invalid instruction\n")
        self.registers[EIP] = after & 0xFFFF_FFFF
        return None

    def _push(self, value: int) -> None:
        self.registers[ESP] = (self.get(ESP) - 4) & 0xFFFF_FFFF
        self._store(self.get(ESP), value)

    def _pop(self) -> int:
        at = self.get(ESP)
        self._touched = (at, False)
        self.registers[ESP] = (at + 4) & 0xFFFF_FFFF
        return int.from_bytes(self.ram[at : at + 4], "little")

    def _store(self, address: int, value: int) -> None:
        """Store; where no memory is, nothing happens."""
        self._touched = (address, True)
        if address + 4 <= len(self.ram):
            self.ram[address : address + 4] = value.to_bytes(4, "little")

    def interrupt(self) -> StopEvent:
        return StopEvent(StopReason.SIGNAL, Signal.INT)

    def attach(self) -> None:
        self.attached = True
        self.calls.append("attach")

    def detach(self) -> None:
        self.attached = False
        self.code.clear()
        self.watches.clear()
        self.passed = frozenset()
        self.calls.append("detach")

    def restart(self) -> StopEvent:
        self.reset()
        self.calls.append("restart")
        return StopEvent(StopReason.SIGNAL)

    def kill(self) -> None:
        self.dead = True
        self.calls.append("kill")

    def monitor(self, command: str, *, read_only: bool) -> Iterator[str]:
        name, _, argument = command.partition(" ")
        number = int(argument) if argument.isascii() and argument.isdigit() else 0
        if name == "slow":
            self.slow_commands += 1
            try:
                for index in range(min(number, 10_000)):
                    yield f"slice {index}\n"
            finally:
                self.slow_commands -= 1
        elif name == "quit":
            raise QuitRequested(number)
        elif name == "poke":
            if read_only:
                raise TargetError("only for who controls the guest")
            self.ram[COUNTER] = number & 0xFF
            yield "poked\n"
        elif name == "help":
            yield "help\npoke N\nquit\nslow N\n"
        else:
            raise TargetError(f"no such command: {name}")

    def exec_file(self) -> str | None:
        return self.exec_path

    def os_tables(self) -> Mapping[str, str]:
        return {"exits": "Exits by reason"}

    def os_rows(self, table: str) -> Sequence[Mapping[str, str]]:
        assert table == "exits"
        return [{"Reason": "I/O", "Count": "3"}, {"Reason": "HLT & <co>", "Count": "1"}]
