"""Which CPU the command line gives the guest, and what computes floating point for it on this host.

It must not know what the models differ in.
"""

from __future__ import annotations

import platform

from gdbstub.cli_options import DEFAULT_CPU
from machine.cpuid import MODELS, CpuModel
from machine.fpu import FpuPort
from machine.fpustate import FpuState
from machine.pc import FpuFactory

WITHOUT_FPU = "p6-nofpu"


def computes_floating_point() -> bool:
    """Whether this host can be the guest's FPU: it computes x87, MMX, SSE and SSE2 with its own."""
    return platform.machine() in ("x86_64", "AMD64") and platform.system() == "Linux"


def default_model() -> str:
    """The name of the model that a guest gets that is not given one."""
    return DEFAULT_CPU if computes_floating_point() else WITHOUT_FPU


def choose(name: str | None) -> tuple[CpuModel, FpuFactory | None]:
    """The model of a name (None: the default), and what makes its FPU.

    Raises:
        ValueError: this host cannot be that CPU; the text is for the user.
    """
    name = name or default_model()
    model = MODELS[name]
    if not model.has_fpu:
        return model, None
    if not computes_floating_point():
        message = f"--cpu {name}: its FPU is this host's own, which must be Linux on x86-64; there is: {WITHOUT_FPU}"
        raise ValueError(message)
    return model, _host_fpu


def _host_fpu(registers: FpuState) -> FpuPort:
    from vmm.native.hostfpu import HostFpu

    return HostFpu(registers)
