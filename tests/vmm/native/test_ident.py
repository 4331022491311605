"""IDENT translation read back: the host's instruction is the guest's, with ESP in R12 and memory in the window."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import pytest
from iced_x86 import Decoder, Instruction, Mnemonic, OpKind, Register

from tests.machine.instruction_cases import Case
from tests.vmm.streams import cases
from vmm.native.cache import TranslationCache
from vmm.native.ident import IDENT, prefix_count
from vmm.native.modes import Mode
from vmm.native.translator import translate

EIP = 0x1000
KERNEL = Mode(user=False)
_ESP_IS = {Register.ESP: Register.R12D, Register.SP: Register.R12W}
_HIGH = frozenset({Register.AH, Register.CH, Register.DH, Register.BH})
_STACK = frozenset({Register.ESP, Register.SP})
BY_NAME = {name: list(found) for name, found in groupby(cases(), lambda case: case.row.mnemonic) if name in IDENT}


@pytest.fixture(scope="module")
def tc() -> Iterator[TranslationCache]:
    made = TranslationCache()
    yield made
    made.close()


def host_code(tc: TranslationCache, code: bytes) -> bytes | None:
    """What stands for one guest instruction; None if it is a callout."""
    unit = translate(tc, KERNEL, EIP, code.ljust(32, b"\x90"))
    return unit.code[unit.hosts[0] : unit.hosts[1]] if unit.charged else None


def registers(instruction: Instruction) -> list[int]:
    named = [
        instruction.op_register(n) for n in range(instruction.op_count) if instruction.op_kind(n) == OpKind.REGISTER
    ]
    return [*named, instruction.memory_base, instruction.memory_index]


def assert_same(guest: Instruction, host: Instruction) -> None:
    """But for ESP and the window."""
    text = f"{guest} became {host}"
    assert not host.is_invalid, text
    assert host.mnemonic == guest.mnemonic, text
    assert host.op_count == guest.op_count, text
    assert not host.has_lock_prefix, text
    assert not host.has_rep_prefix, text
    assert not host.has_repne_prefix, text
    for n in range(guest.op_count):
        kind = guest.op_kind(n)
        assert host.op_kind(n) == kind, text
        if kind == OpKind.REGISTER:
            assert host.op_register(n) == _ESP_IS.get(guest.op_register(n), guest.op_register(n)), text
        elif kind == OpKind.MEMORY:
            assert_same_memory(guest, host)
        else:
            assert host.immediate(n) == guest.immediate(n), text


def assert_same_memory(guest: Instruction, host: Instruction) -> None:
    text = f"{guest} became {host}"
    if guest.mnemonic != Mnemonic.LEA:
        assert host.memory_segment == Register.GS, text
        assert host.memory_size == guest.memory_size, text
    for of_guest, of_host in (
        (guest.memory_base, host.memory_base),
        (guest.memory_index, host.memory_index),
    ):
        assert of_host == _ESP_IS.get(of_guest, of_guest), text
    if guest.memory_index:
        assert host.memory_index_scale == guest.memory_index_scale, text
    assert (host.memory_displacement - guest.memory_displacement) % (1 << 32) == 0, text
    if not guest.memory_base and not guest.memory_index:
        assert host.memory_displ_size == 4, text  # without 67h it would be sign-extended


@pytest.mark.parametrize("name", sorted(IDENT))
def test_every_encoding(name: str, tc: TranslationCache) -> None:
    emitted = 0
    for case in BY_NAME[name]:
        code = host_code(tc, case.code)
        if code is None:
            assert is_callout(case), str(case)
            continue
        emitted += 1
        if 0x82 in case.code[:2] or is_bit_string(case):
            continue  # the host raises SIGILL, and the interpreter does it; several instructions, see test_bt_memory
        decoded = list(Decoder(64, code))
        assert len(decoded) == 1, f"{case}: {code.hex(' ')}"
        assert_same(case.instruction, decoded[0])
    assert emitted


def is_callout(case: Case) -> bool:
    """What IDENT has to leave alone."""
    instruction = case.instruction
    used = registers(instruction)
    if _HIGH & {*used} and _STACK & {*used}:
        return True  # a REX prefix would make SPL of AH
    return is_bit_string(case)


def is_bit_string(case: Case) -> bool:
    """An index in a register, of a bit in memory, which may be far from the operand."""
    instruction = case.instruction
    is_bit_operation = instruction.mnemonic in (Mnemonic.BT, Mnemonic.BTS, Mnemonic.BTR, Mnemonic.BTC)
    return is_bit_operation and instruction.op0_kind == OpKind.MEMORY and instruction.op1_kind == OpKind.REGISTER


@pytest.mark.parametrize(
    ("guest", "host"),
    [
        ("01d8", "01d8"),
        ("89e5", "4489e5"),  # mov ebp, esp
        ("89ec", "4189ec"),
        ("0104e500100000", "65670104e500100000"),  # no base: the index alone
        ("010500100000", "656701042500100000"),  # without SIB it would be relative to RIP
        ("a100100000", "6567a100100000"),
        ("66a300100000", "656766a300100000"),
        ("8b0424", "6567418b0424"),
        ("8b4500", "65678b4500"),
        ("8b442410", "6567418b442410"),
        ("8b842410000000", "6567418b442410"),
        ("2e8b00", "65678b00"),  # CS is flat and readable
        ("368b00", "65678b00"),
        ("f00100", "65670100"),  # one vCPU
        ("66f0f00100", "6567660100"),
        ("40", "ffc0"),
        ("4c", "41ffcc"),
        ("664c", "6641ffcc"),
        ("94", "4194"),
        ("8d0424", "67418d0424"),
        ("8d05ffffffff", "678d0425ffffffff"),
        ("02642404", None),  # add ah, [esp+4]
        ("00e0", "00e0"),
        ("0fb6e4", None),  # movzx esp, ah
        ("0fb6e0", "440fb6e0"),
        ("0fcc", "410fcc"),
        ("660fcc", "66410fcc"),
        ("8b00", "65678b00"),
        ("678b00", "67448d0433450fb7c06567418b00"),  # 16-bit addresses
        ("d0e4", "d0e4"),
        ("c1642404ff", "656741c1642404ff"),
        ("6964240478563412", "6567456964240478563412"),  # imul esp, [esp+4], 12345678h
    ],
)
def test_bytes(guest: str, host: str | None, tc: TranslationCache) -> None:
    code = host_code(tc, bytes.fromhex(guest))
    assert (None if code is None else code.hex()) == host


def test_prefixes_are_counted() -> None:
    assert prefix_count(b"\x66\xf0\x2e\x01\xc0") == 3
    assert prefix_count(b"\x01\xc0") == 0
