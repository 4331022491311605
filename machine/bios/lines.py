"""INT 14h, serial lines, and INT 17h, printers, of which there are none.

It must not know the UART but by its registers.

Source: IBM PS/2 and PC BIOS Interface Technical Reference, "Interrupt 14H" and "Interrupt 17H".
"""

from machine.bios import bda
from machine.bios.frame import CallFrame
from machine.bios.platform import Platform

_DATA = 0
_INTERRUPT_ENABLE = 1
_LINE_CONTROL = 3
_MODEM_CONTROL = 4
_LINE_STATUS = 5
_MODEM_STATUS = 6
_DIVISOR_ACCESS = 0x80
_DATA_READY = 0x01
_HOLDING_EMPTY = 0x20
_DTR_RTS = 0x03
_TIMED_OUT = 0x80
_DIVISORS = (1047, 768, 384, 192, 96, 48, 24, 12)  # 110 to 9600 baud of 115200
#: About this many interrupts (ticks, above all) come in a second of waiting.
_ATTEMPTS_A_SECOND = 18
_PORTS = 4
_PRINTERS = 3


def serial_service(platform: Platform, frame: CallFrame) -> None:
    """INT 14h for the line in DX: 00h set up, 01h send, 02h receive, 03h status; CF set where there is no line."""
    base = platform.load(bda.COM_PORTS + 2 * frame.dx, 2) if frame.dx < _PORTS else 0
    if base == 0:
        frame.carry = True
        return
    function = _SERIAL.get(frame.ah)
    if function is not None:
        function(platform, frame, base)


def printer_service(platform: Platform, frame: CallFrame) -> None:
    """INT 17h for the printer in DX: it times out."""
    if frame.dx < _PRINTERS and platform.load(bda.LPT_PORTS + 2 * frame.dx, 2) == 0:
        frame.ah = 0x01


def _set_up(platform: Platform, frame: CallFrame, base: int) -> None:
    divisor = _DIVISORS[frame.al >> 5]
    platform.write_port(base + _LINE_CONTROL, _DIVISOR_ACCESS)
    platform.write_port(base + _DATA, divisor)
    platform.write_port(base + _INTERRUPT_ENABLE, divisor >> 8)
    platform.write_port(base + _LINE_CONTROL, frame.al & 0x1F)
    platform.write_port(base + _INTERRUPT_ENABLE, 0)
    _status(platform, frame, base)


def _send(platform: Platform, frame: CallFrame, base: int) -> None:
    platform.write_port(base + _MODEM_CONTROL, platform.read_port(base + _MODEM_CONTROL) | _DTR_RTS)
    status = platform.read_port(base + _LINE_STATUS)
    if status & _HOLDING_EMPTY:
        platform.write_port(base + _DATA, frame.al)
        frame.ah = status & ~_TIMED_OUT
    else:
        _wait(platform, frame, status)


def _receive(platform: Platform, frame: CallFrame, base: int) -> None:
    status = platform.read_port(base + _LINE_STATUS)
    if status & _DATA_READY:
        frame.al = platform.read_port(base + _DATA)
        frame.ah = status & 0x1E
    else:
        _wait(platform, frame, status)


def _wait(platform: Platform, frame: CallFrame, status: int) -> None:
    seconds = platform.load(bda.COM_TIMEOUTS + frame.dx, 1)
    if frame.attempt < seconds * _ATTEMPTS_A_SECOND:
        frame.wait()
    else:
        frame.ah = status | _TIMED_OUT


def _status(platform: Platform, frame: CallFrame, base: int) -> None:
    frame.ah = platform.read_port(base + _LINE_STATUS)
    frame.al = platform.read_port(base + _MODEM_STATUS)


_SERIAL = {0x00: _set_up, 0x01: _send, 0x02: _receive, 0x03: _status}
