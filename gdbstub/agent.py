"""Agent expressions: gdb's bytecode for conditions and commands that the target evaluates at a breakpoint.

It must not know packets or the `Target`; registers, memory and output come through an `AgentContext`.
Source: the GDB manual, appendix "The GDB Agent Expression Mechanism".
"""

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Protocol

from gdbstub.agent_printf import PrintfFormat, PrintfFormatError

MAX_EXPRESSION_BYTES = 0x10000
MAX_STEPS = 10_000
MAX_STACK = 256

_WORD_BITS = 64
_WORD = (1 << _WORD_BITS) - 1
_SIGN = 1 << (_WORD_BITS - 1)


class AgentError(Exception):
    """An expression that is malformed, or that cannot be evaluated; the text says why."""


class AgentContext(Protocol):
    """What an expression works on."""

    def read_register(self, number: int) -> int:
        """Return the value of a register, unsigned; AgentError if it is not available."""

    def read_memory(self, address: int, length: int) -> bytes:
        """Return exactly `length` bytes; AgentError if they cannot be read."""

    def write_output(self, text: bytes) -> None:
        """Take what `printf` prints."""

    @property
    def variables(self) -> MutableMapping[int, int]:
        """The trace state variables by number; one that is absent is 0."""


Stack = list[int]
# Takes the stack and the operand; returns where to go on, or None for the next operation.
_Operation = Callable[[Stack, int, AgentContext], int | None]


@dataclass(frozen=True, slots=True)
class _Opcode:
    name: str
    operand_bytes: int
    consumed: int
    run: _Operation


def _signed(value: int) -> int:
    return value - (1 << _WORD_BITS) if value & _SIGN else value


def _binary(compute: Callable[[int, int], int]) -> _Operation:
    def run(stack: Stack, _operand: int, _context: AgentContext) -> None:
        right = stack.pop()
        stack[-1] = compute(stack[-1], right) & _WORD

    return run


def _unary(compute: Callable[[int], int]) -> _Operation:
    def run(stack: Stack, _operand: int, _context: AgentContext) -> None:
        stack[-1] = compute(stack[-1]) & _WORD

    return run


def _divide_signed(left: int, right: int) -> int:
    """Divide as C does, towards zero."""
    dividend, divisor = _signed(left), _signed(right)
    quotient = abs(dividend) // _nonzero(abs(divisor))
    return -quotient if (dividend < 0) != (divisor < 0) else quotient


def _remainder_signed(left: int, right: int) -> int:
    """Return C's remainder, which has the sign of the dividend."""
    dividend = _signed(left)
    remainder = abs(dividend) % _nonzero(abs(_signed(right)))
    return -remainder if dividend < 0 else remainder


def _nonzero(divisor: int) -> int:
    if not divisor:
        raise AgentError("division by zero")
    return divisor


def _shift_left(left: int, count: int) -> int:
    return left << count if count < _WORD_BITS else 0


def _reference(size_bytes: int) -> _Operation:
    def run(stack: Stack, _operand: int, context: AgentContext) -> None:
        stack[-1] = int.from_bytes(context.read_memory(stack[-1], size_bytes), "little")

    return run


def _sign_extend(stack: Stack, bits: int, _context: AgentContext) -> None:
    if 0 < bits < _WORD_BITS:
        value = stack[-1] & ((1 << bits) - 1)
        stack[-1] = (value - (1 << bits)) & _WORD if value >> (bits - 1) else value


def _zero_extend(stack: Stack, bits: int, _context: AgentContext) -> None:
    if 0 < bits < _WORD_BITS:
        stack[-1] &= (1 << bits) - 1


def _constant(stack: Stack, value: int, _context: AgentContext) -> None:
    stack.append(value)


def _register(stack: Stack, number: int, context: AgentContext) -> None:
    stack.append(context.read_register(number) & _WORD)


def _goto(_stack: Stack, target: int, _context: AgentContext) -> int:
    return target


def _if_goto(stack: Stack, target: int, _context: AgentContext) -> int | None:
    return target if stack.pop() else None


def _duplicate(stack: Stack, _operand: int, _context: AgentContext) -> None:
    stack.append(stack[-1])


def _pop(stack: Stack, _operand: int, _context: AgentContext) -> None:
    stack.pop()


def _swap(stack: Stack, _operand: int, _context: AgentContext) -> None:
    stack[-1], stack[-2] = stack[-2], stack[-1]


def _pick(stack: Stack, depth: int, _context: AgentContext) -> None:
    if depth >= len(stack):
        raise AgentError("pick reaches below the stack")
    stack.append(stack[-1 - depth])


def _rotate(stack: Stack, _operand: int, _context: AgentContext) -> None:
    stack[-3:] = stack[-1], stack[-3], stack[-2]


def _get_variable(stack: Stack, number: int, context: AgentContext) -> None:
    stack.append(context.variables.get(number, 0))


def _set_variable(stack: Stack, number: int, context: AgentContext) -> None:
    context.variables[number] = stack[-1]


def _no_effect(_stack: Stack, _operand: int, _context: AgentContext) -> None:
    """Do nothing: what only records into a trace buffer, and there is none."""


def _pop_two(stack: Stack, _operand: int, _context: AgentContext) -> None:
    del stack[-2:]


_END = 0x27
_PRINTF = 0x34
# (opcode, name, bytes of operand, stack elements needed, effect). What works on floating point is absent, as it is in
# gdbserver. tracev pushes nothing: the manual's table shows a result, but gdb's code generator counts on none.
_OPCODES: dict[int, _Opcode] = {
    0x02: _Opcode("add", 0, 2, _binary(lambda a, b: a + b)),
    0x03: _Opcode("sub", 0, 2, _binary(lambda a, b: a - b)),
    0x04: _Opcode("mul", 0, 2, _binary(lambda a, b: a * b)),
    0x05: _Opcode("div_signed", 0, 2, _binary(_divide_signed)),
    0x06: _Opcode("div_unsigned", 0, 2, _binary(lambda a, b: a // _nonzero(b))),
    0x07: _Opcode("rem_signed", 0, 2, _binary(_remainder_signed)),
    0x08: _Opcode("rem_unsigned", 0, 2, _binary(lambda a, b: a % _nonzero(b))),
    0x09: _Opcode("lsh", 0, 2, _binary(_shift_left)),
    0x0A: _Opcode("rsh_signed", 0, 2, _binary(lambda a, b: _signed(a) >> min(b, _WORD_BITS))),
    0x0B: _Opcode("rsh_unsigned", 0, 2, _binary(lambda a, b: a >> min(b, _WORD_BITS))),
    0x0C: _Opcode("trace", 0, 2, _pop_two),
    0x0D: _Opcode("trace_quick", 1, 1, _no_effect),
    0x0E: _Opcode("log_not", 0, 1, _unary(lambda a: not a)),
    0x0F: _Opcode("bit_and", 0, 2, _binary(lambda a, b: a & b)),
    0x10: _Opcode("bit_or", 0, 2, _binary(lambda a, b: a | b)),
    0x11: _Opcode("bit_xor", 0, 2, _binary(lambda a, b: a ^ b)),
    0x12: _Opcode("bit_not", 0, 1, _unary(lambda a: ~a)),
    0x13: _Opcode("equal", 0, 2, _binary(lambda a, b: a == b)),
    0x14: _Opcode("less_signed", 0, 2, _binary(lambda a, b: _signed(a) < _signed(b))),
    0x15: _Opcode("less_unsigned", 0, 2, _binary(lambda a, b: a < b)),
    0x16: _Opcode("ext", 1, 1, _sign_extend),
    0x17: _Opcode("ref8", 0, 1, _reference(1)),
    0x18: _Opcode("ref16", 0, 1, _reference(2)),
    0x19: _Opcode("ref32", 0, 1, _reference(4)),
    0x1A: _Opcode("ref64", 0, 1, _reference(8)),
    0x20: _Opcode("if_goto", 2, 1, _if_goto),
    0x21: _Opcode("goto", 2, 0, _goto),
    0x22: _Opcode("const8", 1, 0, _constant),
    0x23: _Opcode("const16", 2, 0, _constant),
    0x24: _Opcode("const32", 4, 0, _constant),
    0x25: _Opcode("const64", 8, 0, _constant),
    0x26: _Opcode("reg", 2, 0, _register),
    _END: _Opcode("end", 0, 0, _no_effect),
    0x28: _Opcode("dup", 0, 1, _duplicate),
    0x29: _Opcode("pop", 0, 1, _pop),
    0x2A: _Opcode("zero_ext", 1, 1, _zero_extend),
    0x2B: _Opcode("swap", 0, 2, _swap),
    0x2C: _Opcode("getv", 2, 0, _get_variable),
    0x2D: _Opcode("setv", 2, 1, _set_variable),
    0x2E: _Opcode("tracev", 2, 0, _no_effect),
    0x2F: _Opcode("tracenz", 0, 2, _pop_two),
    0x30: _Opcode("trace16", 2, 1, _no_effect),
    0x32: _Opcode("pick", 1, 0, _pick),
    0x33: _Opcode("rot", 0, 3, _rotate),
}
_JUMPS = frozenset((0x20, 0x21))


class Expression:
    """A parsed expression, ready to be evaluated any number of times."""

    __slots__ = ("_code", "source")

    def __init__(self, source: bytes) -> None:
        """Parse bytecode.

        Raises:
            AgentError: an unknown operation, an operand that is cut off, a jump into the middle of an operation, a bad
                format of a printf, or too long.
        """
        if len(source) > MAX_EXPRESSION_BYTES:
            raise AgentError(f"an agent expression of {len(source)} bytes is too long")
        self.source = source
        self._code = _parse(source)

    def evaluate(self, context: AgentContext) -> int:
        """Run to `end` and return the top of the stack, unsigned in 64 bits; 0 if it is empty.

        Raises:
            AgentError: stack under- or overflow, division by zero, unreadable memory or register, too many steps.
        """
        code = self._code
        stack: Stack = []
        at = 0
        for _ in range(MAX_STEPS):
            if at >= len(code):
                raise AgentError("an agent expression runs past its last operation")
            operation, operand, consumed, name = code[at]
            if operation is None:
                return stack[-1] if stack else 0
            if len(stack) < consumed:
                raise AgentError(f"{name}: the stack of an agent expression is empty")
            target = operation(stack, operand, context)
            if target is None:
                at += 1
                if len(stack) > MAX_STACK:
                    raise AgentError("the stack of an agent expression overflows")
            else:
                at = target
        raise AgentError(f"an agent expression takes more than {MAX_STEPS} steps")


# Effect (None: end), operand (a jump's is an index into the code), elements needed, name.
_Step = tuple[_Operation | None, int, int, str]


def _parse(source: bytes) -> list[_Step]:
    code: list[_Step] = []
    index_of: dict[int, int] = {}
    jumps: list[int] = []
    offset = 0
    while offset < len(source):
        index_of[offset] = len(code)
        opcode = source[offset]
        offset += 1
        if opcode == _PRINTF:
            step, offset = _parse_printf(source, offset)
            code.append(step)
            continue
        row = _OPCODES.get(opcode)
        if row is None:
            raise AgentError(f"operation {opcode:#04x} of an agent expression is not supported")
        operand_bytes = source[offset : offset + row.operand_bytes]
        if len(operand_bytes) < row.operand_bytes:
            raise AgentError(f"{row.name}: the operand is cut off")
        offset += row.operand_bytes
        if opcode in _JUMPS:
            jumps.append(len(code))
        effect = None if opcode == _END else row.run
        code.append((effect, int.from_bytes(operand_bytes, "big"), row.consumed, row.name))
    for index in jumps:
        effect, target, consumed, name = code[index]
        if target not in index_of:
            raise AgentError(f"{name}: offset {target} is not the start of an operation")
        code[index] = (effect, index_of[target], consumed, name)
    return code


def _parse_printf(source: bytes, offset: int) -> tuple[_Step, int]:
    """Parse `printf`: a count of arguments, a 16-bit length and a format that ends in a NUL."""
    header = source[offset : offset + 3]
    if len(header) < 3:
        raise AgentError("printf: the operand is cut off")
    count, length = header[0], int.from_bytes(header[1:], "big")
    offset += 3
    text = source[offset : offset + length]
    if len(text) < length or not text.endswith(b"\0"):
        raise AgentError("printf: the format is cut off")
    try:
        template = PrintfFormat(text[:-1])
    except PrintfFormatError as error:
        raise AgentError(f"printf: {error}") from error
    if template.argument_count != count:
        raise AgentError(f"printf: the format takes {template.argument_count} arguments, not {count}")

    def run(stack: Stack, _operand: int, context: AgentContext) -> None:
        # From the top: function and channel, which only a program with a printf of its own could use, then arguments.
        del stack[-2:]
        arguments = [stack.pop() for _ in range(count)]
        context.write_output(template.render(arguments, context.read_memory))

    return (run, 0, count + 2, "printf"), offset + length
