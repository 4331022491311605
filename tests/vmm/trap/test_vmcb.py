"""The control block against the manual's numbers, its values both ways, and the world switch with any state."""

from __future__ import annotations

import struct
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from machine.state import ESP, SHADOW_MOV_SS, SHADOW_NONE, SHADOW_STI, CpuState, SegmentRegister
from vmm.trap import exitcodes
from vmm.trap.exitcodes import ExitCode
from vmm.trap.exitinfo import (
    Event,
    EventType,
    IoInfo,
    NestedPageFaultInfo,
    PageFaultInfo,
    RegisterAccessInfo,
    TaskSwitchCause,
    TaskSwitchInfo,
)
from vmm.trap.intercepts import Intercept3, Intercept4, Intercept5, names_of
from vmm.trap.permissions import IoPermissions, MsrPermissions
from vmm.trap.vmcb import PLACES, SEGMENT_NAMES, VMCB_BYTES, VMCB_LAYOUT, Field, Vmcb, offset_of
from vmm.trap.vmcbstate import invalid_because, load_state, store_state
from vmm.trap.vmcbtext import describe, describe_exit

# Offsets as appendix B gives them: in the control area, and in the save area that begins at 400h.
CONTROL = {
    "intercept_cr": 0x000, "intercept_dr": 0x004, "intercept_exceptions": 0x008, "intercept3": 0x00C,
    "intercept4": 0x010, "intercept5": 0x014, "pause_filter_threshold": 0x03C, "pause_filter_count": 0x03E,
    "iopm_base_pa": 0x040, "msrpm_base_pa": 0x048, "tsc_offset": 0x050, "guest_asid": 0x058, "tlb_control": 0x05C,
    "v_intr": 0x060, "interrupt_state": 0x068, "exitcode": 0x070, "exitinfo1": 0x078, "exitinfo2": 0x080,
    "exitintinfo": 0x088, "np_control": 0x090, "avic_apic_bar": 0x098, "ghcb_pa": 0x0A0, "eventinj": 0x0A8,
    "n_cr3": 0x0B0, "lbr_control": 0x0B8, "clean_bits": 0x0C0, "nrip": 0x0C8, "fetched_bytes": 0x0D0,
    "instruction_bytes": 0x0D1, "avic_backing_page": 0x0E0, "avic_logical_table": 0x0F0,
    "avic_physical_table": 0x0F8, "vmsa_pa": 0x108,
}  # fmt: skip
SAVE = {
    "es": 0x000, "cs": 0x010, "ss": 0x020, "ds": 0x030, "fs": 0x040, "gs": 0x050, "gdtr": 0x060, "ldtr": 0x070,
    "idtr": 0x080, "tr": 0x090, "cpl": 0x0CB, "efer": 0x0D0, "cr4": 0x148, "cr3": 0x150, "cr0": 0x158, "dr7": 0x160,
    "dr6": 0x168, "rflags": 0x170, "rip": 0x178, "rsp": 0x1D8, "s_cet": 0x1E0, "ssp": 0x1E8, "isst_addr": 0x1F0,
    "rax": 0x1F8, "star": 0x200, "lstar": 0x208, "cstar": 0x210, "sfmask": 0x218, "kernel_gs_base": 0x220,
    "sysenter_cs": 0x228, "sysenter_esp": 0x230, "sysenter_eip": 0x238, "cr2": 0x240, "g_pat": 0x268,
    "dbgctl": 0x270, "br_from": 0x278, "br_to": 0x280, "last_excp_from": 0x288, "last_excp_to": 0x290,
}  # fmt: skip
ATTRIBUTES = sorted(name for name, value in vars(Vmcb).items() if isinstance(value, Field))

words = st.integers(0, 0xFFFF_FFFF)


class TestLayout:
    def test_offsets_of_the_manual(self) -> None:
        expected = CONTROL | {name: 0x400 + at for name, at in SAVE.items()}
        assert {name: at for name, (at, _) in PLACES.items() if "." not in name} == expected
        assert VMCB_LAYOUT.sizeof() == VMCB_BYTES == 4096

    def test_parts_of_a_segment(self) -> None:
        assert [PLACES[f"tr.{part}"] for part in ("selector", "attributes", "limit", "base")] == [
            (0x490, 2), (0x492, 2), (0x494, 4), (0x498, 8),
        ]  # fmt: skip

    @pytest.mark.parametrize("name", ATTRIBUTES)
    def test_attributes_agree_with_construct(self, name: str) -> None:
        block = Vmcb()
        at, size = PLACES[name]
        value = 0x8182_8384_8586_8788 & ((1 << 8 * size) - 1)
        setattr(block, name, value)
        assert bytes(block.page) == bytes(at) + value.to_bytes(size, "little") + bytes(4096 - at - size)
        assert getattr(block, name) == value
        parsed = VMCB_LAYOUT.parse(bytes(block.page))
        assert (parsed.save if at >= 0x400 else parsed.control)[name] == value
        assert (block.reads, block.writes) == (1, 1)

    def test_values_that_do_not_fit_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r".*"):
            Vmcb().cpl = 256

    def test_segments(self) -> None:
        block = Vmcb()
        for number, name in enumerate(SEGMENT_NAMES):
            block.set_segment(name, number, 0x1000 * number, 0xFFFF_FFFF - number, 0xC9B)
        assert [block.segment(name) for name in SEGMENT_NAMES] == [
            (number, 0x1000 * number, 0xFFFF_FFFF - number, 0xC9B) for number in range(10)
        ]
        assert struct.unpack_from("<HHIQ", block.page, 0x410) == (1, 0xC9B, 0xFFFF_FFFE, 0x1000)

    def test_instruction_bytes(self) -> None:
        block = Vmcb()
        block.set_instruction_bytes(b"\x0f\xa2")
        assert bytes(block.page)[0xD0:0xE0] == b"\x02\x0f\xa2" + bytes(13)
        assert block.instruction_bytes == b"\x0f\xa2"
        with pytest.raises(ValueError, match="at most 15"):
            block.set_instruction_bytes(bytes(16))

    def test_clear(self) -> None:
        block = Vmcb()
        block.rip = 5
        block.clear()
        assert not any(bytes(block.page))


class TestCodes:
    @pytest.mark.parametrize(
        ("name", "number"),
        [
            ("CR0_READ", 0), ("CR4_WRITE", 0x14), ("CR15_WRITE", 0x1F), ("DR0_READ", 0x20), ("DR7_WRITE", 0x37),
            ("EXCP_PF", 0x4E), ("EXCP_SX", 0x5E), ("VINTR", 0x64), ("IDTR_READ", 0x66), ("TR_WRITE", 0x6D),
            ("RDTSC", 0x6E), ("SWINT", 0x75), ("HLT", 0x78), ("IOIO", 0x7B), ("SHUTDOWN", 0x7F), ("VMRUN", 0x80),
            ("WBINVD", 0x89), ("XSETBV", 0x8D), ("CR0_WRITE_TRAP", 0x90), ("CR15_WRITE_TRAP", 0x9F),
            ("INVLPGB", 0xA0), ("IDLE_HLT", 0xA6), ("NPF", 0x400), ("VMGEXIT", 0x403),
            ("INVALID", (1 << 64) - 1), ("BUSY", (1 << 64) - 2), ("IDLE_REQUIRED", (1 << 64) - 3),
        ],
    )  # fmt: skip
    def test_numbers_of_the_manual(self, name: str, number: int) -> None:
        assert ExitCode[name].value == number

    def test_exceptions(self) -> None:
        assert exitcodes.exception_code(13) is ExitCode.EXCP_GP
        assert exitcodes.exception_vector(ExitCode.EXCP_AC) == 17
        assert exitcodes.exception_vector(ExitCode.INTR) is None
        with pytest.raises(ValueError, match="32"):
            exitcodes.exception_code(32)

    def test_every_code_has_words(self) -> None:
        texts = {exitcodes.name_of(code): exitcodes.describe(code) for code in ExitCode}
        assert all(texts.values())
        assert texts["VMEXIT_CR3_WRITE"] == "a write of CR3"
        assert texts["VMEXIT_CPUID"] == "the instruction CPUID"
        assert exitcodes.name_of(0x300) == "VMEXIT 0x300"

    def test_intercepts_and_codes_run_in_parallel(self) -> None:
        """Bit n of the third vector exits with 60h + n, of the fourth with 80h + n, as the manual orders them."""
        renamed = {"IOIO_PROT": "IOIO", "MSR_PROT": "MSR"}
        for kind, first in ((Intercept3, 0x60), (Intercept4, 0x80), (Intercept5, 0xA0)):
            for name, bit in kind.__members__.items():
                assert ExitCode[renamed.get(name, name)] == first + bit.bit_length() - 1

    def test_names_of_intercepts(self) -> None:
        names = names_of(1 << 3 | 1 << 16, 1 << 23, 1 << 14, Intercept3.HLT, 1 | 1 << 20, 1 << 31)
        assert names == ["CR3_READ", "CR0_WRITE", "DR7_WRITE", "EXCP14", "HLT", "VMRUN", "Intercept5.bit31",
            "CR4_WRITE_TRAP"]  # fmt: skip


io_infos = st.builds(
    IoInfo,
    port=st.integers(0, 0xFFFF),
    size_bytes=st.sampled_from((1, 2, 4)),
    is_in=st.booleans(),
    string=st.booleans(),
    rep=st.booleans(),
    address_bits=st.sampled_from((16, 32, 64)),
    segment=st.sampled_from(SegmentRegister),
    next_eip=words,
)
task_infos = st.builds(
    TaskSwitchInfo,
    selector=st.integers(0, 0xFFFF),
    cause=st.sampled_from(TaskSwitchCause),
    error_code=st.none() | words,
    rf=st.booleans(),
)
events = st.builds(
    Event, vector=st.integers(0, 255), type=st.sampled_from(EventType), error_code=st.none() | words
)  # fmt: skip


class TestInfo:
    @given(io_infos)
    def test_io_both_ways(self, info: IoInfo) -> None:
        assert IoInfo.decode(*info.encode()) == info

    def test_io_bits_of_the_manual(self) -> None:
        info = IoInfo(0x1F0, 2, is_in=True, string=True, rep=True, address_bits=16, segment=SegmentRegister.DS)
        assert info.encode()[0] == 0x1F0 << 16 | 3 << 10 | 1 << 7 | 1 << 5 | 1 << 3 | 1 << 2 | 1
        assert IoInfo(0x80, 4, is_in=False).encode()[0] == 0x80 << 16 | 1 << 8 | 1 << 6

    def test_io_without_a_size(self) -> None:
        with pytest.raises(ValueError, match="no size"):
            IoInfo.decode(0x80 << 16, 0)

    @given(words, words)
    def test_page_fault_both_ways(self, code: int, linear: int) -> None:
        info = PageFaultInfo(code, linear)
        assert info.encode() == (code, linear)
        assert PageFaultInfo.decode(*info.encode()) == info

    @given(words, st.integers(0, (1 << 52) - 1), st.booleans())
    def test_nested_page_fault_both_ways(self, code: int, physical: int, in_table: bool) -> None:
        info = NestedPageFaultInfo(code, physical, in_table)
        assert info.encode()[0] >> 32 == (2 if in_table else 1)
        assert NestedPageFaultInfo.decode(*info.encode()) == info

    @given(task_infos)
    def test_task_switch_both_ways(self, info: TaskSwitchInfo) -> None:
        assert TaskSwitchInfo.decode(*info.encode()) == info

    def test_task_switch_bits_of_the_manual(self) -> None:
        info = TaskSwitchInfo(0x28, TaskSwitchCause.IRET, 5, rf=True)
        assert info.encode() == (0x28, 1 << 48 | 1 << 44 | 1 << 36 | 5)
        assert TaskSwitchInfo(0x28, TaskSwitchCause.JUMP).encode()[1] == 1 << 38
        with pytest.raises(ValueError, match=r".*"):
            TaskSwitchInfo.decode(0, 1 << 36 | 1 << 38)

    def test_register_accesses(self) -> None:
        assert RegisterAccessInfo(5).encode() == (1 << 63 | 5, 0)
        assert RegisterAccessInfo(5, control=False).encode() == (5, 0)
        assert RegisterAccessInfo(None).encode() == (0, 0)
        assert RegisterAccessInfo.decode_control(1 << 63 | 7) == RegisterAccessInfo(7)
        assert RegisterAccessInfo.decode_control(0) == RegisterAccessInfo(None)
        assert RegisterAccessInfo.decode_debug(7) == RegisterAccessInfo(7, control=False)

    @given(events)
    def test_events_both_ways(self, event: Event) -> None:
        assert Event.decode(event.encode()) == event

    def test_event_bits_of_the_manual(self) -> None:
        assert Event(14, EventType.EXCEPTION, 2).encode() == 2 << 32 | 1 << 31 | 1 << 11 | 3 << 8 | 14
        assert Event(0x20, EventType.INTR).encode() == 1 << 31 | 0x20
        assert Event.decode(0x7FF) is None
        with pytest.raises(ValueError, match=r".*"):
            Event.decode(1 << 31 | 1 << 8)


class TestPermissions:
    def test_ports(self) -> None:
        io = IoPermissions()
        io.set(0x3F8, 0x3FF, intercept=True)
        io.set(0x3FB, 0x3FB, intercept=False)
        assert list(io.ranges()) == [(0x3F8, 0x3FA), (0x3FC, 0x3FF)]
        assert io.map[0x7F] == 0b1111_0111
        assert not io.intercepts(0x3FB, 1)
        assert io.intercepts(0x3FB, 2)
        assert io.intercepts(0x3F5, 4)
        assert not io.intercepts(0x3F4, 4)

    def test_an_access_over_the_last_port(self) -> None:
        io = IoPermissions()
        assert not io.intercepts(0xFFFF, 4)
        io.set(0x1_0000, 0x1_0000, intercept=True)
        assert io.intercepts(0xFFFF, 2)
        assert not io.intercepts(0xFFFF, 1)
        assert list(IoPermissions(intercept_all=True).ranges()) == [(0, 0xFFFF)]
        with pytest.raises(ValueError, match="range"):
            io.set(5, 4, intercept=True)

    @pytest.mark.parametrize(
        ("msr", "at", "shift"),
        [(0x174, 0x5D, 0), (0x1FFF, 0x7FF, 6), (0xC000_0080, 0x820, 0), (0xC001_0001, 0x1000, 2)],
    )
    def test_registers(self, msr: int, at: int, shift: int) -> None:
        permissions = MsrPermissions()
        permissions.set(msr, read=False, write=True)
        assert permissions.map[at] == 2 << shift
        assert permissions.intercepts(msr, write=True)
        assert not permissions.intercepts(msr, write=False)
        permissions.set(msr, read=True, write=False)
        assert permissions.map[at] == 1 << shift
        assert sum(permissions.map) == 1 << shift

    def test_registers_that_have_no_bits(self) -> None:
        permissions = MsrPermissions()
        assert permissions.intercepts(0x2000, write=False)
        assert not permissions.intercepts(0x10, write=False)
        with pytest.raises(ValueError, match="always"):
            permissions.set(0xC000_2000, read=False, write=False)


@st.composite
def states(draw: st.DrawFn) -> CpuState:
    state = CpuState()

    def draw_word() -> int:
        return draw(words)

    state.gpr[:] = [draw_word() for _ in range(8)]
    for segment in (*state.segments, state.ldtr, state.tr):
        segment.load(draw_word() & 0xFFFF, draw_word(), draw_word(), draw_word() & 0xFFF)
    for table in (state.gdtr, state.idtr):
        table.base, table.limit = draw_word(), draw_word() & 0xFFFF
    for name in ("eip", "eflags", "cr0", "cr2", "cr3", "cr4", "sysenter_cs", "sysenter_esp", "sysenter_eip"):
        setattr(state, name, draw_word())
    state.dr[:] = [draw_word() for _ in range(8)]
    state.cpl = draw(st.integers(0, 3))
    state.shadow = draw(st.sampled_from((SHADOW_NONE, SHADOW_STI)))
    state.tsc_offset = draw(st.integers(0, (1 << 64) - 1))
    return state


class TestWorldSwitch:
    @given(states())
    def test_what_is_stored_is_loaded(self, state: CpuState) -> None:
        block = Vmcb()
        store_state(block, state)
        other = CpuState()
        load_state(block, other)
        # What the block has no room for.
        esp, eax = other.gpr[ESP], other.gpr[0]
        other.gpr[:] = state.gpr
        other.gpr[ESP], other.gpr[0] = esp, eax
        other.dr[:6] = state.dr[:6]
        assert other.pack() == state.pack()
        assert [segment.write_high for segment in other.segments] == [segment.write_high for segment in state.segments]
        assert (block.reads, block.writes) == (0, 0)

    @given(states())
    def test_fields_where_the_manual_has_them(self, state: CpuState) -> None:
        block = Vmcb()
        store_state(block, state)
        save = VMCB_LAYOUT.parse(bytes(block.page)).save
        for name, segment in zip(("es", "cs", "ss", "ds", "fs", "gs"), state.segments, strict=True):
            part = save[name]
            assert (part.selector, part.base, part.limit, part.attributes) == segment.fields
        assert (save.tr.selector, save.ldtr.base) == (state.tr.selector, state.ldtr.base)
        assert (save.gdtr.base, save.idtr.limit) == (state.gdtr.base, state.idtr.limit)
        assert (save.rip, save.rsp, save.rax, save.rflags) == (state.eip, state.gpr[ESP], state.gpr[0], state.eflags)
        assert (save.cr0, save.cr2, save.cr3, save.cr4) == (state.cr0, state.cr2, state.cr3, state.cr4)
        assert (save.dr6, save.dr7, save.cpl) == (state.dr[6], state.dr[7], state.cpl)
        assert (save.sysenter_cs, save.sysenter_esp, save.sysenter_eip) == (
            state.sysenter_cs, state.sysenter_esp, state.sysenter_eip,
        )  # fmt: skip
        assert block.tsc_offset == state.tsc_offset

    def test_the_shadow_of_mov_ss_survives_in_the_state(self) -> None:
        block, state = Vmcb(), CpuState()
        state.shadow = SHADOW_MOV_SS
        store_state(block, state)
        assert block.interrupt_state == 1
        load_state(block, state)
        assert state.shadow == SHADOW_MOV_SS
        block.interrupt_state = 2
        load_state(block, state)
        assert state.shadow == SHADOW_NONE
        store_state(block, state)
        assert block.interrupt_state == 2

    def test_what_vmrun_refuses(self) -> None:
        block = Vmcb()
        store_state(block, CpuState())
        assert invalid_because(block) == "VMRUN is not intercepted"
        block.intercept4 = Intercept4.VMRUN
        assert invalid_because(block) == "the ASID is 0, the host's own"
        block.guest_asid = 1
        assert invalid_because(block) is None
        for name, value, word in (
            ("efer", 0, "SVME"),
            ("cr0", 1 << 29, "NW"),
            ("cr4", 1 << 32, "CR4"),
            ("dr7", 1 << 32, "DR7"),
            ("eventinj", 1 << 31 | 5 << 8, "EVENTINJ"),
        ):
            kept = getattr(block, name)
            setattr(block, name, value)
            assert word in (invalid_because(block) or "")
            setattr(block, name, kept)


class TestText:
    def test_exits(self) -> None:
        info = IoInfo(0x3F8, 1, is_in=False, next_eip=0x1234)
        assert describe_exit(ExitCode.IOIO, *info.encode()).endswith(
            "; OUT of 1 bytes at port 0x03f8, next instruction at 00001234"
        )
        assert describe_exit(ExitCode.EXCP_PF, 6, 0xC000_0000) == (
            "VMEXIT_EXCP_PF: exception 14; not present, write, user (0x6) at linear c0000000"
        )
        nested = NestedPageFaultInfo(5, 0x1000, in_table=True)
        assert "protection, read, user (0x5) at guest-physical 0x00001000, a page table" in describe_exit(
            ExitCode.NPF, *nested.encode()
        )
        assert describe_exit(ExitCode.HLT, 0, 0) == "VMEXIT_HLT: the instruction HLT"
        assert describe_exit(ExitCode.CR0_WRITE, 0, 0).endswith("by CLTS, LMSW or SMSW")
        assert describe_exit(ExitCode.CR3_WRITE, 1 << 63 | 2, 0).endswith("by MOV with GPR 2")
        assert describe_exit(ExitCode.DR7_WRITE, 3, 0).endswith("by MOV with GPR 3")
        assert describe_exit(ExitCode.EXCP_GP, 0x18, 0).endswith("error code 0x18")
        assert describe_exit(ExitCode.MSR, 1, 0).endswith("WRMSR")
        assert describe_exit(ExitCode.SWINT, 0x80, 0).endswith("vector 0x80")
        assert "IRET, error code 0x7, RF" in describe_exit(
            ExitCode.TASK_SWITCH, *TaskSwitchInfo(0x30, TaskSwitchCause.IRET, 7, rf=True).encode()
        ).replace("iret", "IRET")
        assert "not decoded" in describe_exit(ExitCode.IOIO, 0, 0)

    def test_whole_block(self) -> None:
        block, state = Vmcb(), CpuState()
        store_state(block, state)
        block.intercept3 = Intercept3.HLT | Intercept3.IOIO_PROT
        block.intercept_cr = 1 << 16
        block.exitcode = ExitCode.HLT
        block.eventinj = Event(14, EventType.EXCEPTION, 2).encode()
        block.v_intr = 1 << 8 | 0x20 << 32 | 3 << 16
        block.np_control = 1
        block.n_cr3 = 0x5000
        block.tlb_control = 3
        counts = block.reads, block.writes
        text = describe(block)
        assert (block.reads, block.writes) == counts
        for line in (
            "exitcode     VMEXIT_HLT: the instruction HLT",
            "eventinj     exception 0x0e, error code 0x2",
            "exitintinfo  -",
            "intercepts   CR0_WRITE HLT IOIO_PROT",
            "paging       nested  n_cr3 0000000000005000",
            "asid         0  tlb_control 3 (flush this guest's)",
            "v_intr       vector 0x20  priority 3  V_TPR 0x00  V_IRQ",
            "cs           f000  base ffff0000  limit 0000ffff  attrib 093",
            "rip          0000fff0  rsp 00000000  rax 00000000  cpl 0",
        ):
            assert line in text.splitlines()
        assert max(map(len, text.splitlines())) <= 100

    def test_many_intercepts_are_wrapped(self) -> None:
        block = Vmcb()
        block.intercept3 = block.intercept_exceptions = 0xFFFF_FFFF
        lines = describe(block).splitlines()
        assert max(map(len, lines)) <= 100
        assert "SHUTDOWN" in " ".join(lines)

    def test_every_exit_prints(self) -> None:
        for code in ExitCode:
            assert exitcodes.name_of(code) in describe_exit(code, 0, 0)


def test_no_field_of_the_layout_lacks_an_offset() -> None:
    assert all(offset_of(name) == PLACES[name][0] for name in PLACES)
    assert {field.name for field in fields(IoInfo)} >= {"port", "next_eip"}
