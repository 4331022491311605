"""The formats of an agent expression's `printf`: C's conversions, sized as on IA-32.

It must not know bytecode; strings come from memory through a function.
"""

import re
from collections.abc import Callable, Sequence

MAX_FIELD_CHARS = 1024
MAX_STRING_BYTES = 4096
_STRING_PIECE_BYTES = 64
# On IA-32 int, long, size_t and pointers have 32 bits.
_BITS_OF_LENGTH = {b"hh": 8, b"h": 16, b"": 32, b"l": 32, b"ll": 64, b"j": 64, b"z": 32, b"t": 32}
_CONVERSION = re.compile(
    rb"%(?P<flags>[-+ #0]*)(?P<width>\d*)(?:\.(?P<precision>\d*))?(?P<length>hh|h|ll|l|j|z|t)?(?P<kind>[diouxXcsp%])",
)
_ESCAPES = {
    b"a": b"\a",
    b"b": b"\b",
    b"e": b"\x1b",
    b"f": b"\f",
    b"n": b"\n",
    b"r": b"\r",
    b"t": b"\t",
    b"v": b"\v",
    b'"': b'"',
    b"\\": b"\\",
}
_ESCAPE = re.compile(rb"\\([0-7]{1,3}|.)", re.DOTALL)

ReadMemory = Callable[[int, int], bytes]


class PrintfFormatError(Exception):
    """A format that has no defined meaning here; the text says where."""


class PrintfFormat:
    """A parsed format."""

    __slots__ = ("_pieces", "argument_count")

    def __init__(self, source: bytes) -> None:
        """Parse a format whose backslash escapes are still written out, as gdb sends them.

        Raises:
            PrintfFormatError: an unknown escape or conversion (also floating point), or an absurd width.
        """
        text = _ESCAPE.sub(_decode_escape, source)
        # Literal text, or a conversion: Python's own format of it, its kind and the bits of its argument.
        self._pieces: list[bytes | tuple[bytes, bytes, int]] = []
        position = 0
        while (percent := text.find(b"%", position)) >= 0:
            match = _CONVERSION.match(text, percent)
            if match is None:
                raise PrintfFormatError(f"no such conversion here: {text[percent : percent + 8].decode('latin-1')}")
            self._pieces.append(text[position:percent])
            self._pieces.append(b"%" if match["kind"] == b"%" else _parse_conversion(match))
            position = match.end()
        self._pieces.append(text[position:])
        self.argument_count = sum(isinstance(piece, tuple) for piece in self._pieces)

    def render(self, arguments: Sequence[int], read_memory: ReadMemory) -> bytes:
        """Return the text for `argument_count` arguments, each unsigned in 64 bits.

        Whatever `read_memory` raises for a string that cannot be read goes through.
        """
        values = iter(arguments)
        output = []
        for piece in self._pieces:
            if isinstance(piece, bytes):
                output.append(piece)
                continue
            template, kind, bits = piece
            output.append(template % _convert(next(values), kind, bits, read_memory))
        return b"".join(output)


def _decode_escape(match: re.Match[bytes]) -> bytes:
    code = match[1]
    if code in _ESCAPES:
        return _ESCAPES[code]
    if code.isdigit():
        return bytes((int(code, 8) & 0xFF,))
    raise PrintfFormatError(f"unknown escape \\{code.decode('latin-1')}")


def _parse_conversion(match: re.Match[bytes]) -> tuple[bytes, bytes, int]:
    kind, width, precision = match["kind"], match["width"], match["precision"]
    if int(width or 0) > MAX_FIELD_CHARS or int(precision or 0) > MAX_FIELD_CHARS:
        raise PrintfFormatError("a field is too wide")
    shape = match["flags"] + width + (b"" if precision is None else b"." + precision)
    if kind == b"p":
        return b"%" + shape + b"s", kind, 32
    if kind == b"o" and b"#" in shape:
        # Python would write 0o where C has 0.
        return b"%" + shape.replace(b"#", b"") + b"s", b"#o", _BITS_OF_LENGTH[match["length"] or b""]
    # Python has no %u for bytes that differs from %d: the value is made unsigned before.
    return b"%" + shape + kind.replace(b"u", b"d").replace(b"i", b"d"), kind, _BITS_OF_LENGTH[match["length"] or b""]


def _convert(value: int, kind: bytes, bits: int, read_memory: ReadMemory) -> int | bytes:
    if kind == b"s":
        return _read_string(value, read_memory)
    if kind == b"c":
        return bytes((value & 0xFF,))
    value &= (1 << bits) - 1
    if kind == b"p":
        return b"%#x" % value
    if kind == b"#o":
        return b"0%o" % value if value else b"0"
    if kind in b"di" and value >> (bits - 1):
        return value - (1 << bits)
    return value


def _read_string(address: int, read_memory: ReadMemory) -> bytes:
    """Read up to a NUL, in pieces that cross no page, as the page behind may be unreadable."""
    text = b""
    while len(text) < MAX_STRING_BYTES:
        length = _STRING_PIECE_BYTES - (address + len(text)) % _STRING_PIECE_BYTES
        piece = read_memory(address + len(text), length)
        end = piece.find(b"\0")
        if end >= 0:
            return text + piece[:end]
        text += piece
    return text
