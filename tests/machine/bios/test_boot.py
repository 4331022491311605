"""From reset to the boot sector and on, with the reference CPU: vectors, interrupts, waits, resets."""

import struct

import pytest

from machine.bios import bda
from machine.debug import StopKind
from machine.disk import Disk, Media
from machine.state import CS
from tests.machine.bios.assembly import boot_sector
from tests.machine.bios.pc import Pc

pytestmark = pytest.mark.usefixtures("each_engine")

END = """
        movw $0xF4, %dx
        xorw %ax, %ax
        outw %ax, %dx
        """
# Keyboard controller commands and delays are in virtual time; 2 s of it are enough for every boot here.
INSNS = 400_000


def boot(source: str, media: Media = Media.FLOPPY) -> Pc:
    number = 0 if media is Media.FLOPPY else 0x80
    return Pc({number: Disk.from_bytes(boot_sector(source), media)})


def run_to_exit(pc: Pc) -> bytes:
    stop = pc.run(INSNS)
    assert stop.kind is StopKind.EXIT, (stop, pc.screen())
    out = bytes(pc.debugcon)
    pc.close()
    return out


def test_self_test_leaves_the_machine_as_a_bios_does() -> None:
    pc = Pc({0: Disk.from_bytes(bytes(1440 * 1024)), 0x80: Disk.from_bytes(bytes(10000 * 512))})
    pc.firmware.self_test()
    vectors = struct.unpack("<256I", pc.memory.read(0, 1024))
    assert vectors[0x08] == 0xF000FEA5
    assert vectors[0x10] == 0xF000F065
    assert vectors[0x13] == 0xF000E3FE
    assert vectors[0x00] == vectors[0x1C] == vectors[0xFF] == 0xF000FF53
    assert vectors[0x60:0x67] == (0,) * 7
    assert pc.number(bda.EQUIPMENT, 2) == 0x0421
    assert (pc.number(bda.MEMORY_KIB, 2), pc.number(bda.EBDA_SEGMENT, 2)) == (639, 0x9FC0)
    assert pc.number(0x9FC00) == 1
    assert (pc.number(bda.DISK_COUNT), pc.number(bda.VIDEO_MODE)) == (1, 3)
    assert (pc.number(0x48F), pc.number(0x490), pc.number(0x496)) == (0x07, 0x17, 0x10)
    assert (pc.number(0x478, 4), pc.number(0x47C, 4)) == (0x14141414, 0x01010101)
    assert [pc.number(at, 2) for at in (0x41A, 0x41C, 0x480, 0x482)] == [0x1E, 0x1E, 0x1E, 0x3E]
    assert pc.memory.a20_enabled
    ports = pc.board.ports
    assert (ports.load(0x21, 1), ports.load(0xA1, 1)) == (0xB8, 0x8E)
    assert not ports.load(0x64, 1) & 1
    assert pc.screen() == []
    assert pc.board.vga.cursor == (0, 0)
    pc.close()


def test_nothing_to_boot_from() -> None:
    pc = Pc({0x80: Disk.from_bytes(bytes(512))})
    pc.run(20_000)
    assert pc.screen() == ["trapgate BIOS", "", "No bootable device"]
    assert pc.cpu.state.segments[CS].base == 0xF0000
    ticks = pc.number(bda.TICKS, 4)
    pc.run(2_000)
    assert pc.number(bda.TICKS, 4) > ticks  # it waits in HLT with interrupts on
    pc.close()


def test_diskette_comes_first_and_an_unsigned_one_is_passed_over() -> None:
    hello = boot_sector("movw $0x0E44, %ax\n int $0x10\n 1: hlt\n jmp 1b")
    for floppy, shown in ((hello, "Booting from diskette 0"), (bytes(512), "Booting from hard disk 0")):
        pc = Pc({0: Disk.from_bytes(floppy, Media.FLOPPY), 0x80: Disk.from_bytes(hello, Media.HARD)})
        pc.run(5_000)
        assert pc.screen() == ["trapgate BIOS", "", shown, "D"]
        pc.close()


def test_ticks_and_int_1c() -> None:
    pc = boot(
        """
        xorw %ax, %ax
        movw %ax, %ds
        movw $hook, 0x1C*4
        movw %cs, 0x1C*4+2
        movl 0x46C, %ebx
        addl $3, %ebx
1:      hlt
        cmpl %ebx, 0x46C
        jb 1b
        movb count, %al
        outb %al, $0xE9
        """
        + END
        + """
hook:   incb %cs:count
        iretw
count:  .byte '0'
        """
    )
    assert run_to_exit(pc) == b"3"


def test_midnight() -> None:
    pc = boot(
        """
        xorw %ax, %ax
        movw %ax, %ds
        movw $0x0100, %ax
        movw $0x0018, %cx
        movw $0x00AF, %dx
        int $0x1A
1:      hlt
        cmpw $0, 0x46C
        jne 1b
        xorw %ax, %ax
        int $0x1A
        addb $0x30, %al
        outb %al, $0xE9
        """
        + END
    )
    assert run_to_exit(pc) == b"1"


def test_keys_typed_arrive_in_order_through_the_interrupt() -> None:
    pc = boot(
        """
1:      xorw %ax, %ax
        int $0x16
        outb %al, $0xE9
        cmpb $0x0D, %al
        jne 1b
        """
        + END
    )
    pc.run(20_000)
    assert pc.debugcon == b""
    pc.board.keyboard.type_text("Hello, World! [x]\n")
    assert run_to_exit(pc) == b"Hello, World! [x]\r"


def test_intercept_takes_and_changes_keys() -> None:
    pc = boot(
        """
        xorw %ax, %ax
        movw %ax, %ds
        movl 0x15*4, %eax
        movl %eax, old
        movw $hook, 0x15*4
        movw %cs, 0x15*4+2
1:      xorw %ax, %ax
        int $0x16
        outb %al, $0xE9
        cmpb $0x0D, %al
        jne 1b
        """
        + END
        + """
hook:   cmpb $0x4F, %ah
        jne 2f
        cmpb $0x1E, %al                 # A: dropped
        je 3f
        cmpb $0x30, %al                 # B becomes C
        jne 2f
        movb $0x2E, %al
2:      ljmpw *%cs:old
3:      pushw %bp
        movw %sp, %bp
        andw $0xFFFE, 6(%bp)
        popw %bp
        iretw
old:    .long 0
        """
    )
    pc.run(20_000)
    pc.board.keyboard.type_text("abxa\n")
    assert run_to_exit(pc) == b"cx\r"


@pytest.mark.parametrize("microseconds", [1, 976, 50_000])
def test_wait_takes_its_time(microseconds: int) -> None:
    pc = boot(
        f"""
        movb $'<', %al
        outb %al, $0xE9
        movw $0x8600, %ax
        movw ${microseconds >> 16}, %cx
        movw ${microseconds & 0xFFFF}, %dx
        int $0x15
        movb $'>', %al
        outb %al, $0xE9
        """
        + END
    )
    times: list[int] = []
    note = pc.debugcon.extend

    def record(data: bytes) -> None:
        times.append(pc.clock.now_ns)
        note(data)

    pc.board.debugcon._output = record
    assert run_to_exit(pc) == b"<>"
    waited_us = (times[1] - times[0]) / 1000
    # The first of the 976 us periods has begun already, and the wait ends with the period in which it runs out.
    assert microseconds - 977 <= waited_us <= microseconds + 2 * 977


def test_waits_one_after_the_other() -> None:
    pc = boot(
        """
        movw $3, %di
1:      movw $0x8600, %ax
        xorw %cx, %cx
        movw $1000, %dx
        int $0x15
        jc 9f
        movb $'w', %al
        outb %al, $0xE9
        decw %di
        jnz 1b
9:
        """
        + END
    )
    assert run_to_exit(pc) == b"www"


def test_a_long_string_lets_interrupts_in() -> None:
    pc = boot(
        """
        xorw %ax, %ax
        movw %ax, %es
        movb $0x34, %al                 # an interrupt each 1.7 us, or 1,700 instructions
        outb %al, $0x43
        movb $2, %al
        outb %al, $0x40
        movb $0, %al
        outb %al, $0x40
        movl %es:0x46C, %esi
        movw $0x1301, %ax
        movw $0x0007, %bx
        movw $8000, %cx
        xorw %dx, %dx
        movw $0x7C00, %bp
        int $0x10
        movl %es:0x46C, %eax
        subl %esi, %eax
        cmpl $4, %eax                   # one could have waited until the end of the call
        jb 9f
        movb $'i', %al
        outb %al, $0xE9
9:
        """
        + END
    )
    assert run_to_exit(pc) == b"i"


def test_break_and_print_screen_and_reboot() -> None:
    pc = boot(
        """
        xorw %ax, %ax
        movw %ax, %ds
        movw $brk, 0x1B*4
        movw %cs, 0x1B*4+2
        movw $print, 0x05*4
        movw %cs, 0x05*4+2
        movb $'s', %al
        outb %al, $0xE9
1:      hlt
        jmp 1b
brk:    movb $'b', %al
        outb %al, $0xE9
        iretw
print:  movb $'p', %al
        outb %al, $0xE9
        iretw
        """
    )
    pc.run(20_000)
    pc.board.keyboard.press(bytes.fromhex("14 e07e e0f07e f014"))  # Ctrl-Break, set 2
    pc.run(20_000)
    pc.board.keyboard.press(bytes.fromhex("e012 e07c e0f07c e0f012"))  # Print Screen
    pc.run(20_000)
    assert pc.debugcon == b"sbp"
    pc.board.keyboard.press(bytes.fromhex("14 11 71"))  # Ctrl-Alt-Del
    pc.run(50_000)
    assert pc.debugcon == b"sbps"  # it came up again
    pc.close()


def test_reset_by_the_keyboard_controller_boots_again_with_what_was_written() -> None:
    pc = boot(
        """
        xorw %ax, %ax
        movw %ax, %ds
        movw %ax, %es
        movw $0x0201, %ax
        movw $0x8000, %bx
        movw $0x0002, %cx
        movb $0, %dh
        int $0x13
        movb 0x8000, %al
        addb $'0', %al
        outb %al, $0xE9
        cmpb $'2', %al
        je 9f
        incb 0x8000
        movw $0x0301, %ax
        int $0x13
        movb $0xFE, %al
        outb %al, $0x64
1:      hlt
        jmp 1b
9:
        """
        + END
    )
    assert run_to_exit(pc) == b"012"


@pytest.mark.parametrize("code", [0x05, 0x0A])
def test_shutdown_code_resumes(code: int) -> None:
    pc = boot(
        f"""
        cli
        xorw %ax, %ax
        movw %ax, %ds
        movl $resume, 0x467
        movb $0x0F, %al
        outb %al, $0x70
        movb ${code}, %al
        outb %al, $0x71
        movb $0xFE, %al
        outb %al, $0x64
1:      hlt
        jmp 1b
resume: movb $'r', %al
        outb %al, $0xE9
        """
        + END
    )
    assert run_to_exit(pc) == b"r"


def test_calls_keep_the_callers_registers_and_flags() -> None:
    pc = boot(
        """
        movl $0x11111111, %ebx
        movl $0x22222222, %ecx
        movl $0x33333333, %edx
        movl $0x44444444, %esi
        movl $0x55555555, %edi
        movl $0x66666666, %ebp
        movw $0x7777, %ax
        movw %ax, %es
        stc
        std
        int $0x12
        pushfw
        popw %ax
        andw $0x0601, %ax
        cmpw $0x0601, %ax
        jne 8f
        cmpl $0x11111111, %ebx
        jne 8f
        cmpl $0x22222222, %ecx
        jne 8f
        cmpl $0x33333333, %edx
        jne 8f
        cmpl $0x44444444, %esi
        jne 8f
        cmpl $0x55555555, %edi
        jne 8f
        cmpl $0x66666666, %ebp
        jne 8f
        movw %es, %ax
        cmpw $0x7777, %ax
        jne 8f
        movb $'+', %al
        outb %al, $0xE9
8:
        """
        + END
    )
    assert run_to_exit(pc) == b"+"


def test_the_same_run_twice() -> None:
    ends = []
    for _ in range(2):
        pc = boot("1: movw $0x0E41, %ax\n int $0x10\n hlt\n jmp 1b")
        pc.run(30_000)
        ends.append((pc.clock.now_ns, bytes(pc.cpu.state.pack()), pc.memory.read(0, 0x100000)))
        pc.close()
    assert ends[0] == ends[1]
