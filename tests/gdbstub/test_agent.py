"""Agent expressions: bytecode made by hand, and random programs against a model that computes in Python's own way."""

import struct
from collections.abc import MutableMapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdbstub.agent import MAX_STACK, MAX_STEPS, AgentError, Expression
from gdbstub.agent_printf import PrintfFormat, PrintfFormatError

MEMORY = bytes(range(1, 200)) + b"text\0" + bytes(60)


class Context:
    def __init__(self) -> None:
        self.variables: MutableMapping[int, int] = {}
        self.output = b""

    def read_register(self, number: int) -> int:
        if number > 9:
            raise AgentError("no such register")
        return 1000 + number

    def read_memory(self, address: int, length: int) -> bytes:
        if address + length > len(MEMORY):
            raise AgentError("unreadable")
        return MEMORY[address : address + length]

    def write_output(self, text: bytes) -> None:
        self.output += text


def run(code: str, context: Context | None = None) -> int:
    return Expression(bytes.fromhex(code)).evaluate(context or Context())


def push(value: int) -> str:
    return f"25{value % 2**64:016x}"


MINUS_7, MINUS_2 = push(-7), push(-2)


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("27", 0),
        ("2205 27", 5),
        ("220523000c02 27", 17),
        ("22052207 03 27", 2**64 - 2),
        ("22052207 04 27", 35),
        (f"{MINUS_7}2202 05 27", 2**64 - 3),
        (f"2207{MINUS_2} 05 27", 2**64 - 3),
        (f"{MINUS_7}{MINUS_2} 05 27", 3),
        ("2207 2202 06 27", 3),
        (f"{MINUS_7}2202 07 27", 2**64 - 1),
        (f"2207{MINUS_2} 07 27", 1),
        (f"{MINUS_7}220a 08 27", (2**64 - 7) % 10),
        ("2201 223f 09 27", 2**63),
        ("2201 2240 09 27", 0),
        (f"{MINUS_7}2201 0a 27", 2**64 - 4),
        (f"{MINUS_7}22ff 0a 27", 2**64 - 1),
        (f"{MINUS_7}2201 0b 27", (2**64 - 7) >> 1),
        (f"{MINUS_7}2240 0b 27", 0),
        ("2263 2201 2202 0c 27", 0x63),
        ("2205 0d 08 27", 5),
        ("2205 0e 27", 0),
        ("2200 0e 27", 1),
        ("220c 220a 0f 27", 8),
        ("220c 220a 10 27", 14),
        ("220c 220a 11 27", 6),
        ("2200 12 27", 2**64 - 1),
        ("2205 2205 13 27", 1),
        ("2205 2206 13 27", 0),
        (f"{MINUS_7} 2201 14 27", 1),
        (f"2201 {MINUS_7} 14 27", 0),
        (f"{MINUS_7} 2201 15 27", 0),
        ("2280 16 08 27", 2**64 - 128),
        ("227f 16 08 27", 127),
        (f"{MINUS_7} 16 40 27", 2**64 - 7),
        ("2300ff 16 00 27", 255),
        ("2200 17 27", 0x01),
        ("2200 18 27", 0x0201),
        ("2200 19 27", 0x04030201),
        ("2200 1a 27", 0x0807060504030201),
        # if 1 goto 9; const8 1; end; const8 2; end
        ("2201 200008 2201 27 2202 27", 2),
        ("2200 200008 2201 27 2202 27", 1),
        ("210006 2201 27 2202 27", 2),
        ("24 12345678 27", 0x12345678),
        ("26 0003 27", 1003),
        ("2205 28 02 27", 10),
        ("2205 2206 29 27", 5),
        (f"{MINUS_7} 2a 10 27", 0xFFF9),
        (f"{MINUS_7} 2a 40 27", 2**64 - 7),
        ("2205 2202 2b 03 27", 2**64 - 3),
        ("2c 0001 27", 0),
        ("2207 2d 0001 29 2c 0001 27", 7),
        ("2205 2e 0001 27", 5),
        ("2263 2201 2202 2f 27", 0x63),
        ("2205 30 0008 27", 5),
        ("2205 2206 32 00 27", 6),
        ("2205 2206 32 01 27", 5),
        # a b c -> c a b
        ("2201 2202 2203 33 27", 2),
        ("2201 2202 2203 33 29 27", 1),
        ("2201 2202 2203 33 29 29 27", 3),
    ],
)
def test_operation(code: str, value: int) -> None:
    assert run(code) == value


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("2201", "past its last"),
        ("", "past its last"),
        ("2201 2200 05 27", "division by zero"),
        ("2201 2200 06 27", "division by zero"),
        ("2201 2200 07 27", "division by zero"),
        ("2201 2200 08 27", "division by zero"),
        ("02 27", "stack .* is empty"),
        ("2201 02 27", "stack .* is empty"),
        ("29 27", "stack .* is empty"),
        ("20 0000 27", "stack .* is empty"),
        ("2201 2202 33 27", "stack .* is empty"),
        ("2201 32 01 27", "below the stack"),
        ("2201 210002", "overflows|steps"),
        ("2201 210000", "overflows"),
        ("210000", "steps"),
        ("26 0063 27", "no such register"),
        (f"{push(2**63)} 17 27", "unreadable"),
    ],
)
def test_evaluation_fails(code: str, text: str) -> None:
    with pytest.raises(AgentError, match=text):
        run(code)


@pytest.mark.parametrize("opcode", [0x00, 0x01, 0x1B, 0x1C, 0x1D, 0x1E, 0x1F, 0x31, 0x35, 0xFF])
def test_unknown_operations(opcode: int) -> None:
    with pytest.raises(AgentError, match="not supported"):
        Expression(bytes((opcode, 0x27)))


@pytest.mark.parametrize(
    "code", ["22", "2300", "24000000", "25" + 7 * "00", "2600", "2000", "16", "32", "3401", "340100", "34000002 61"]
)
def test_cut_off_operands(code: str) -> None:
    with pytest.raises(AgentError, match="cut off"):
        Expression(bytes.fromhex(code))


def test_jumps_go_to_operations_only() -> None:
    with pytest.raises(AgentError, match="not the start"):
        Expression(bytes.fromhex("210001"))
    with pytest.raises(AgentError, match="not the start"):
        Expression(bytes.fromhex("210003"))


def test_overlong_expression() -> None:
    with pytest.raises(AgentError, match="too long"):
        Expression(b"\x27" * 0x10001)


def test_stack_and_steps_are_bounded_exactly() -> None:
    assert run("2201" * MAX_STACK + "27") == 1
    with pytest.raises(AgentError, match="overflows"):
        run("2201" * (MAX_STACK + 1) + "27")
    assert run("220129" * ((MAX_STEPS - 2) // 2) + "220127") == 1
    with pytest.raises(AgentError, match="steps"):
        run("220129" * (MAX_STEPS // 2) + "220127")


def model_divide(left: int, right: int) -> tuple[int, int]:
    """Divide two signed numbers as a machine does, towards zero."""
    quotient = -(-left // right) if (left < 0) != (right < 0) else left // right
    return quotient, left - quotient * right


@given(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1))
def test_arithmetic_against_fixed_width_model(left: int, right: int) -> None:
    def evaluate(opcode: int) -> int:
        return run(f"{push(left)}{push(right)}{opcode:02x}27")

    def wrap(value: int) -> int:
        return int(struct.unpack("<Q", struct.pack("<q", (value + 2**63) % 2**64 - 2**63))[0])

    assert evaluate(0x02) == wrap(left + right)
    assert evaluate(0x03) == wrap(left - right)
    assert evaluate(0x04) == wrap(left * right)
    assert evaluate(0x14) == (left < right)
    assert evaluate(0x15) == (wrap(left) < wrap(right))
    assert evaluate(0x13) == (left == right)
    if right:
        quotient, remainder = model_divide(left, right)
        assert evaluate(0x05) == wrap(quotient)
        assert evaluate(0x07) == wrap(remainder)
        assert evaluate(0x06) == wrap(left) // wrap(right)
        assert evaluate(0x08) == wrap(left) % wrap(right)


@given(st.binary(max_size=40))
def test_random_bytecode_never_does_worse_than_an_error(code: bytes) -> None:
    try:
        value = Expression(code + b"\x27").evaluate(Context())
    except AgentError:
        return
    assert 0 <= value < 2**64


def printf_code(template: bytes, *arguments: int) -> str:
    """Make what gdb makes: arguments last to first, channel, function, printf."""
    pushes = "".join(push(value) for value in reversed(arguments))
    text = template + b"\0"
    return f"{pushes}22002200 34{len(arguments):02x}{len(text):04x}{text.hex()} 27"


@pytest.mark.parametrize(
    ("template", "arguments", "text"),
    [
        (rb"plain\n", (), b"plain\n"),
        (b"%d %d", (5, -5), b"5 -5"),
        (b"%u", (-1,), b"4294967295"),
        (b"%i", (-1,), b"-1"),
        (b"%d", (0xFFFFFFFF,), b"-1"),
        (b"%lld %llu %llx", (-1, -1, -1), b"-1 18446744073709551615 ffffffffffffffff"),
        (b"%ld %lu", (-1, -1), b"-1 4294967295"),
        (b"%hd %hhu", (0x18000, 0x1FF), b"-32768 255"),
        (b"%x %X %#x %o %#o", (255, 255, 255, 8, 8), b"ff FF 0xff 10 010"),
        (b"%5d|%-5d|%05d|%+d|% d", (42,) * 5, b"   42|42   |00042|+42| 42"),
        (b"%.3d", (7,), b"007"),
        (b"%c%c", (0x41, 0x142), b"AB"),
        (b"%p", (0x1234,), b"0x1234"),
        (b"100%%", (), b"100%"),
        (b"[%s] [%10s] [%.2s]", (199, 199, 199), b"[text] [      text] [te]"),
        (rb"\t\"\\\101\e", (), b'\t"\\A\x1b'),
        (b"%zu %td %jd", (1, 2, 3), b"1 2 3"),
    ],
)
def test_printf(template: bytes, arguments: tuple[int, ...], text: bytes) -> None:
    context = Context()
    assert run(printf_code(template, *arguments), context) == 0
    assert context.output == text


@pytest.mark.parametrize("template", [b"%f", b"%", b"%n", b"%q", b"%*d", rb"\q", b"%99999d", b"%.99999d", b"%Lf"])
def test_printf_formats_that_are_refused(template: bytes) -> None:
    with pytest.raises(PrintfFormatError):
        PrintfFormat(template)
    with pytest.raises(AgentError):
        Expression(bytes.fromhex(printf_code(template, 1)))


def test_printf_counts_its_arguments() -> None:
    with pytest.raises(AgentError, match="takes 2 arguments, not 1"):
        run(printf_code(b"%d %d", 1))
    with pytest.raises(AgentError, match="stack"):
        run("2200 2200 34 01 0003 256400 27")


def test_printf_of_a_string_that_cannot_be_read() -> None:
    with pytest.raises(AgentError, match="unreadable"):
        run(printf_code(b"%s", 5000))


def test_printf_of_a_string_without_end_is_bounded() -> None:
    text = PrintfFormat(b"%s").render([0], lambda _address, length: b"a" * length)
    assert len(text) == 4096


@given(st.binary(max_size=30), st.lists(st.integers(0, 2**64 - 1), min_size=30, max_size=30))
def test_random_formats(template: bytes, arguments: list[int]) -> None:
    try:
        parsed = PrintfFormat(template)
    except PrintfFormatError:
        return
    parsed.render(arguments[: parsed.argument_count], lambda _address, length: b"\0" * length)
