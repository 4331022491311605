"""Real debuggers on the toy machine: stock gdb, a recent gdb, gdb under MI, lldb; what they see is what counts."""

import re
from pathlib import Path

import pytest

from gdbstub.debuggee import End, EndKind
from tests.gdbstub.background import served
from tests.gdbstub.toy import BUMP, COUNTER, LOOP, TEXT, TRAP_HERE, ToyTarget, assemble
from tests.system.tools import asked, gdb_mi, gdbs, run_gdb, run_lldb

GDBS = pytest.mark.parametrize("gdb", gdbs(), ids=["stock", "recent"])


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return assemble(tmp_path_factory.mktemp("toy"))


def sent(output: str) -> list[str]:
    """Return the packets that gdb says it sent."""
    return re.findall(r"Sending packet: \$(.*?)#[0-9a-f]{2}", output)


@GDBS
def test_first_look(gdb: Path, program: Path) -> None:
    with served() as state:
        commands = [f"target remote {state.remote}", "info registers", "info threads", "x/3i $eip", "x/s &greeting"]
        output = run_gdb([*commands, "p $cr0", "p $eflags", "p $st0", "detach"], gdb=gdb, program=program).output
        assert "_start ()" in output
        assert re.search(r"eip +0x1000 +0x1000 <_start>", output)
        assert re.search(r"cr0 +0x1 +\[ PE \]", output)
        assert re.search(r"icount +0x0 +0", output)
        assert '"CPU 1" (running)' in output
        assert '"hello, debugger"' in output
        assert re.search(r"=> 0x1000 <_start>:\s+mov +\$0x0,%eax", output)
        assert "<unavailable>" in output
        assert "warning" not in output.lower()
        state.wait_log("client 1: gone, the guest runs on")


@GDBS
def test_break_step_next_watch(gdb: Path, program: Path) -> None:
    with served() as state:
        commands = [
            "set debug remote 1",
            f"target remote {state.remote}",
            "break tick if $eax == 5",
            "continue",
            *asked("$eax"),
            "stepi",
            "next",
            "next",
            "next",
            # Over the call of bump: a step out of the range, a breakpoint at the return address, and back.
            "next",
            *asked("$eip"),
            "finish",
            "delete",
            "watch *(int *) &counter",
            "continue",
            "continue",
            "rwatch *(int *) 0x7ff4",
            "continue",
            "detach",
        ]
        output = run_gdb(commands, gdb=gdb, program=program).output
        assert "Breakpoint 1, " in output
        assert re.search(r"<<\$eax>>\n(.*\n)*?\$1 = 5\n", output)
        assert re.search(r"<<\$eip>>\n(.*\n)*?\$2 = \(void \(\*\)\(\)\) 0x101f <tick\+14>", output)
        assert "Old value = 6\nNew value = 7" in output
        assert "Old value = 7\nNew value = 8" in output
        assert "Hardware read watchpoint" in output
        packets = sent(output)
        assert any(re.fullmatch(r"Z0,1011,1;X[0-9a-f]+,[0-9a-f]+", packet) for packet in packets)
        assert any(packet.startswith("vCont;r1014,1015:") for packet in packets)
        assert any(packet.startswith("Z2,2000,4") for packet in packets)
        # One hit of the breakpoint in the target, one stop: the condition was evaluated here.
        assert packets.index("Z0,1011,1;X9,260000162022051327") < packets.index("vCont;c:p1.-1")
        assert "Remote failure" not in output


@GDBS
def test_conditions_that_gdb_compiles(gdb: Path, program: Path) -> None:
    """Each stops where gdb's own evaluation says that it is true, the first time."""
    conditions = {
        "*(int *) &counter == 3": 3,
        "*(short *) &counter * 3 - 1 == 17": 6,
        "($eax & 3) == 2 && $ecx > 4": 6,
        "$eax > 2 || $eax == 99": 3,
        "(int) -$eax < -4": 5,
        "!($eax < 7)": 7,
        "*(unsigned char *) ($esp + 1) == 0x10 && $eax / 2 % 5 == 4": 8,
        "(~$eax ^ 0xff) != -256 && $eax >= 1": 1,
    }
    for condition, count in conditions.items():
        with served() as state:
            commands = [
                f"target remote {state.remote}",
                f"break tick if {condition}",
                "continue",
                *asked("$eax"),
                "kill",
            ]
            run = run_gdb(commands, gdb=gdb, program=program)
            assert run.value_of("$eax") == str(count), condition


@GDBS
def test_dprintf_runs_in_the_target(gdb: Path, program: Path) -> None:
    with served() as state:
        commands = [
            "set debug remote 1",
            f"target remote {state.remote}",
            "set dprintf-style agent",
            r'dprintf tick,"at %d: %s %#x\n", $eax, (char *) 0x2004, *(int *) $esp',
            "break bump if $ecx == 3",
            "continue",
            "kill",
        ]
        output = run_gdb(commands, gdb=gdb, program=program).output
        packets = sent(output)
        assert any(re.match(r"Z0,1011,1;cmds:", packet) for packet in packets)
        assert packets.count("vCont;c:p1.-1") == 1
        printed = re.findall(r"^at .*$", output, re.MULTILINE)
        assert printed == [f"at {count}: hello, debugger 0x100f" for count in range(4)]


@GDBS
def test_memory_commands(gdb: Path, program: Path, tmp_path: Path) -> None:
    with served(ToyTarget(0x20_0000)) as state:
        state.target.ram[0x10_0000:] = bytes(range(256)) * 0x1000
        image = tmp_path / "image"
        commands = [
            f"target remote {state.remote}",
            "find &_start, +0x2000, (char) 0x68, (char) 0x65",
            "compare-sections",
            f"dump memory {image} 0x100000 0x200000",
            f"restore {image} binary 0x10000 0 0x40000",
            "set var *(int *) &counter = 0x24237d2a",
            *asked("*(int *) &counter"),
            "x/x 0x80000000",
            "print *(int *) 0x1ffffe",
            "detach",
        ]
        run = run_gdb(commands, gdb=gdb, program=program)
        assert "\n0x2004\n1 pattern found." in run.output
        assert "Section .text, range 0x1000 -- 0x1032: matched." in run.output
        assert image.read_bytes() == bytes(state.target.ram[0x10_0000:])
        assert state.target.ram[0x1_0000:0x5_0000] == bytes(range(256)) * 0x400
        assert run.value_of("*(int *) &counter") == str(0x24237D2A)
        assert "Cannot access memory at address 0x80000000" in run.output
        assert "Cannot access memory at address 0x200000" in run.output or "0x1ffffe" in run.output


@GDBS
def test_errors_reach_the_user(gdb: Path, program: Path) -> None:
    with served() as state:
        commands = [f"target remote {state.remote}", "print $icount = 5", "monitor nonsense", "monitor help", "detach"]
        output = run_gdb(commands, gdb=gdb, program=program).output
        assert "icount cannot be written: it counts what happened" in output
        assert "no such command: nonsense" in output
        assert "poke N" in output


@GDBS
def test_exceptions_and_how_they_are_handled(gdb: Path, program: Path) -> None:
    with served() as state:
        commands = [
            f"target remote {state.remote}",
            f"jump *{TRAP_HERE:#x}",
            *asked("$eip"),
            # The default is to pass: then the toy's exception happens, which skips the instruction.
            "tbreak loop",
            "continue",
            "handle SIGILL nostop noprint pass",
            "tbreak loop",
            f"jump *{TRAP_HERE:#x}",
            "handle SIGILL stop print nopass",
            f"jump *{TRAP_HERE:#x}",
            "stepi",
            "kill",
        ]
        output = run_gdb(commands, gdb=gdb, program=program).output
        assert output.count("Program received signal SIGILL, Illegal instruction.") == 3
        assert output.count("an invalid instruction") == 3
        assert output.count("Temporary breakpoint") == 4
        assert state.target.delivered == [TRAP_HERE, TRAP_HERE]


@GDBS
def test_info_os(gdb: Path) -> None:
    with served() as state:
        output = run_gdb([f"target remote {state.remote}", "info os", "info os exits", "detach"], gdb=gdb).output
        assert re.search(r"exits +Exits by reason", output)
        assert re.search(r"HLT & <co> +1", output)


@GDBS
def test_set_architecture_is_the_users(gdb: Path) -> None:
    with served() as state:
        state.target.ram[0x3000:0x3004] = bytes.fromhex("b8341290")
        commands = [f"target remote {state.remote}", "x/2i 0x3000", "set architecture i8086", "x/2i 0x3000", "detach"]
        output = run_gdb(commands, gdb=gdb).output
        assert re.search(r"0x3000:\s+mov +\$0x1234,%ax\n\s+0x3003:\s+nop", output)
        assert 'The target architecture is set to "i8086".' in output


@GDBS
def test_detach_and_attach_again(gdb: Path, program: Path) -> None:
    with served() as state:
        remote = f"target remote {state.remote}"
        run = run_gdb([remote, "stepi", "detach", remote, *asked("$eax > 0"), "detach"], gdb=gdb, program=program)
        assert run.value_of("$eax > 0") == "1"
        again = run_gdb([remote, "disconnect", remote, *asked("$eip"), "disconnect"], gdb=gdb, program=program)
        state.wait_log("client 4: gone, the guest stays stopped")
        after = run_gdb([remote, *asked("$eip"), "detach"], gdb=gdb, program=program)
        assert again.value_of("$eip") == after.value_of("$eip")


@GDBS
def test_extended_remote(gdb: Path, program: Path) -> None:
    with served() as state:
        commands = [
            f"target extended-remote {state.remote}",
            "break tick",
            "continue",
            "continue",
            *asked("*(int *) &counter"),
            "run",
            *asked("$eax + 100"),
            "kill",
            "run",
            *asked("$eax + 200"),
            "detach",
            "attach 1",
            "info threads",
            "delete",
            "stepi",
            "monitor quit 3",
        ]
        run = run_gdb(commands, gdb=gdb, program=program)
        assert run.value_of("*(int *) &counter") == "1"
        # A restart, and the breakpoint at tick is still there.
        assert run.value_of("$eax + 100") == "100"
        assert run.value_of("$eax + 200") == "200"
        assert state.target.calls.count("restart") == 2
        assert '* 1    Thread 1.1 "CPU 1"' in run.output
    assert state.end == End(EndKind.QUIT, 3)


@GDBS
def test_exit_of_the_guest(gdb: Path, program: Path) -> None:
    with served() as state:
        run_gdb([f"target remote {state.remote}", "set $eax = 4", "jump leave"], gdb=gdb, program=program)
    assert state.end == End(EndKind.EXITED, 9)


@GDBS
def test_second_gdb_is_read_only(gdb: Path, program: Path) -> None:
    with served() as state, gdb_mi(gdb=gdb, program=program) as first:
        first.command("-gdb-set mi-async on")
        first.command(f"-target-select remote {state.remote}")
        first.command("-exec-continue")
        # While the guest runs for the first.
        commands = [
            f"target remote {state.remote}",
            "info registers eip",
            "x/2i loop",
            "set var *(int *) &counter = 0",
            "set $eax = 0",
            "break tick",
            "continue",
            "delete",
            "stepi",
            "monitor poke 3",
            "kill",
            "detach",
        ]
        output = run_gdb(commands, gdb=gdb, program=program).output
        assert re.search(r"eip +0x10", output)
        assert "call   0x1011 <tick>" in output
        assert "Cannot insert breakpoint 1" in output
        assert output.count("this session is read-only") >= 2
        assert "only for who controls the guest" in output
        state.wait_log("client 2: gone")
        first.command("-exec-interrupt")
        assert first.wait_for_stop()["signal-name"] == "SIGINT"
        first.command("-break-insert tick")
        first.command("-exec-continue")
        assert first.wait_for_stop()["reason"] == "breakpoint-hit"


@GDBS
def test_scripted_session(gdb: Path, program: Path) -> None:
    with served(start=True) as state, gdb_mi(gdb=gdb, program=program) as session:
        session.command(f"-target-select remote {state.remote}")
        session.command("-break-insert bump")
        for count in range(3):
            session.command("-exec-continue")
            stop = session.wait_for_stop()
            assert stop["reason"] == "breakpoint-hit"
            assert stop["frame"]["addr"] == f"{BUMP:#010x}"
            assert int(session.evaluate("*(int *) &counter")) > count
        frames = session.command("-stack-list-frames")[-1]["payload"]["stack"]
        assert [frame["func"] for frame in frames[:2]] == ["bump", "tick"]
        for _ in range(100):
            session.command("-exec-step-instruction")
            assert session.wait_for_stop()["reason"] in ("end-stepping-range", "breakpoint-hit")
        session.command("-target-detach")


def test_lldb(program: Path) -> None:
    with served() as state:
        commands = [
            f"gdb-remote {state.port}",
            "register read eip eflags icount",
            f"breakpoint set -a {BUMP:#x}",
            "continue",
            "bt",
            "thread step-inst",
            "register write ebx 0x1234",
            "register read ebx",
            f"memory read {COUNTER:#x} {COUNTER + 32:#x}",
            f"memory write {COUNTER:#x} 0x55",
            f"memory region {COUNTER:#x}",
            f"disassemble -s {LOOP:#x} -c 2",
            "breakpoint delete -f",
            f"watchpoint set expression -w write -s 4 -- {COUNTER:#x}",
            "continue",
            "process plugin packet monitor help",
            "process detach",
        ]
        output = run_lldb(commands, program=program).output
        assert re.search(r"eip = 0x00001000", output)
        assert "icount = 0x0000000000000000" in output
        assert "stop reason = breakpoint 1.1" in output
        assert "stop reason = instruction step" in output
        assert "ebx = 0x00001234" in output
        assert "hello, debug" in output
        assert "[0x0000000000000000-0x0000000000100000) rwx ram" in output
        assert "calll  0x1011" in output
        assert "Watchpoint 1 hit:" in output
        assert "old value: 85" in output
        assert "poke N" in output
        assert re.search(r"frame #1: 0x0000101f", output)
        assert "Process 1 detached" in output
        assert "error:" not in output
        assert state.target.ram[TEXT] == 0xB8
        state.wait_log("client 1: gone, the guest runs on")


def test_lldb_kills(program: Path) -> None:
    with served() as state:
        output = run_lldb([f"gdb-remote {state.port}", "process kill"], program=program).output
        assert "Process 1 exited with status = 9" in output
    assert state.end == End(EndKind.KILLED)


@GDBS
def test_older_ways_of_saying_it(gdb: Path, program: Path) -> None:
    """What gdb falls back to when packets are switched off: acknowledgements, `c s G M`, software watchpoints."""
    with served() as state:
        commands = [
            *(
                f"set remote {name}-packet off"
                for name in ("noack", "verbose-resume", "set-register", "binary-download")
            ),
            *(f"set remote {name}-packet off" for name in ("threads", "swbreak-feature", "hwbreak-feature")),
            "set remote multiprocess-feature-packet off",
            "set debug remote 1",
            f"target remote {state.remote}",
            "break tick",
            "continue",
            "stepi",
            "set $ebx = 0x1234",
            "set var *(int *) &counter = 0x55",
            "set can-use-hw-watchpoints 0",
            "watch *(int *) &counter",
            "continue",
            "signal SIGILL",
            "detach",
        ]
        output = run_gdb(commands, gdb=gdb, program=program).output
        packets = sent(output)
        assert {"c", "s", "qfThreadInfo", "qsThreadInfo", "D"} <= set(packets)
        assert any(packet.startswith("G") for packet in packets)
        assert "M2000,4:55000000" in packets
        assert "Received Ack" in output
        assert "Watchpoint 2: *(int *) &counter" in output
        assert "Old value = 85\nNew value = 1" in output
        assert state.target.get(3) == 0x1234


@GDBS
def test_what_is_not_supported_is_refused_in_peace(gdb: Path, program: Path) -> None:
    with served() as state:
        commands = [
            f"target remote {state.remote}",
            "trace tick",
            "tstart",
            "reverse-stepi",
            "checkpoint",
            "info auxv",
            "call 1 + 1",
            "stepi",
            *asked("$icount"),
            "detach",
        ]
        run = run_gdb(commands, gdb=gdb, program=program)
        assert "Target does not support this command." in run.output
        assert re.search(r"does not support (this command|reverse execution)", run.output.partition("tstart")[0])
        assert run.value_of("$icount") == "1"
