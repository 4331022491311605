"""The firmware's services in Python, called by the small ROM of rom.S.

They must not know how the guest is run: they see the caller's memory, the ports and the disks.
"""

from machine.bios.firmware import FIRMWARE_PORT, Caller, Firmware, rom
from machine.bios.frame import FirmwareCpu

__all__ = ["FIRMWARE_PORT", "Caller", "Firmware", "FirmwareCpu", "rom"]
