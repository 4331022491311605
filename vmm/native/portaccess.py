"""Port accesses of emitted code: performed at their icount; a loop that does nothing but poll a port is passed over.

What a steady port gives to other loops is published in the state block, where emitted code reads it.

Where registers, flags and what was read are the same at two reads by the same instruction, and the instructions between
them only compute, the rounds that follow are the same, too, as long as the device says that the port is steady. It must
not know how the TC is left or entered.
"""

from __future__ import annotations

from iced_x86 import Decoder, FlowControl, Instruction, OpKind

from machine.cpu import Cpu
from machine.instructions import lookup
from machine.instructions.operands import CONDITION_NAMES
from machine.memory import PAGE_SHIFT
from machine.state import EAX, MASK32
from vmm.blocks import OPTIONS
from vmm.native import stateblock
from vmm.native.sharing import Space
from vmm.native.stateblock import StateBlock

READS_BEFORE_PUBLISHED = 6  # by then it is known whether a loop can be passed over
LONGEST_ROUND_INSNS = 16
_REACH_BYTES = 64  # around the access; a round is not longer
_MARGIN_INSNS = 64  # of the budget, which emitted code uses up itself
_GPR_BYTES = 32
_JUDGEMENTS = 256

_COMPUTING = frozenset(
    {
        *("mov", "movzx", "movsx", "lea", "test", "cmp", "and", "or", "xor", "add", "sub", "inc", "dec", "not", "neg"),
        *("shl", "shr", "sar", "bt", "nop", "pause", "jmp", *(f"j{name}" for name in CONDITION_NAMES)),
    }
)
_FLOW = (FlowControl.NEXT, FlowControl.CONDITIONAL_BRANCH, FlowControl.UNCONDITIONAL_BRANCH)


_SIZE = stateblock.PORT_STORE - 1
_MASKS = {1: 0xFF, 2: 0xFFFF, 4: MASK32}
_NO_PORT = 2  # no sum with four times a port is zero, nor is that less one


class PortAccesses:
    """What IN and OUT of emitted code do.

    Attributes:
        count: how many there were.
        rounds: how many rounds of loops were passed over.
    """

    def __init__(self, cpu: Cpu) -> None:
        self._cpu = cpu
        self._read_before = -1, 0
        self._reads = 0  # of one byte at that port, with that value, in a row
        self._before: tuple[int, bytes, int] | None = None
        self._before_icount = 0
        self._judgements: dict[tuple[object, int, int, bytes], bool] = {}
        self.count = 0
        self.rounds = 0

    def forget(self, block: StateBlock) -> None:
        """Something else happened than port accesses: the next one is the first of its loop."""
        self._before = None
        self._reads = 0
        block.words[stateblock.PUBLISHED_PORT] = _NO_PORT

    def perform(self, block: StateBlock, icount: int) -> bool:
        """The access that the state block describes, by the instruction that retires as number `icount`.

        Returns:
            Whether it was a read of one byte, which may be polling.
        """
        cpu, words = self._cpu, block.words
        access, port, eax = words[stateblock.PORT_ACCESS], words[stateblock.PORT], words[EAX]
        cpu.clock.icount = icount - 1
        self.count += 1
        words[stateblock.PUBLISHED_PORT] = _NO_PORT
        if access == 1:
            value = cpu.ports.load(port, 1) & 0xFF
            words[EAX] = eax & ~0xFF | value
            words[stateblock.PUBLISHED_VALUE] = value
            return True
        self._before = None
        self._reads = 0
        size_bytes = access & _SIZE
        mask = _MASKS[size_bytes]
        if access != size_bytes:
            cpu.ports.store(port, size_bytes, eax & mask)
        else:
            words[EAX] = eax & ~mask | cpu.ports.load(port, size_bytes) & mask
        return False

    def poll(self, block: StateBlock, space: Space, limit_icount: int) -> int:
        """A byte has just been read, maybe not for the first time: pass over rounds like the last one, or publish it.

        Args:
            block: the state block.
            space: where the instruction is.
            limit_icount: when the budget is used up.

        Returns:
            How many instructions retire in rounds that are passed over: what they would do has been done already.
        """
        words, clock, ports = block.words, self._cpu.clock, self._cpu.ports
        port = words[stateblock.PORT]
        until_ns = ports.steady_until_ns(port, 1)
        if not until_ns:
            self._before = None
            self._reads = 0
            return 0
        passed_insns = self._pass_over(block, space, until_ns)
        value = words[stateblock.PUBLISHED_VALUE]
        if passed_insns or (port, value) != self._read_before:
            self._reads = 0
        self._read_before = port, value
        self._reads += 1
        # What the read itself has changed is not read again.
        if self._reads >= READS_BEFORE_PUBLISHED and ports.load(port, 1) == value:
            until_icount = -((clock.idle_ns - until_ns) // clock.ns_per_insn)
            words[stateblock.PUBLISHED_PORT] = -4 * port & MASK32
            block.quads[stateblock.PUBLISHED_BUDGET] = until_icount - limit_icount
        return passed_insns

    def _pass_over(self, block: StateBlock, space: Space, steady_ns: int) -> int:
        """How many instructions retire in rounds that are like the last one, behind a read just performed."""
        clock = self._cpu.clock
        icount = clock.icount + 1
        eip = block.words[stateblock.ROUTINE_EIP]
        now = eip, bytes(block.data[:_GPR_BYTES]), block.quads[stateblock.FLAGS]
        before, round_insns = self._before, icount - self._before_icount
        self._before, self._before_icount = now, icount
        if now != before or not 1 <= round_insns <= LONGEST_ROUND_INSNS:
            return 0
        steady_insns = (steady_ns - clock.now_ns - 1) // clock.ns_per_insn
        rounds = min(steady_insns, block.quads[stateblock.BUDGET] - _MARGIN_INSNS) // round_insns
        if rounds <= 0 or not self._only_computes(space, eip, round_insns):
            return 0
        self.rounds += rounds
        self._before_icount += rounds * round_insns
        return rounds * round_insns

    def _only_computes(self, space: Space, eip: int, round_insns: int) -> bool:
        """Whether all ways of so many instructions from behind the access at `eip` back to it only compute."""
        linear = space.mode.linear(eip)
        ram_page = space.window.ram_page(linear >> PAGE_SHIFT)
        if ram_page < 0:
            return False
        first = max(0, (linear & 0xFFF) - _REACH_BYTES)
        end = min(4096, (linear & 0xFFF) + _REACH_BYTES)
        base = ram_page << PAGE_SHIFT
        data = bytes(self._cpu.memory.ram8[base + first : base + end])
        key = space.mode, eip, round_insns, data
        verdict = self._judgements.get(key)
        if verdict is None:
            if len(self._judgements) >= _JUDGEMENTS:
                self._judgements.clear()
            start = eip - (linear & 0xFFF) + first
            verdict = self._judgements[key] = self._judge(data, start, eip, round_insns, narrow=space.mode.is_narrow)
        return verdict

    def _judge(self, data: bytes, start: int, eip: int, round_insns: int, *, narrow: bool) -> bool:
        """See `_only_computes`; `data` are the bytes from the guest address `start` on."""
        features = self._cpu.model.instructions
        decoder = Decoder(16 if narrow else 32, data, OPTIONS)

        def decode(at: int) -> Instruction | None:
            if not 0 <= at - start < len(data):
                return None
            decoder.position, decoder.ip = at - start, at
            instruction = decoder.decode()
            return None if instruction.is_invalid else instruction

        access = decode(eip)
        ways = {access.next_ip32} if access is not None else set()
        for _ in range(round_insns - 1):
            following: set[int] = set()
            for at in ways - {eip}:  # whoever comes back sooner is another round
                instruction = decode(at)
                if instruction is None or not _computes(instruction, features):
                    return False
                if instruction.flow_control != FlowControl.UNCONDITIONAL_BRANCH:
                    following.add(instruction.next_ip32)
                if instruction.flow_control != FlowControl.NEXT:
                    following.add(instruction.near_branch_target & MASK32)
            ways = following
        return eip in ways


def _computes(instruction: Instruction, features: frozenset[int]) -> bool:
    """Whether it changes general registers and flags alone, and cannot fault."""
    row = lookup(instruction.code, features)
    if row is None or row.mnemonic not in _COMPUTING or instruction.flow_control not in _FLOW:
        return False
    if instruction.flow_control != FlowControl.NEXT:
        return instruction.op0_kind in (OpKind.NEAR_BRANCH16, OpKind.NEAR_BRANCH32)
    has_memory = any(instruction.op_kind(number) == OpKind.MEMORY for number in range(instruction.op_count))
    return not has_memory or row.mnemonic == "lea"
