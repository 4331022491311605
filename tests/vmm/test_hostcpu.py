"""Native execution of single instructions: registers, flags, both modes, signals, and what it refuses."""

from __future__ import annotations

import platform
import signal
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
from iced_x86 import Decoder, Formatter, FormatterSyntax, OpKind, Register

from machine.alu import build_alu
from machine.flags import AF, CF, DF, OF, PF, SF, STATUS_MASK, TF, ZF
from machine.undefined import AMD_ZEN5, PROFILES, SPOTS
from tests.oracles.host import require_host_alu
from vmm import hostalu, hostcpu
from vmm.hostalu import ENCODINGS, HostAlu, choose_alu
from vmm.hostcpu import BATCH_STATES, WORDS_PER_STATE, HostCpu, HostCpuError

NOP = b"\x90"
ADD_EAX_ECX = b"\x01\xc8"
AAA = b"\x37"


@pytest.fixture
def cpu() -> Iterator[HostCpu]:
    require_host_alu()
    with HostCpu() as opened:
        yield opened


def state(*registers: int, eflags: int = 0) -> array[int]:
    return array("I", (*registers, *[0] * (8 - len(registers)), eflags))


def test_runs_an_instruction_on_registers_and_flags(cpu: HostCpu) -> None:
    states = state(0x7FFF_FFFF, 1)
    cpu.run(ADD_EAX_ECX, states)
    assert states[0] == 0x8000_0000
    assert states[8] & STATUS_MASK == OF | SF | AF | PF


@pytest.mark.parametrize("legacy", [False, True])
def test_loads_and_stores_every_register_but_esp(cpu: HostCpu, legacy: bool) -> None:
    if legacy and not cpu.has_legacy_mode:
        pytest.skip("this kernel offers no 32-bit code segment")
    values = (0x1111_1111, 0x8222_2222, 0x3333_3333, 0x8444_4444, 0x55, 0x6666_6666, 0x8777_7777, 0x8888_8888)
    for eflags in (0, CF | ZF, STATUS_MASK):
        states = state(*values, eflags=eflags)
        cpu.run(NOP, states, legacy=legacy)
        assert tuple(states[:8]) == values
        assert states[8] & STATUS_MASK == eflags
    # Each register by itself: inc through ModRM reaches EAX to EBX and EBP to EDI.
    for register in (0, 1, 2, 3, 5, 6, 7):
        states = state(*values)
        cpu.run(bytes((0xFF, 0xC0 | register)), states, legacy=legacy)
        assert [new - old for new, old in zip(states, values, strict=False)] == [int(i == register) for i in range(8)]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("count", [1, 2, BATCH_STATES - 1, BATCH_STATES, BATCH_STATES + 1, 2 * BATCH_STATES + 7])
def test_batches_of_any_length(cpu: HostCpu, count: int, legacy: bool) -> None:
    if legacy and not cpu.has_legacy_mode:
        pytest.skip("this kernel offers no 32-bit code segment")
    states = array("I")
    for number in range(count):
        states.extend((number, 2 * number, 0, 0, 0, 0, 0, 0, 0))
    cpu.run(ADD_EAX_ECX, states, legacy=legacy)
    assert list(states[::WORDS_PER_STATE]) == [3 * number for number in range(count)]


@pytest.mark.parametrize("legacy", [False, True])
def test_only_status_flags_are_loaded(cpu: HostCpu, legacy: bool) -> None:
    if legacy and not cpu.has_legacy_mode:
        pytest.skip("this kernel offers no 32-bit code segment")
    states = state(eflags=0xFFFF_FFFF)
    cpu.run(NOP, states, legacy=legacy)
    assert states[8] & (STATUS_MASK | TF | DF) == STATUS_MASK
    assert states[8] >> 12 == 0


def test_decimal_instructions_run_in_the_32_bit_segment(cpu: HostCpu) -> None:
    if not cpu.has_legacy_mode:
        pytest.skip("this kernel offers no 32-bit code segment")
    states = state(0x000B)
    cpu.run(AAA, states, legacy=True)
    assert states[0] == 0x0101
    assert states[8] & (AF | CF) == AF | CF


def test_signals_may_arrive_in_the_32_bit_segment(cpu: HostCpu) -> None:
    if not cpu.has_legacy_mode:
        pytest.skip("this kernel offers no 32-bit code segment")
    ticks = 0

    def on_tick(_number: int, _frame: FrameType | None) -> None:
        nonlocal ticks
        ticks += 1

    fresh = array("I", [0xB, 1, 2, 3, 0, 5, 6, 7, 0] * BATCH_STATES)
    expected = fresh[:]
    cpu.run(AAA, expected, legacy=True)
    before = signal.signal(signal.SIGALRM, on_tick)
    signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
    try:
        for _ in range(2000):
            states = fresh[:]
            cpu.run(AAA, states, legacy=True)
            assert states == expected
            if ticks > 20:
                break
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert ticks > 20


def test_no_page_is_writable_and_executable(cpu: HostCpu) -> None:
    cpu.run(NOP, state())
    lines = Path("/proc/self/maps").read_text().splitlines()
    mine = {line.split()[1] for line in lines if "trapgate-hostcpu" in line}
    assert mine == {"r-xs", "rw-s"}


def test_the_code_area_is_used_again_when_full(cpu: HostCpu) -> None:
    for number in range(1500):
        states = state()
        cpu.run(b"\xb8" + number.to_bytes(4, "little"), states)  # mov eax, number
        assert states[0] == number
    states = state()
    cpu.run(b"\xb8\x00\x00\x00\x00", states)
    assert states[0] == 0


def test_refuses_what_is_no_state_or_no_probe(cpu: HostCpu) -> None:
    with pytest.raises(ValueError, match="whole states"):
        cpu.run(NOP, array("I", [0] * 8))
    with pytest.raises(ValueError, match="whole states"):
        cpu.run(NOP, array("H", [0] * 9))
    with pytest.raises(ValueError, match="more than one probe"):
        cpu.run(NOP * 65, state())


def test_closing_unmaps_and_may_be_repeated() -> None:
    require_host_alu()
    before = Path("/proc/self/maps").read_text().count("trapgate-hostcpu")
    cpu = HostCpu()
    assert Path("/proc/self/maps").read_text().count("trapgate-hostcpu") == before + 2
    cpu.close()
    cpu.close()
    assert Path("/proc/self/maps").read_text().count("trapgate-hostcpu") == before
    with pytest.raises(ValueError, match="closed"):
        cpu.run(NOP, state())


def test_says_so_on_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(hostalu, "_measured_alu", hostalu._measured_alu.__wrapped__)
    with pytest.raises(HostCpuError, match="x86-64 Linux, not aarch64"):
        HostCpu()
    alu = choose_alu()
    assert alu.profile.rules == AMD_ZEN5.rules
    assert alu.profile.unprobed == tuple(SPOTS)


def test_says_so_on_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(HostCpuError, match="darwin"):
        HostCpu()


def test_without_a_32_bit_segment_only_its_instructions_are_refused(cpu: HostCpu) -> None:
    cpu.has_legacy_mode = False
    host = HostAlu(cpu)
    assert not host.can_run("daa", 16)
    assert host.can_run("add", 16)
    with pytest.raises(HostCpuError, match="IA32 emulation"):
        host.results("daa", 16, [(0, 0, 0, 0)])
    assert host.results("add", 16, [(2, 3, 0, 0)])[0][0] == 5


@pytest.mark.parametrize(
    ("operation", "width", "a", "b"),
    [
        ("div", 8, 1, 0), ("div", 32, 1 << 32, 1), ("idiv", 16, 0x8000, 1), ("idiv", 32, 0x8000_0000, 1),
        ("idiv", 8, 0xFF7F, 1), ("div", 16, 7, 0x10000), ("aam", 16, 7, 0),
    ],
)  # fmt: skip
def test_never_executes_a_divide_that_would_fault(operation: str, width: int, a: int, b: int) -> None:
    with pytest.raises(ValueError, match="#DE"):
        require_host_alu().results(operation, width, [(4, 2, 0, 0), (a, b, 0, 0)])


def test_unknown_operations_are_a_key_error() -> None:
    host = require_host_alu()
    assert not host.can_run("fadd", 32)
    with pytest.raises(KeyError):
        host.results("fadd", 32, [])


def test_immediates_are_part_of_the_code() -> None:
    host = require_host_alu()
    assert [result for result, _ in host.results("imul3", 32, [(3, 5, 0, 0), (3, 7, 0, 0), (3, 7, 0, CF)])] == [
        15,
        21,
        21,
    ]


def test_every_encoding_is_the_operation_it_claims_to_be() -> None:
    other_names = {"imul2": "imul", "imul3": "imul", "sal": "shl"}
    for (operation, width), encoding in ENCODINGS.items():
        decoder = Decoder(32, encoding.code_for(10))
        formatter = Formatter(FormatterSyntax.INTEL)
        texts = [formatter.format_mnemonic(instruction) for instruction in decoder]
        assert other_names.get(operation, operation) in texts, (operation, width)
        if operation != "cmpxchg8b":
            assert len(texts) == 1


def test_routines_touch_only_their_states_and_stacks() -> None:
    """Disassemble both routines: every explicit memory operand is based on R15, RIP, EBP, ESP or is the saved RSP."""
    low = 0x4000_0000
    long_mode = hostcpu._long_mode_loop(NOP)
    legacy = hostcpu._legacy_loop(NOP, 0x4100_0000, low, 0x33)
    legacy_start = legacy.index(b"\x8b\x2c\x24")
    legacy_end = legacy.index(b"\xea", legacy_start) + 7
    parts = [
        (64, long_mode, {Register.R15}),
        (64, legacy[: legacy_start - 6], {Register.NONE, Register.RIP}),
        (32, legacy[legacy_start:legacy_end], {Register.EBP, Register.ESP}),
        (64, legacy[legacy_end:], {Register.NONE}),
    ]
    for bits, code, bases in parts:
        for instruction in Decoder(bits, code):
            assert not instruction.is_invalid
            if all(instruction.op_kind(i) != OpKind.MEMORY for i in range(instruction.op_count)):
                continue
            assert instruction.memory_base in bases, instruction
            if instruction.memory_base == Register.NONE:
                assert instruction.memory_displacement == low + hostcpu._SAVED_RSP_OFFSET


def test_models_are_chosen_by_name() -> None:
    assert choose_alu("intel-p6").profile is PROFILES["intel-p6"]
    with pytest.raises(KeyError):
        choose_alu("8086")
    require_host_alu()
    measured = choose_alu()
    assert set(measured.profile.rules) == set(build_alu().profile.rules)


def test_the_host_is_measured_once_and_leaves_nothing_mapped() -> None:
    require_host_alu()
    hostalu._measured_alu.cache_clear()
    before = Path("/proc/self/maps").read_text().count("trapgate-hostcpu")
    measured = choose_alu()
    assert choose_alu() is measured
    kept = Path("/proc/self/maps").read_text().count("trapgate-hostcpu") - before
    assert bool(kept) == bool(measured.profile.host_operations)
