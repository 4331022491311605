from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gdbstub.guest import GuestTarget
from gdbstub.monitor import COMMANDS, find
from gdbstub.target import (
    Breakpoint,
    BreakpointKind,
    QuitRequested,
    Resume,
    ResumeMode,
    StintEnd,
    StopReason,
    TargetError,
    Verdict,
)
from guests import images
from machine.loaders.image import LoadOptions
from machine.pc import Machine, MachineOptions
from tests.gdbstub.pc import CODE, JMP_SELF, NOP, go, guest, register, say, write
from vmm.interp import Interpreter

# LTR and the first ring 3 tasks are behind it, and it is before the shell's first prompt.
DEMO_INSNS = 110_000


@pytest.fixture(scope="module")
def demo() -> Iterator[GuestTarget]:
    """The demo kernel in mid-flight; tests only look."""
    loading = LoadOptions(command_line="quiet")
    machine = Machine(
        MachineOptions(image=images.path("demo"), loading=loading),
        {"interp": lambda pc: Interpreter(pc.cpu, pc.debug)},
        "interp",
    )
    target = GuestTarget(machine)
    target.attach()
    say(target, f"until-icount {DEMO_INSNS}")
    go(target, budget=DEMO_INSNS, stints=1000)
    yield target
    machine.close()


class TestFindingCommands:
    @pytest.mark.parametrize("command", COMMANDS, ids=lambda command: str(command.name))
    def test_every_command_has_help(self, demo: GuestTarget, command: object) -> None:
        name = command.name  # type: ignore[attr-defined]
        text = say(demo, f"help {name}")
        assert text.startswith(f"monitor {name}")
        assert text.endswith(".\n")

    def test_help_lists_everything(self, demo: GuestTarget) -> None:
        text = say(demo, "help")
        assert all(command.synopsis in text for command in COMMANDS)

    def test_names_are_unique(self) -> None:
        names = [command.name for command in COMMANDS]
        assert len(set(names)) == len(names)

    @pytest.mark.parametrize(
        ("line", "name"),
        [
            ("i reg", "info registers"),
            ("info icount", "info icount"),
            ("inf g", "info gdt"),
            ("reset", "reset"),
            ("scr", "screen"),
            ("step-i", "step-interrupts"),
            ("xp/8xw 0", "xp"),
            ("HELP", "help"),
        ],
    )
    def test_short_forms(self, line: str, name: str) -> None:
        assert find(line.split())[0].name == name

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("frobnicate", "no command `frobnicate`"),
            ("info frobnicate", "topics: .*gdt"),
            ("info", "needs a topic"),
            ("s", "may mean"),
            ("info gdt 5", "takes no arguments"),
            ("help frobnicate", "no command"),
            ("page", "help page"),
            ("xp", "help xp"),
        ],
    )
    def test_refusals_are_sentences(self, demo: GuestTarget, line: str, message: str) -> None:
        with pytest.raises(TargetError, match=message) as refusal:
            say(demo, line)
        text = str(refusal.value)
        assert text[0].isupper() or text[0] == "`"
        assert text.endswith(".")

    def test_read_only_clients_may_look_but_not_touch(self, demo: GuestTarget) -> None:
        for line in ("info registers", "info mem", "vmm", "memory", "until-icount", "catch", "help"):
            assert say(demo, line, read_only=True)
        for line in ("reset", "quit", "break 0", "memory physical", "type x", "vmm interp", "catch pf", "delete"):
            with pytest.raises(TargetError, match="only look"):
                say(demo, line, read_only=True)


class TestNumbers:
    @pytest.mark.parametrize(
        ("text", "value"),
        [("16", 16), ("0x10", 16), ("0X1f+1", 32), ("$esp-4", -4), ("$pc", 0), ("4-8", -4), ("0", 0)],
    )
    def test_sums(self, text: str, value: int) -> None:
        with guest(NOP) as target:
            write(target, "esp", 0x1000)
            base = {"$esp-4": 0x1000, "$pc": CODE, "4-8": 1 << 32}.get(text, 0)
            assert f"physical {base + value:#010x}" in say(target, f"page {text}")

    @pytest.mark.parametrize(
        "text",
        ["zork", "010", "0x", "$nosuch", "$st0", "1+", "5 5", "0x100000000", "1x", "0x" + 17 * "f", 5000 * "9"],
        ids=lambda text: str(text)[:20],
    )
    def test_nonsense(self, text: str) -> None:
        with guest(NOP) as target, pytest.raises(TargetError):
            say(target, f"page {text}")


class TestSystemState:
    def test_registers(self, demo: GuestTarget) -> None:
        text = say(demo, "info registers")
        assert f"icount {DEMO_INSNS}" in text
        assert re.search(r"^cr0 80010015  PE EM ET WP PG$", text, re.MULTILINE)
        assert "TSS32 busy" in text
        assert f"eip {register(demo, 'eip'):08x}" in text

    def test_gdt(self, demo: GuestTarget) -> None:
        lines = say(demo, "info gdt").splitlines()
        assert lines[0] == f"GDT at linear {register(demo, 'gdtr_base'):#010x}, limit 0x0037"
        assert "  0008  base 00000000, limit ffffffff, code32 readable accessed, DPL 0" in lines
        assert any("0028" in line and "TSS32 busy" in line for line in lines)

    def test_ldt(self, demo: GuestTarget) -> None:
        assert "no LDT" in say(demo, "info ldt")
        with guest(NOP) as target:
            ldt = 0x20_0000
            target.machine.memory.write(ldt + 8, bytes.fromhex("ffff000000f2cf00"))
            target.machine.cpu.state.ldtr.load(0x18, ldt, 15, 0x82)
            text = say(target, "info ldt")
            assert "  000c  base 00000000, limit ffffffff, data32 writable, DPL 3" in text
            assert "1 that are zero" in text

    def test_idt_of_protected_mode(self, demo: GuestTarget) -> None:
        text = say(demo, "info idt")
        assert re.search(r"^  08 #DF  TSS 0030, task gate, DPL 0$", text, re.MULTILINE)
        assert re.search(r"^  80      0008:c01\w+, interrupt gate32, DPL 3$", text, re.MULTILINE)
        assert re.search(r"^  0e #PF  0008:c01\w+, interrupt gate32", text, re.MULTILINE)
        one = say(demo, "info idt 0x80").splitlines()
        assert len(one) == 2
        with pytest.raises(TargetError, match="limit"):
            say(demo, "info idt 256")

    def test_idt_of_real_mode_has_far_pointers(self) -> None:
        with guest(NOP, bits=16, at=0x7C00) as target:
            text = say(target, "info idt")
            assert re.search(r"^  10 #MF  f000:\w{4}$", text, re.MULTILINE)
            assert "more like this" in text

    def test_tables_on_unmapped_pages(self) -> None:
        with guest(NOP) as target:
            write(target, "gdtr_base", 0xD000_0000)
            write(target, "gdtr_limit", 15)
            assert "2 that are not in mapped RAM" in say(target, "info gdt")

    def test_tss(self, demo: GuestTarget) -> None:
        text = say(demo, "info tss")
        assert text.startswith("TSS32 busy, selector 0028")
        assert "ss0 00000010" in text
        assert "I/O permission bitmap" in text
        double_fault = say(demo, "info tss 0x30")
        assert "eip c01" in double_fault
        with pytest.raises(TargetError, match="not of a TSS"):
            say(demo, "info tss 8")
        with pytest.raises(TargetError, match="not in the GDT"):
            say(demo, "info tss 0xfff8")
        with guest(NOP) as target:
            target.machine.cpu.state.tr.load(0, 0, 0, 0)
            assert "no task state segment" in say(target, "info tss")

    def test_page_walk(self, demo: GuestTarget) -> None:
        lines = say(demo, f"page {register(demo, 'idtr_base'):#x}").splitlines()
        assert lines[1].startswith("  PDE   at physical 0x00")
        assert lines[2].startswith("  PTE   at physical 0x00")
        assert lines[-2] == "  user read: #PF, error code 0x5 (protection, read, user)"
        nothing = say(demo, "page 0").splitlines()
        assert any("supervisor read: #PF, error code 0x0 (not present, read, supervisor)" in line for line in nothing)
        with guest(NOP) as target:
            assert "Paging is off" in say(target, "page 0x1234")

    def test_mappings(self, demo: GuestTarget) -> None:
        text = say(demo, "info mem")
        assert re.search(r"^c010\w{4}-\w{8} +[\d,]+ bytes  -r-$", text, re.MULTILINE), "kernel text is read only"
        with guest(NOP) as target:
            assert "Paging is off" in say(target, "info mem")

    def test_tlb(self, demo: GuestTarget) -> None:
        assert re.search(r"^c01\w{5} -> 001\w{5}  -r.  4 KiB$", say(demo, "info tlb"), re.MULTILINE)
        with guest(NOP) as target:
            target.machine.cpu.mmu.flush()
            assert "empty" in say(target, "info tlb")

    def test_icount(self, demo: GuestTarget) -> None:
        assert say(demo, "info icount").startswith(f"{DEMO_INSNS} instructions retired")

    @pytest.mark.parametrize(
        ("topic", "word"),
        [("pic", "pic"), ("pit", "pit"), ("serial", "com2"), ("rtc", "rtc"), ("keyboard", "i8042"), ("vga", "80x25"),
         ("pci", "pci"), ("devices", "dma")],
    )  # fmt: skip
    def test_devices_describe_themselves(self, demo: GuestTarget, topic: str, word: str) -> None:
        assert word in say(demo, f"info {topic}").lower()


class TestPhysicalMemory:
    def test_formats(self) -> None:
        with guest(b"\x01\x02\x03\x84hello\0\x90\xc3") as target:
            at = f"{CODE:#x}"
            assert say(target, f"xp {at}") == f"{CODE:#010x}: 0x84030201\n"
            assert say(target, f"xp /2xh {at}") == f"{CODE:#010x}: 0x0201 0x8403\n"
            assert say(target, f"xp /1dw {at}").split()[1] == "-2080177663"
            assert say(target, f"xp /1uw {at}").split()[1] == "2214789633"
            assert say(target, f"xp /1tb {at}+1").split()[1] == "00000010"
            assert say(target, f"xp /1ob {at}+3").split()[1] == "0o204"
            assert say(target, f"xp /s {at}+4") == f'{CODE + 4:#010x}: "hello"\n'
            assert say(target, f"xp /2i {at}+10").splitlines()[1].split()[-1] == "ret"
            assert say(target, f"xp /2c {at}+4").endswith("104 'h' 101 'e'\n")
            assert say(target, f"xp /1xg {at}").split()[1] == "0x6c6c656884030201"

    def test_sixteen_bit_code_is_disassembled_as_such(self) -> None:
        with guest(b"\xb8\x34\x12", bits=16, at=0x7C00) as target:
            assert "mov ax, 0x1234" in say(target, "xp /i 0x7c00")

    def test_long_dumps_come_in_slices(self) -> None:
        with guest(NOP) as target:
            pieces = list(target.monitor("xp /1024xb 0", read_only=True))
            assert len(pieces) == 64
            assert max(map(len, pieces)) < 200

    @pytest.mark.parametrize(
        "line",
        ["xp /0x 0", "xp /99999999x 0", f"xp /{5000 * '9'}x 0", "xp /zz 0", "xp 0x1000000000", "xp -1", "xp 1 2"],
        ids=lambda line: str(line)[:20],
    )
    def test_refusals(self, line: str) -> None:
        with guest(NOP) as target, pytest.raises(TargetError):
            say(target, line)


@pytest.mark.usefixtures("each_engine")
class TestStops:
    def test_break_by_physical_address(self) -> None:
        with guest(NOP * 8 + JMP_SELF) as target:
            assert "breakpoint 1" in say(target, f"break phys {CODE + 3:#x}")
            event = go(target)
            assert event.reason is StopReason.SIGNAL
            assert event.text == f"Monitor breakpoint 1: break at physical {CODE + 3:#010x}.\n"
            assert register(target, "eip") == CODE + 3
            assert "hit once" in say(target, "info breakpoints")

    def test_break_in_one_address_space(self) -> None:
        with guest(NOP * 8 + JMP_SELF) as target:
            say(target, f"break {CODE + 2:#x} cr3=0x5000")
            say(target, f"break {CODE + 4:#x} cr3=$cr3")
            event = go(target)
            assert register(target, "eip") == CODE + 4
            assert "Monitor breakpoint 2" in event.text

    def test_watch(self) -> None:
        code = b"\xa3\x00\x10\x20\x00" + b"\xa1\x00\x10\x20\x00" + JMP_SELF
        with guest(code) as target:
            say(target, "watch phys 0x201000")
            say(target, "watch read 0x201002 2")
            event = go(target)
            assert "write to" in event.text
            assert register(target, "eip") == CODE + 5
            event = go(target)
            assert "read of 0x00201002" in event.text
            assert say(target, "delete 1") == "1 deleted.\n"
            with pytest.raises(TargetError, match="no monitor breakpoint 1"):
                say(target, "delete 1")
            assert say(target, "delete") == "1 deleted.\n"

    def test_list_shows_gdbs_too(self) -> None:
        with guest(NOP) as target:
            target.insert_breakpoint(Breakpoint(BreakpointKind.SOFTWARE, CODE, 1, check=lambda: Verdict.STOP))
            say(target, "until-icount 99")
            text = say(target, "info breakpoints")
            assert "gdb: software at linear 0x00100000, length 1, with a condition or commands" in text
            assert "instruction count 99" in text

    @pytest.mark.parametrize(
        "line",
        ["break", "break 1 2", "break phys 0x1000000000", "watch 0 0", "watch 0 99999999", "watch", "catch zork",
         "catch 32", "uncatch zork", "step-interrupts maybe", "until-icount 0", "until-icount 1 2", "delete 1 2"],
    )  # fmt: skip
    def test_refusals(self, line: str) -> None:
        with guest(NOP) as target, pytest.raises(TargetError):
            say(target, line)

    def test_catch_and_uncatch(self) -> None:
        with guest(NOP) as target:
            debug = target.machine.debug
            assert "#PF (SIGSEGV), #GP" not in say(target, "catch pf #UD 13")
            assert debug.caught_vectors == {14, 6, 13}
            assert "external interrupts (SIGUSR1)" in say(target, "catch irq")
            say(target, "uncatch irq pf")
            assert debug.caught_vectors == {6, 13}
            assert say(target, "catch").count("SIGUSR1") == 0
            assert "always" in say(target, "uncatch triple")
            say(target, "catch all")
            assert {0, 1, 3, 6, 8, 13, 14} <= debug.caught_vectors
            say(target, "uncatch")
            assert not debug.caught_vectors

    def test_until_icount_counts_from_here_with_a_plus(self) -> None:
        with guest(JMP_SELF) as target:
            say(target, "until-icount +100")
            go(target)
            say(target, "until-icount +100")
            go(target)
            assert register(target, "icount") == 200
            say(target, "until-icount +5")
            assert "No stop" in say(target, "until-icount off")

    def test_step_interrupts(self) -> None:
        with guest(NOP) as target:
            assert "stay pending" in say(target, "step-interrupts")
            say(target, "step-interrupts on")
            assert target.machine.debug.step_interrupts


class TestMachine:
    def test_vmm_shows_and_selects(self, demo: GuestTarget) -> None:
        assert say(demo, "vmm") == "* interp\n"
        assert say(demo, "vmm interp") == "* interp\n"
        with pytest.raises(TargetError, match="there is: interp"):
            say(demo, "vmm bt")

    def test_exits_are_those_of_an_engine_that_has_some(self, demo: GuestTarget) -> None:
        with pytest.raises(TargetError, match="`interp` has no exits"):
            say(demo, "exits")
        with pytest.raises(TargetError, match="`interp` has no VMCB"):
            say(demo, "vmcb")

    @pytest.mark.parametrize("name", ["trap", "trap nested"])
    def test_what_trap_is_left_for(self, name: str) -> None:
        code = bytes.fromhex("be05000000 e480 0fa2 4e 75f9 f4")  # five times IN and CPUID, then HLT
        with guest(code) as target:
            assert f"* {name}\n" in say(target, f"vmm {name}")
            assert say(target, "exits") == "The guest has not been left yet.\n"
            target.resume([Resume(ResumeMode.CONTINUE)])
            assert any(target.run(1000) is StintEnd.IDLE for _ in range(20))
            text = say(target, "exits")
            assert re.search(r"^IN from 0x0080 +5 ", text, re.MULTILINE)
            assert re.search(r"^CPUID +5 ", text, re.MULTILINE)
            assert re.search(rf"^  {CODE + 7:08x} +5 ", text.partition("cost most")[2], re.MULTILINE)
            block = say(target, "vmcb")
            assert "VMEXIT_HLT" in block
            assert f"paging       {'nested' if name == 'trap nested' else 'shadow'}" in block
            assert "seconds in emulation of hardware" in say(target, "stats")

    def test_stats(self, demo: GuestTarget) -> None:
        text = say(demo, "stats")
        assert re.search(rf"^  icount +{DEMO_INSNS:,}$", text, re.MULTILINE)

    def test_reset_stays_stopped_at_the_first_instruction(self) -> None:
        with guest(NOP * 4 + b"\x0f\x0b") as target:
            go(target)
            assert "flush register-cache" in say(target, "reset")
            assert register(target, "eip") == CODE
            assert "shut down" not in target.threads()[0].extra
            assert go(target).signal == 6

    @pytest.mark.parametrize(
        "change", [lambda target: target.restart(), lambda target: say(target, "vmm bt")], ids=["restart", "vmm"]
    )
    def test_what_is_gone_between_two_pieces_is_left_alone(self, change: Callable[[GuestTarget], object]) -> None:
        """Another client may restart the guest, or select another engine, while a long answer is under way."""
        with guest(NOP, name="interp") as target:
            idtr = target.machine.cpu.state.idtr
            idtr.base, idtr.limit = 0x2000, 0x7FF
            target.machine.memory.write(0x2000, 256 * bytes.fromhex("341208 00 008e0000"))
            output = target.monitor("info idt", read_only=True)
            next(output)
            change(target)
            with pytest.raises(TargetError, match="restarted meanwhile, or another engine"):
                list(output)

    @pytest.mark.parametrize(("line", "status"), [("quit", 0), ("quit 7", 7)])
    def test_quit(self, line: str, status: int) -> None:
        with guest(NOP) as target:
            with pytest.raises(QuitRequested) as request:
                say(target, line)
            assert request.value.status == status
            with pytest.raises(TargetError, match="0 to 255"):
                say(target, "quit 256")

    def test_screen(self, demo: GuestTarget) -> None:
        lines = say(demo, "screen").splitlines()
        assert len(lines) == 27
        assert lines[0] == "+" + "-" * 80 + "+"
        assert all(len(line) == 82 for line in lines)
        assert any("demo>" in line for line in lines)

    def test_keys(self) -> None:
        with guest(NOP) as target:
            keyboard = target.machine.board.keyboard
            say(target, "sendkey ctrl-alt-delete")
            assert bytes(keyboard.keys).hex(" ") in (
                "11 e0 71 e0 f0 71 f0 11 f0 14",  # the controller has taken the first code already
                "14 11 e0 71 e0 f0 71 f0 11 f0 14",
            )
            say(target, r"type ab \\ \n")
            assert keyboard.keys.endswith(b"\x5a\xf0\x5a")
            for line in ("sendkey zork", "sendkey é", "type é", "type", "sendkey"):
                with pytest.raises(TargetError):
                    say(target, line)

    def test_serial_input(self) -> None:
        with guest(NOP) as target:
            say(target, r"serial  two  spaces\n")
            assert target.machine.serial_queued_bytes(0) == len("two  spaces\n")
            with pytest.raises(TargetError):
                say(target, "serial")

    def test_nmi(self) -> None:
        with guest(NOP * 2 + JMP_SELF) as target:
            say(target, "nmi")
            assert target.machine.lines.nmi_pending


def test_every_command_is_exercised_here() -> None:
    folder = Path(__file__).parent
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("test_monitor*.py")))
    special = {f"info {topic}" for topic in ("pic", "pit", "serial", "rtc", "keyboard", "vga", "pci", "devices", "ata")}
    for command in COMMANDS:
        if command.name not in special:
            assert re.search(rf'["`]{command.name}\b', text), command.name
