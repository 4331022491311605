"""IN and OUT under `bt` against `interp`; above all ports that are polled, which emitted code reads by itself."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest

from machine.devices import vga
from machine.devices.device import unconnected
from machine.devices.i8042 import DATA_PORT, I8042, STATUS_PORT
from machine.devices.pit import FIRST_PORT, LAST_PORT, Pit
from machine.devices.ps2_keyboard import Ps2Keyboard
from machine.devices.ps2_mouse import Ps2Mouse
from machine.devices.system_control import PORT_B, A20Gate, PortB
from machine.devices.uart import LSR, Uart
from machine.devices.vga import Vga
from machine.state import ECX, EDI
from tests.vmm.bare import Bare, map_low_memory
from tests.vmm.engines import bt_alone
from tests.vmm.twins import Twins

COM = 0x3F8
STEPS = (1000, 333, 5000)


def plug(bare: Bare) -> None:
    """Devices with ports that are polled, and bytes that arrive on the serial line."""
    map_low_memory(bare)
    bare.clock.ns_per_insn = 7
    register, clock = bare.ports.register, bare.clock
    pit = Pit(clock, unconnected)
    register(FIRST_PORT, LAST_PORT, pit)
    register(PORT_B, PORT_B, PortB(pit))
    bare.ports.promise(PORT_B, pit.steady_until_ns)
    adapter = Vga(clock, bare.memory)
    for first, last in vga.PORT_RANGES:
        register(first, last, adapter)
    for port in vga.STATUS1_PORTS:
        bare.ports.promise(port, partial(adapter.status1_steady_until_ns, port))
    serial = Uart(clock, unconnected, None)
    register(COM, COM + 7, serial)
    bare.ports.promise(COM + LSR, serial.line_status_steady_until_ns)
    controller = I8042(clock, unconnected, unconnected, A20Gate(unconnected), lambda: None)
    controller.plug(Ps2Keyboard(controller.update), Ps2Mouse(controller.update))
    register(DATA_PORT, DATA_PORT, controller)
    register(STATUS_PORT, STATUS_PORT, controller)
    bare.ports.promise(STATUS_PORT, controller.status_steady_until_ns)
    for number in range(1, 5):
        clock.schedule(number * 50_001, lambda: serial.receive(b"ab"))


_RELOAD = "mov al, 12\nout 0x42, al\nmov al, 0\nout 0x42, al"
_ECHO = "mov al, 0xee\nout 0x60, al\njmp 1b\n2: in al, 0x60"
_NOTE = "rol edi, 5\nadd edi, ecx\nadd edi, eax"  # when it came, for good
POLLS = {
    "the refresh toggle": f"in al, 0x61\nxor al, bl\ntest al, 0x10\njz 1b\nxor bl, al\n{_NOTE}",
    "the output of channel 2": f"in al, 0x61\ntest al, 0x20\njz 1b\n{_RELOAD}\n{_NOTE}",
    "the beam": f"mov dx, 0x3da\nin al, dx\nxor al, bl\ntest al, 1\njz 1b\nxor bl, al\n{_NOTE}",
    "a byte on the line": f"mov dx, 0x3fd\nin al, dx\ntest al, 1\njz 1b\nmov dx, 0x3f8\nin al, dx\n{_NOTE}",
    "a key": f"in al, 0x64\ntest al, 1\njnz 2f\ninc ebx\ntest ebx, 63\njnz 1b\n{_ECHO}\n{_NOTE}",
    "nothing": "in al, 0x99\ninc ebx\ntest ebx, 63\njnz 1b\nout 0x80, al\ninc edi",
    "the toggle without a pause": "in al, 0x61\n" + 15 * "lea edi, [edi*2 + eax]\nin al, 0x61\n",
    "two ports in turn": f"in al, 0x61\nmov ah, al\nin al, 0x64\n{_NOTE}",
    "one port twice, then another": f"in al, 0x61\nin al, 0x61\nmov ah, al\nin al, 0x64\nin al, 0x64\n{_NOTE}",
    "more than a byte": f"mov dx, 0x3da\nin ax, dx\nadd edi, eax\nin al, dx\nin al, dx\nin eax, dx\n{_NOTE}",
}
_PREPARE = "mov al, 1\nout 0x61, al\nmov al, 0xb0\nout 0x43, al\nmov al, 12\nout 0x42, al\nmov al, 0\nout 0x42, al\n"


@bt_alone
@pytest.mark.usefixtures("native_core")
@pytest.mark.parametrize("poll", POLLS)
def test_polling(poll: str) -> None:
    with Twins(f"{_PREPARE}1: inc ecx\n{POLLS[poll]}\njmp 1b", plug) as twins:
        twins.run(40_000, STEPS)
        accesses = twins.count("port accesses")
        assert twins.reference.state.gpr[EDI]
        if " " not in poll or poll.startswith("the "):
            assert accesses < 0.4 * twins.reference.state.gpr[ECX]


def test_flags_and_registers_are_kept() -> None:
    source = """
        mov eax, 0x12345678
        1: inc esi
        mov ecx, esi
        mov edx, 0x3fd
        mov ebx, 0x11223344
        cmp esi, 0x80
        in al, dx
        pushfd
        pop edi
        add ebp, edi
        add ebp, ecx
        add ebp, edx
        add ebp, ebx
        add ebp, eax
        mov ah, cl
        jmp 1b
    """
    with Twins(source, plug) as twins:
        twins.run(8000, STEPS)
        assert twins.count("port accesses") < 200


@pytest.fixture
def plugged() -> Iterator[Bare]:
    bare = Bare()
    plug(bare)
    yield bare
    bare.close()


WRITES: dict[str, tuple[tuple[int, int], ...]] = {
    "nothing": (),
    "a count": ((0x43, 0xB6), (0x42, 9), (0x42, 0)),
    "a short count": ((0x61, 1), (0x43, 0x94), (0x42, 5)),
    "the flip-flop": ((0x3C0, 0x20),),
    "mono": ((0x3C2, 0x66),),
    "a key": ((0x60, 0xEE),),
}


@pytest.mark.parametrize("writes", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("port", [0x61, 0x64, 0x3DA, 0x3BA, 0x3FD, 0x99])
def test_what_is_promised_is_kept(plugged: Bare, port: int, writes: tuple[tuple[int, int], ...]) -> None:
    clock, ports = plugged.clock, plugged.ports
    clock.ns_per_insn = 1
    for each, value in writes:
        ports.store(each, 1, value)
    told = 0
    while clock.icount < 40_000:
        value = ports.load(port, 1)
        until_ns = ports.steady_until_ns(port, 1)
        assert until_ns > clock.now_ns
        end_ns = min(until_ns, clock.deadline_icount, 40_000)
        for at in sorted({clock.icount, clock.icount + 1, end_ns - 1} & {*range(clock.icount, end_ns)}):
            clock.icount = at
            assert (ports.load(port, 1), ports.steady_until_ns(port, 1)) == (value, until_ns)
        clock.icount = end_ns
        clock.run_due()
        told += 1
    assert told


@pytest.mark.parametrize("port", [0x60, 0x42, 0x3C1, 0x3CA, 0x3F8, 0x3FA])
def test_what_a_read_changes_or_time_does_is_not_promised(plugged: Bare, port: int) -> None:
    assert not plugged.ports.steady_until_ns(port, 1)


def test_an_error_on_the_line_is_read_once() -> None:
    """Of several reads in a row the first or the second takes it away."""
    source = (
        f"""
        mov edx, {COM + 4}
        mov al, 0x10  # loop back
        out dx, al
        1: inc ecx
        mov edx, {COM}
        mov al, 0x41
        out dx, al
        test ecx, 4
        jz 2f
        out dx, al
        2: mov edx, {COM + LSR}
        in al, dx
        add ebx, eax
        test ecx, 2
        jz 3f
        mov edx, {COM}
        out dx, al
        mov edx, {COM + LSR}
        3: in al, dx
    """
        + 8 * "rol ebx, 3\nadd ebx, eax\nin al, dx\n"
        + "rol ebx, 3\nadd ebx, eax\njmp 1b"
    )
    with Twins(source, plug) as twins:
        twins.run(6000, (97, 2000))
