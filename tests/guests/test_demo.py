"""The demo kernel under Debian's QEMU: its command line, its shell, its tasks, and what it does about faults."""

import re

import pytest

from guests import images
from tests.guests import qemu

DEMO = images.path("demo")


def demo(append: str, *, typed: bytes = b"", cpu: str = "qemu32") -> qemu.Outcome:
    return qemu.run([*qemu.kernel(DEMO, append), "-cpu", cpu], typed)


def shell(commands: str, cpu: str = "qemu32") -> str:
    """Run `commands` without banner and tasks' output, then turn off; return what is printed in between."""
    outcome = demo(f"quiet run={commands};poweroff", cpu=cpu)
    assert outcome.status == 0
    first, _, rest = outcome.serial.partition("\n")
    assert first == f"demo> {commands.partition(';')[0]}"
    return rest.removesuffix("demo> poweroff\n")


def calls_by_task(table: str) -> dict[str, int]:
    return {line.split()[1]: int(line.split()[5]) for line in table.splitlines() if line[:3].strip().isdigit()}


def test_two_runs_are_the_same() -> None:
    append = "run=sleep 300;ps;spin 3000;ticks;stack;mem;uptime;poweroff"
    assert demo(append) == demo(append)


def test_the_tasks_speak_less_and_less_often() -> None:
    said = demo("run=sleep 11000;poweroff").serial.splitlines()[2:-1]
    assert said == [
        "primes: number 10 is 29",
        "clock: up 1 second",
        "primes: number 100 is 541",
        "clock: up 10 seconds",
        "primes: number 1000 is 7919",
        "clock: up 100 seconds",
    ]


def test_quiet_leaves_the_serial_line_to_the_shell() -> None:
    assert shell("sleep 1100") == ""


@pytest.mark.parametrize(("option", "ticks"), [("hz=1000", 1000), ("hz=20", 20), ("hz=7", 100), ("hz=1000000", 100)])
def test_hz_sets_the_timer_within_what_it_can_do(option: str, ticks: int) -> None:
    """The clock's first line comes after a second, whatever a tick is."""
    serial = demo(f"{option} run=sleep {ticks // 2};echo half;sleep {ticks};poweroff").serial
    half, second = serial.index("\nhalf\n"), serial.index("clock: up 1 second")
    assert half < second
    assert f", {ticks} Hz, " in serial


def as_shown(text: str) -> str:
    """What a terminal shows of `text`: a backspace goes back one column, and the next character overwrites."""
    shown: list[str] = []
    for character in text.replace("\b \b", "\b"):
        if character == "\b":
            shown.pop()
        else:
            shown.append(character)
    return "".join(shown)


def test_typed_commands_are_echoed_edited_and_run() -> None:
    outcome = demo("quiet", typed=b"nonsense\x15echo one tow\x7f\x08wo\r\nfoo\n\n  \npoweroff\n")
    assert outcome.status == 0
    shown = as_shown(outcome.serial)
    assert shown == (
        "demo> echo one two\none two\ndemo> \ndemo> foo\nfoo: no such command; try help\n"
        "demo> \ndemo>   \ndemo> poweroff\n"
    )


def test_help_names_every_command_once() -> None:
    names = [line.split()[0] for line in shell("help").splitlines()]
    assert len(set(names)) == len(names)
    expected = (
        "help ps ticks uptime mem peek poke regs cpuid triple spin sleep echo reboot poweroff exit panic "
        "pgfault div0 ud gp bp stack"
    )
    assert " ".join(names) == expected


@pytest.mark.parametrize(
    ("command", "message", "status"),
    [
        ("pgfault", r"killed: page fault at 00c\w{5}, write to 00000010, not present", 142),
        ("div0", r"killed: divide error at 00c\w{5}", 128),
        ("ud", r"killed: invalid opcode at 00c\w{5}", 134),
        ("gp", r"killed: general protection at 00c\w{5}, error code 1234", 141),
        ("stack", r"killed: page fault at 00c\w{5}, write to bffee\w{3}, not present", 142),
        ("bp", r"breakpoint at 00c\w{5}", 0),
    ],
)
def test_a_fault_in_ring_3_ends_the_task_only(command: str, message: str, status: int) -> None:
    printed = shell(f"{command};echo alive")
    pattern = rf"pid 4 \(crash\):? {message}\nstatus {status}\ndemo> echo alive\nalive\n"
    assert re.fullmatch(pattern, printed), printed


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("pgfault", r"page fault at c0\w{6}"),
        ("div0", r"divide error at c0\w{6}"),
        ("ud", r"invalid opcode at c0\w{6}"),
        ("gp", r"general protection at c0\w{6}"),
        ("stack", r"double fault at c0\w{6}, esp 00001000, cr2 00000ffc, cr3 \w{8}"),
    ],
)
def test_a_fault_in_ring_0_ends_the_kernel(command: str, message: str) -> None:
    printed = qemu.run_until(qemu.kernel(DEMO, f"quiet run={command} kernel;poweroff"), "panic: ")
    assert re.search(rf"\npanic: {message}\n", printed), printed


def test_a_breakpoint_in_ring_0_is_reported() -> None:
    assert re.fullmatch(r"pid 1 \(shell\): breakpoint at c0\w{6}\n", shell("bp kernel"))


def test_tasks_that_ended_leave_no_memory_behind() -> None:
    free = re.findall(r"free +(\d+) pages", shell("sleep 50;mem;pgfault;stack;bp;gp;mem"))
    assert len(free) == 2
    assert free[0] == free[1]


def test_the_timer_takes_the_cpu_from_a_busy_task() -> None:
    before, after = (calls_by_task(part) for part in shell("ps;spin 8000;ps").split("demo> spin 8000\n"))
    assert before["primes"] == before["clock"] == 0
    assert after["primes"] > 0
    assert after["clock"] > 0


@pytest.mark.parametrize(
    ("cpu", "ways"), [("486", "int 80h"), ("pentium", "int 80h"), ("pentium2", "int 80h and sysenter")]
)
def test_sysenter_is_used_where_the_cpu_has_it(cpu: str, ways: str) -> None:
    serial = demo("run=sleep 150;cpuid;ps;poweroff", cpu=cpu).serial
    assert f"system calls by {ways}\n" in serial
    assert "clock: up 1 second" in serial
    assert (" sep" in serial) == ("sysenter" in ways)
    assert calls_by_task(serial)["clock"] > 3


def test_peek_and_poke_reach_memory_and_survive_faults() -> None:
    printed = shell("peek c0100000 4;poke c00b8f9e 41 1e;peek c00b8f9e 2;peek c0ffffff 3;poke 0 1;peek 0xc0100000 17")
    lines = [line for line in printed.splitlines() if not line.startswith("demo>")]
    assert lines[:4] == [
        "c0100000  02 b0 ad 1b",
        "c00b8f9e  41 1e",
        f"c0ffffff  {lines[2][10:12]} page fault",
        "00000000  page fault",
    ]
    assert lines[5].startswith("c0100010  ")


def test_the_kernels_code_cannot_be_written() -> None:
    entry = re.findall(r" \(shell\): breakpoint at (\w+)", shell("bp kernel"))[0]
    assert shell(f"poke {entry} 90").splitlines() == [f"{entry}  page fault"]


def test_the_screen_shows_title_time_and_output() -> None:
    printed = shell("sleep 350;peek c00b8000 160;echo X;peek c00b80a0 160")
    title, row = (
        bytes(int(byte, 16) for line in re.findall(r"^c00b8\w{3}  (.*)$", part, re.MULTILINE) for byte in line.split())
        for part in printed.split("demo> echo X")
    )
    assert title[::2].decode() == " trapgate demo kernel".ljust(70) + "00:00:03" + "  "
    assert set(title[1::2]) == {0x1F}
    assert row[::2].decode().rstrip() == "demo> sleep 350"


def test_the_screen_scrolls_below_its_title() -> None:
    printed = shell("help;help;peek c00b8002 16;peek c00b80a0 16")
    title, top = (
        bytes.fromhex(found)[::2].decode() for found in re.findall(r"^c00b8\w{3}  (.*)$", printed, re.MULTILINE)
    )
    assert title == "trapgate"
    # While the second peek prints, its line is the last of the 24 below the title.
    lines = printed.splitlines()
    assert top == lines[len(lines) - 24][:8]


def test_mem_shows_the_loaders_map() -> None:
    printed = demo("run=mem;poweroff").serial
    assert re.search(r"RAM +\d+ KiB, of which the kernel uses the first 16384\n", printed)
    assert re.search(r"map +0{16} \+ 000000000009fc00 type 1\n", printed)


def test_a_machine_smaller_than_the_direct_map_is_enough() -> None:
    outcome = qemu.run([*qemu.kernel(DEMO, "quiet run=mem;stack;poweroff"), "-m", "4M"])
    assert outcome.status == 0
    assert "status 142" in outcome.serial
    free = re.search(r"free +(\d+) pages", outcome.serial)
    assert free is not None
    assert 500 < int(free[1]) < 1024


def test_modules_are_kept() -> None:
    """The demo kernel itself as its module: its pages are not handed out."""
    plain = qemu.run(qemu.kernel(DEMO, "quiet run=mem;poweroff")).serial
    with_module = qemu.run([*qemu.kernel(DEMO, "quiet run=mem;poweroff"), "-initrd", str(DEMO)]).serial
    counts = [int(re.findall(r"free +(\d+) pages", text)[0]) for text in (plain, with_module)]
    module_pages = -(-DEMO.stat().st_size // 4096)
    assert counts[0] - counts[1] == module_pages


@pytest.mark.parametrize(
    ("command", "status"), [("exit 5", 11), ("exit 0x10", 33), ("reboot", 0), ("triple", 0), ("poweroff", 0)]
)
def test_ways_to_end(command: str, status: int) -> None:
    assert demo(f"quiet run={command}") == qemu.Outcome(status, f"demo> {command}\n")


def test_panic_stops_for_good() -> None:
    assert "panic: as you wish\n" in qemu.run_until(qemu.kernel(DEMO, "quiet run=panic;echo on"), "called from")
