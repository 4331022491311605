"""The 8042 keyboard controller: ports 60h and 64h, IRQ 1 and IRQ 12, and its output port with A20 and CPU reset.

It must not know what hangs on its two PS/2 ports, nor what A20 and reset do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol

from machine.clock import Clock
from machine.devices.device import Device, Line, Timer
from machine.devices.ps2_keyboard import SET2_TO_SET1
from machine.devices.system_control import A20Gate
from machine.ports import FOR_EVER_NS

DATA_PORT = 0x60
STATUS_PORT = 0x64

_STATUS_OUTPUT_FULL = 0x01
_STATUS_SYSTEM = 0x04
_STATUS_COMMAND = 0x08
_STATUS_UNLOCKED = 0x10
_STATUS_FROM_AUX = 0x20

_CONFIG_KEYBOARD_IRQ = 0x01
_CONFIG_AUX_IRQ = 0x02
_CONFIG_SYSTEM = 0x04
_CONFIG_KEYBOARD_OFF = 0x10
_CONFIG_AUX_OFF = 0x20
_CONFIG_TRANSLATE = 0x40

_OUTPUT_NOT_RESET = 0x01
_OUTPUT_A20 = 0x02
_OUTPUT_KEYBOARD_IRQ = 0x10
_OUTPUT_AUX_IRQ = 0x20
_OUTPUT_ONES = 0xCC
_INPUT_PORT = 0x80

_RAM_BYTES = 32
_NONE = -1
_AUX = 0x100
_BREAK = 0xF0

# A byte on the wire takes about a millisecond. Here it takes ten microseconds, so that a handler may read port 60h
# twice and find the same byte, as handlers that chain to the BIOS do, without making a guest wait for long.
_BYTE_NS = 10_000


class Ps2Device(Protocol):
    """What can be plugged into a PS/2 port."""

    @property
    def pending(self) -> bool:
        """True if `take` has a byte."""
        ...

    def take(self) -> int:
        """The next byte that the device sends."""
        ...

    def write(self, value: int) -> None:
        """A byte for the device."""
        ...


class I8042(Device):
    """The controller, with translation of scan code set 2 to set 1.

    Its own reply is there at once, but waits for a byte that has not been read. Bytes of the devices follow each other
    at a distance; the first comes at once.

    Source: IBM PS/2 Hardware Interface Technical Reference, "Keyboard and Auxiliary Device Controller".
    """

    _saved: ClassVar[tuple[str, ...]] = (
        "ram", "data", "output_full", "from_aux", "command_written", "awaiting", "reply", "break_seen", "ready_ns",
        "keyboard_irq", "aux_irq", "timer",
    )  # fmt: skip

    def __init__(
        self, clock: Clock, keyboard_irq: Line, aux_irq: Line, a20: A20Gate, request_reset: Callable[[], None]
    ) -> None:
        self._clock = clock
        self._drive_keyboard_irq = keyboard_irq
        self._drive_aux_irq = aux_irq
        self._a20 = a20
        self._request_reset = request_reset
        self._keyboard: Ps2Device | None = None
        self._aux: Ps2Device | None = None
        self.ram = bytearray(_RAM_BYTES)
        self.timer = Timer(clock, self.update)
        self.keyboard_irq = self.aux_irq = False
        self.reset()

    def plug(self, keyboard: Ps2Device, aux: Ps2Device) -> None:
        """Connect the two ports; each device calls `update` when it has something."""
        self._keyboard = keyboard
        self._aux = aux

    def reset(self) -> None:
        """Both ports on, without interrupts and without translation: the firmware sets those."""
        self.ram[:] = bytes(_RAM_BYTES)
        self.data = 0
        self.output_full = False
        self.from_aux = False
        self.command_written = True
        self.awaiting = _NONE
        self.reply = _NONE
        self.break_seen = False
        self.ready_ns = 0
        self.timer.disarm()
        self._drive()

    @property
    def _config(self) -> int:
        return self.ram[0]

    def update(self) -> None:
        """Move the next byte into the empty output buffer, and drive the interrupt lines."""
        if not self.output_full:
            self._fill()
        self._drive()

    def _speaker(self) -> Ps2Device | None:
        """The device whose byte comes next; the keyboard goes first."""
        keyboard, aux = self._keyboard, self._aux
        if keyboard is not None and keyboard.pending and not self._config & _CONFIG_KEYBOARD_OFF:
            return keyboard
        if aux is not None and aux.pending and not self._config & _CONFIG_AUX_OFF:
            return aux
        return None

    def _fill(self) -> None:
        if self.reply != _NONE:
            self._put(self.reply & 0xFF, from_aux=bool(self.reply & _AUX))
            self.reply = _NONE
            return
        while (device := self._speaker()) is not None:
            if self._clock.now_ns < self.ready_ns:
                self.timer.arm(self.ready_ns)
                return
            byte = device.take()
            if device is self._aux:
                self._put(byte, from_aux=True)
                return
            if self._config & _CONFIG_TRANSLATE:
                # The break prefix is swallowed, and the code after it is at hand.
                if byte == _BREAK:
                    self.break_seen = True
                    continue
                byte = SET2_TO_SET1[byte] | (0x80 if self.break_seen else 0)
                self.break_seen = False
            self._put(byte, from_aux=False)
            return

    def _put(self, byte: int, *, from_aux: bool) -> None:
        self.data = byte
        self.output_full = True
        self.from_aux = from_aux

    def _drive(self) -> None:
        keyboard = self.output_full and not self.from_aux and bool(self._config & _CONFIG_KEYBOARD_IRQ)
        aux = self.output_full and self.from_aux and bool(self._config & _CONFIG_AUX_IRQ)
        if keyboard != self.keyboard_irq:
            self.keyboard_irq = keyboard
            self._drive_keyboard_irq(keyboard)
        if aux != self.aux_irq:
            self.aux_irq = aux
            self._drive_aux_irq(aux)

    def load_port(self, port: int, size_bytes: int) -> int:  # noqa: ARG002
        """60h: the output buffer; 64h: the status."""
        if port == STATUS_PORT:
            return self._status
        byte = self.data
        if self.output_full:
            self.output_full = False
            self.ready_ns = self._clock.now_ns + _BYTE_NS
            # The line falls before the next byte lifts it again.
            self._drive()
            self.update()
        return byte

    @staticmethod
    def status_steady_until_ns() -> int:
        """For ever: it changes when something else happens."""
        return FOR_EVER_NS

    @property
    def _status(self) -> int:
        status = _STATUS_UNLOCKED
        if self.output_full:
            status |= _STATUS_OUTPUT_FULL | (_STATUS_FROM_AUX if self.from_aux else 0)
        if self._config & _CONFIG_SYSTEM:
            status |= _STATUS_SYSTEM
        if self.command_written:
            status |= _STATUS_COMMAND
        return status

    def store_port(self, port: int, size_bytes: int, value: int) -> None:  # noqa: ARG002
        """60h: a byte for a device, or for the command before; 64h: a command for the controller."""
        self.command_written = port == STATUS_PORT
        if port == STATUS_PORT:
            self._obey(value)
        else:
            self._take_data(value)
        self.update()

    def _take_data(self, value: int) -> None:
        command, self.awaiting = self.awaiting, _NONE
        if command == _NONE:
            # A byte for the keyboard switches its port on.
            self.ram[0] &= ~_CONFIG_KEYBOARD_OFF
            if self._keyboard is not None:
                self._keyboard.write(value)
        elif command < 0x80:
            self.ram[command & _RAM_BYTES - 1] = value
        elif command == 0xD1:
            self._a20.set_enabled(bool(value & _OUTPUT_A20))
            if not value & _OUTPUT_NOT_RESET:
                self._request_reset()
        elif command == 0xD2:
            self.reply = value
        elif command == 0xD3:
            self.reply = value | _AUX
        elif self._aux is not None:
            self.ram[0] &= ~_CONFIG_AUX_OFF
            self._aux.write(value)

    def _obey(self, command: int) -> None:
        self.awaiting = _NONE
        match command:
            case _ if 0x20 <= command <= 0x3F:
                self.reply = self.ram[command & _RAM_BYTES - 1]
            case _ if 0x60 <= command <= 0x7F or 0xD1 <= command <= 0xD4:
                self.awaiting = command
            case 0xA7:
                self.ram[0] |= _CONFIG_AUX_OFF
            case 0xA8:
                self.ram[0] &= ~_CONFIG_AUX_OFF
            case 0xA9 | 0xAB:
                # The lines of the port are neither stuck low nor high.
                self.reply = 0x00
            case 0xAA:
                self.ram[0] |= _CONFIG_SYSTEM
                self.reply = 0x55
            case 0xAD:
                self.ram[0] |= _CONFIG_KEYBOARD_OFF
            case 0xAE:
                self.ram[0] &= ~_CONFIG_KEYBOARD_OFF
            case 0xC0:
                self.reply = _INPUT_PORT
            case 0xD0:
                self.reply = self._output_port
            case 0xDD | 0xDF:
                self._a20.set_enabled(command == 0xDF)
            case 0xE0:
                self.reply = 0x00
            case _ if command >= 0xF0 and not command & _OUTPUT_NOT_RESET:
                # Bits that are 0 pulse their line of the output port; only that of bit 0 leads anywhere.
                self._request_reset()

    @property
    def _output_port(self) -> int:
        port = _OUTPUT_ONES | _OUTPUT_NOT_RESET
        if self._a20.enabled:
            port |= _OUTPUT_A20
        if self.output_full:
            port |= _OUTPUT_AUX_IRQ if self.from_aux else _OUTPUT_KEYBOARD_IRQ
        return port

    def describe(self) -> str:
        """Registers and lines."""
        return (
            f"i8042: status={self._status:02x} config={self._config:02x} data={self.data:02x} "
            f"irq1={int(self.keyboard_irq)} irq12={int(self.aux_irq)}"
        )
