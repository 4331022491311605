"""The main board of the PC: every device, wired to the ports, the memory, the interrupt lines and the CPU.

It must not know the CPU, the firmware, nor what an option is called on the command line.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from machine import e820
from machine.clock import Clock
from machine.devices import (
    ata,
    debug_ports,
    dma,
    fpu_error,
    fw_cfg,
    i8042,
    pci,
    pic,
    pit,
    rtc,
    system_control,
    uart,
    vga,
)
from machine.devices.cmos import cmos_contents
from machine.devices.device import Device
from machine.devices.ps2_keyboard import Ps2Keyboard
from machine.devices.ps2_mouse import Ps2Mouse
from machine.disk import Disk
from machine.lines import CpuLines
from machine.memory import PhysicalMemory
from machine.ports import PortBus

_TIMER_IRQ = 0
_KEYBOARD_IRQ = 1
_CLOCK_IRQ = 8
_MOUSE_IRQ = 12

_WORD = (2,)
_DWORD = (4,)
_ALL_WIDTHS = (1, 2, 4)


@dataclass(frozen=True, slots=True)
class BoardOptions:
    """What differs from one PC to another; RAM is the memory's business.

    Attributes:
        serial: where COM1 and COM2 put their bytes, each as it comes; None discards them. Both ports are always there.
        debugcon: where port E9h puts its bytes.
        debug_exit_port: first of the four ports of the debug exit; None leaves it out.
        start_date: what the clock chip shows at power-on.
        disks: first and second drive of the ATA channel; without any there is no channel.
        floppy_types: CMOS types of up to two floppy drives (4 is 1.44 MB).
        boot_order: for the CMOS: a floppy, c disk, d CD-ROM, n network.
        command_line: for fw_cfg; None leaves the item out.
        fpu: the equipment byte says that there is an FPU.
        serial_irq_needs_out2: the serial ports' interrupts pass only while MCR.OUT2 is up.
        fw_cfg_files: further files for fw_cfg by name.
    """

    serial: tuple[uart.Output | None, uart.Output | None] = (None, None)
    debugcon: uart.Output | None = None
    debug_exit_port: int | None = debug_ports.DEBUG_EXIT_PORT
    start_date: dt.datetime = rtc.START_DATE
    disks: tuple[Disk | None, ...] = ()
    floppy_types: tuple[int, ...] = ()
    boot_order: str = "cad"
    command_line: bytes | None = None
    fpu: bool = False
    serial_irq_needs_out2: bool = False
    fw_cfg_files: dict[str, bytes] = field(default_factory=dict)


class Board:
    """Owns the port bus and the devices; `devices` has them by name, in the order in which they are reset.

    Raises:
        ValueError: `debug_exit_port` is taken or no port, or the options do not fit the CMOS.
    """

    def __init__(
        self, clock: Clock, lines: CpuLines, memory: PhysicalMemory, options: BoardOptions | None = None
    ) -> None:
        options = options or BoardOptions()
        self.clock = clock
        self.lines = lines
        self.ports = PortBus()
        self.pic = pic.Pic(lines)
        self.pit = pit.Pit(clock, self.pic.line(_TIMER_IRQ))
        self.rtc = rtc.Rtc(clock, self.pic.line(_CLOCK_IRQ), _cmos(memory, options), options.start_date)
        gated = options.serial_irq_needs_out2
        self.com1 = uart.Uart(clock, self.pic.line(uart.COM1_IRQ), options.serial[0], gated_by_out2=gated)
        self.com2 = uart.Uart(clock, self.pic.line(uart.COM2_IRQ), options.serial[1], gated_by_out2=gated)

        def drive_a20(enabled: bool) -> None:
            memory.a20_enabled = enabled

        self.a20 = system_control.A20Gate(drive_a20)
        self.i8042 = i8042.I8042(
            clock, self.pic.line(_KEYBOARD_IRQ), self.pic.line(_MOUSE_IRQ), self.a20, lines.request_reset
        )
        self.keyboard = Ps2Keyboard(self.i8042.update)
        self.mouse = Ps2Mouse(self.i8042.update)
        self.i8042.plug(self.keyboard, self.mouse)
        self.port_a = system_control.PortA(self.a20, lines.request_reset)
        self.port_b = system_control.PortB(self.pit)
        self.reset_control = system_control.ResetControl(lines.request_reset)
        self.vga = vga.Vga(clock, memory)
        self.pci = pci.Pci()
        self.fw_cfg = fw_cfg.FwCfg(_fw_cfg_items(memory, options))
        self.dma = dma.Dma()
        self.fpu_error = fpu_error.FpuErrorPort(self.pic.line(fpu_error.IRQ))
        self.post = debug_ports.PostPort()
        self.debugcon = debug_ports.Debugcon(options.debugcon)
        self.power = debug_ports.PowerControl(lines)
        self.debug_exit = debug_ports.DebugExit(lines)
        present = any(disk is not None for disk in options.disks)
        self.ata = ata.AtaChannel(clock, self.pic.line(ata.IRQ), options.disks) if present else None
        self.devices: dict[str, Device] = {
            "pic": self.pic,
            "pit": self.pit,
            "rtc": self.rtc,
            "com1": self.com1,
            "com2": self.com2,
            "a20": self.a20,
            "i8042": self.i8042,
            "keyboard": self.keyboard,
            "mouse": self.mouse,
            "port92": self.port_a,
            "port61": self.port_b,
            "reset": self.reset_control,
            "vga": self.vga,
            "pci": self.pci,
            "fw_cfg": self.fw_cfg,
            "dma": self.dma,
            "fpu_error": self.fpu_error,
            "post": self.post,
            "power": self.power,
        }
        if self.ata is not None:
            self.devices["ata"] = self.ata
        self._connect(options)
        memory.map_device(vga.WINDOW_FIRST, vga.WINDOW_BYTES, self.vga)

    def _connect(self, options: BoardOptions) -> None:
        register = self.ports.register
        register(*dma.FIRST_PORTS, self.dma)
        register(pic.MASTER_FIRST, pic.MASTER_LAST, self.pic)
        register(pic.SLAVE_FIRST, pic.SLAVE_LAST, self.pic)
        register(pic.ELCR_FIRST, pic.ELCR_LAST, self.pic)
        register(pit.FIRST_PORT, pit.LAST_PORT, self.pit)
        register(i8042.DATA_PORT, i8042.DATA_PORT, self.i8042)
        register(i8042.STATUS_PORT, i8042.STATUS_PORT, self.i8042)
        register(system_control.PORT_B, system_control.PORT_B, self.port_b)
        promise = self.ports.promise
        promise(system_control.PORT_B, self.pit.steady_until_ns)
        promise(i8042.STATUS_PORT, self.i8042.status_steady_until_ns)
        promise(uart.COM1_FIRST_PORT + uart.LSR, self.com1.line_status_steady_until_ns)
        promise(uart.COM2_FIRST_PORT + uart.LSR, self.com2.line_status_steady_until_ns)
        for port in vga.STATUS1_PORTS:
            promise(port, partial(self.vga.status1_steady_until_ns, port))
        register(system_control.PORT_A, system_control.PORT_A, self.port_a)
        register(system_control.RESET_PORT, system_control.RESET_PORT, self.reset_control)
        register(rtc.INDEX_PORT, rtc.DATA_PORT, self.rtc)
        register(debug_ports.POST_PORT, debug_ports.POST_PORT, self.post)
        register(*dma.PAGE_PORTS, self.dma)
        register(fpu_error.FIRST_PORT, fpu_error.LAST_PORT, self.fpu_error)
        register(*dma.SECOND_PORTS, self.dma)
        register(debug_ports.DEBUGCON_PORT, debug_ports.DEBUGCON_PORT, self.debugcon)
        register(uart.COM1_FIRST_PORT, uart.COM1_FIRST_PORT + uart.PORTS - 1, self.com1)
        register(uart.COM2_FIRST_PORT, uart.COM2_FIRST_PORT + uart.PORTS - 1, self.com2)
        for first, last in vga.PORT_RANGES:
            register(first, last, self.vga)
        register(fw_cfg.SELECTOR_PORT, fw_cfg.DATA_PORT, self.fw_cfg)
        register(fw_cfg.SELECTOR_PORT, fw_cfg.SELECTOR_PORT + 1, self.fw_cfg, _WORD)
        register(pci.ADDRESS_PORT, pci.ADDRESS_PORT + 3, self.pci, _DWORD)
        register(pci.FIRST_DATA_PORT, pci.LAST_DATA_PORT, self.pci, _ALL_WIDTHS)
        for port in debug_ports.POWER_PORTS:
            register(port, port + 1, self.power, _WORD)
        if self.ata is not None:
            register(ata.FIRST_PORT, ata.LAST_PORT, self.ata)
            register(ata.FIRST_PORT, ata.FIRST_PORT + 1, self.ata, _WORD)
            register(ata.FIRST_PORT, ata.FIRST_PORT + 3, self.ata, _DWORD)
            register(ata.CONTROL_PORT, ata.CONTROL_PORT, self.ata)
        if options.debug_exit_port is not None:
            first = options.debug_exit_port
            register(first, first + debug_ports.DEBUG_EXIT_PORTS - 1, self.debug_exit, _ALL_WIDTHS)

    def reset(self) -> None:
        """Pull RESET on every chip: what has a battery, and what people have typed, stays."""
        for device in self.devices.values():
            device.reset()

    def power_on(self) -> None:
        """The state in which power finds the board; the clock was reset before."""
        for device in self.devices.values():
            device.power_on()

    def raise_nmi(self) -> None:
        """Pull NMI, unless port 70h masks it."""
        if not self.rtc.nmi_masked:
            self.lines.raise_nmi()

    def describe(self, *names: str) -> str:
        """The state of the devices of these names, or of all, in lines for people; KeyError for an unknown name."""
        return "\n".join(self.devices[name].describe() for name in names or self.devices)

    def timers(self) -> Iterator[tuple[str, int]]:
        """What the devices have to do at a later time: device and timer, and when in virtual nanoseconds."""
        for name, device in self.devices.items():
            yield from ((f"{name}.{timer}", due_ns) for timer, due_ns in device.timers())

    def snapshot(self) -> dict[str, object]:
        """The state of every device by name; clock, lines, memory and disks are their owners' to save."""
        return {name: device.snapshot() for name, device in self.devices.items()}

    def restore(self, state: dict[str, object]) -> None:
        """Take the state from `snapshot` of a board with the same options; clock and lines were restored before.

        Raises:
            ValueError: a device is missing, unknown or another one.
        """
        if set(state) != set(self.devices):
            raise ValueError(f"the snapshot of a board holds {tuple(self.devices)}, not {tuple(state)}")
        for name, device in self.devices.items():
            match state[name]:
                case dict() as saved:
                    device.restore(saved)
                case saved:
                    raise ValueError(f"the snapshot of {name} is {type(saved).__name__}")


def _cmos(memory: PhysicalMemory, options: BoardOptions) -> dict[int, int]:
    geometries = []
    for disk in options.disks:
        shape = None if disk is None else disk.physical_geometry
        geometries.append(None if shape is None else (shape.cylinders, shape.heads, shape.sectors))
    return cmos_contents(
        memory.ram_bytes,
        floppy_types=options.floppy_types,
        disk_geometries=geometries,
        boot_order=options.boot_order,
        fpu=options.fpu,
    )


def _fw_cfg_items(memory: PhysicalMemory, options: BoardOptions) -> dict[int, bytes]:
    regions = e820.memory_map(memory.ram_bytes)
    return fw_cfg.pc_items(memory.ram_bytes, regions, options.command_line, files=options.fw_cfg_files)
