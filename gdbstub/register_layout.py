"""How register values travel: their order and sizes in `g` and `G`, and the target description in XML.

It must not know packets or what the registers mean.
"""

from collections.abc import Sequence

from gdbstub.fields import PacketError
from gdbstub.target import Description, Feature, Field, FlagsType, Register, StructType, TypeDefinition, UnionType
from gdbstub.xmltext import quote

_CORE_FEATURE = "org.gnu.gdb.i386.core"
# gdb rejects the whole description if one of these is missing from its feature, and the session is dead.
_CORE_REGISTERS = {
    *("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi", "eip", "eflags", "cs", "ss", "ds", "es", "fs", "gs"),
    *(f"st{number}" for number in range(8)),
    *("fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop"),
}


class RegisterLayout:
    """The layout that a description gives; it stays as it is for the whole session, as gdb requires."""

    def __init__(self, description: Description) -> None:
        """Lay out; ValueError if gdb's own feature lacks a register or an expedited one does not exist."""
        for feature in description.features:
            names = {register.name for register in feature.registers}
            if feature.name == _CORE_FEATURE and not names >= _CORE_REGISTERS:
                raise ValueError(f"{_CORE_FEATURE} lacks {', '.join(sorted(_CORE_REGISTERS - names))}")
        self.registers = description.registers
        numbers = {register.name: number for number, register in enumerate(self.registers)}
        if not {*description.expedited, description.pc} <= numbers.keys():
            raise ValueError("an expedited register does not exist")
        self.expedited = tuple(numbers[name] for name in description.expedited)
        self.pc = numbers[description.pc]
        self._sizes_bytes = tuple(register.bits // 8 for register in self.registers)
        self._unavailable = tuple("xx" * size_bytes for size_bytes in self._sizes_bytes)
        self.total_bytes = sum(self._sizes_bytes)
        self.target_xml = _target_xml(description).encode()

    def __len__(self) -> int:
        return len(self.registers)

    def encode(self, number: int, value: int | None) -> bytes:
        """Return one value as hex digits in guest byte order, `x` for each digit if it is not available."""
        if value is None:
            return self._unavailable[number].encode()
        return value.to_bytes(self._sizes_bytes[number], "little").hex().encode()

    def encode_all(self, values: Sequence[int | None]) -> bytes:
        """Return the reply to `g`."""
        columns = zip(values, self._sizes_bytes, self._unavailable, strict=True)
        digits = [
            unknown if value is None else value.to_bytes(size, "little").hex() for value, size, unknown in columns
        ]
        return "".join(digits).encode()

    def decode(self, number: int, digits: bytes) -> int:
        """Return the value of `P`; PacketError unless it has exactly the register's size."""
        size_bytes = self._sizes_bytes[number]
        try:
            data = bytes.fromhex(digits.decode("ascii"))
        except ValueError:
            raise PacketError(f"the value of {self.registers[number].name} is not hex") from None
        if len(digits) != 2 * size_bytes or len(data) != size_bytes:
            raise PacketError(f"{self.registers[number].name} has {8 * size_bytes} bits")
        return int.from_bytes(data, "little")

    def decode_all(self, digits: bytes) -> list[int | None]:
        """Return the values of `G`, None where the digits are `x`; PacketError unless the length is that of `g`."""
        if len(digits) != 2 * self.total_bytes:
            raise PacketError(f"G needs {2 * self.total_bytes} digits, not {len(digits)}")
        values: list[int | None] = []
        position = 0
        for number, size_bytes in enumerate(self._sizes_bytes):
            text = digits[position : position + 2 * size_bytes]
            position += 2 * size_bytes
            values.append(None if text == b"x" * len(text) else self.decode(number, text))
        return values


def _target_xml(description: Description) -> str:
    # No <architecture>: it would win over the user's `set architecture i8086`; gdb takes i386 from the core feature.
    features = "\n".join(_feature_xml(feature) for feature in description.features)
    return (
        '<?xml version="1.0"?>\n<!DOCTYPE target SYSTEM "gdb-target.dtd">\n'
        f'<target version="1.0">\n{features}\n</target>\n'
    )


def _feature_xml(feature: Feature) -> str:
    lines = [f"<feature name={quote(feature.name)}>"]
    lines += [_type_xml(definition) for definition in feature.types]
    lines += [_register_xml(register) for register in feature.registers]
    return "\n".join([*lines, "</feature>"])


def _register_xml(register: Register) -> str:
    group = "" if register.group is None else f" group={quote(register.group)}"
    save_restore = "" if register.save_restore else ' save-restore="no"'
    name, kind = quote(register.name), quote(register.type)
    return f'<reg name={name} bitsize="{register.bits}" type={kind}{group}{save_restore}/>'


def _type_xml(definition: TypeDefinition) -> str:
    name = quote(definition.id)
    if isinstance(definition, FlagsType | StructType):
        tag = "flags" if isinstance(definition, FlagsType) else "struct"
        fields = "".join(_field_xml(field) for field in definition.fields)
        return f'<{tag} id={name} size="{definition.size_bytes}">{fields}</{tag}>'
    if isinstance(definition, UnionType):
        members = "".join(f"<field name={quote(member)} type={quote(kind)}/>" for member, kind in definition.members)
        return f"<union id={name}>{members}</union>"
    return f'<vector id={name} type={quote(definition.element)} count="{definition.count}"/>'


def _field_xml(field: Field) -> str:
    kind = "" if field.type is None else f" type={quote(field.type)}"
    return f'<field name={quote(field.name)} start="{field.first_bit}" end="{field.last_bit}"{kind}/>'
