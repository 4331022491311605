"""Guests that ship, and images, under an engine and under `interp`, cut into pieces of random length.

It must not know the guests; what they are to do is the test's business.
"""

from __future__ import annotations

from guests import images
from machine.cpuid import P6_NO_FPU, CpuModel
from machine.loaders.image import LoadOptions
from machine.pc import MachineOptions
from tests.vmm.bare import EngineMaker, host_alu
from vmm import lockstep
from vmm.interp import Interpreter
from vmm.lockstep import Input, Outcome, Side, random_icounts
from vmm.native.hostfpu import HostFpu


def compare(
    engine: EngineMaker,
    image: str | bytes,
    append: str = "",
    *,
    total: int,
    longest: int,
    seed: int = 1,
    inputs: tuple[Input, ...] = (),
    ns_per_insn: int = 1,
    model: CpuModel = P6_NO_FPU,
) -> Outcome:
    """Run a guest in lockstep, which must not part; `image` is one by its name, or the bytes of one.

    Args:
        engine: makes what is compared with `interp`.
        total: instructions, if the guest does not stop before.
        longest: the most instructions between two comparisons.
    """
    options = MachineOptions(
        image=images.path(image) if isinstance(image, str) else image,
        model=model,
        make_fpu=HostFpu,
        loading=LoadOptions(ram_bytes=8 << 20, command_line=append),
        ns_per_insn=ns_per_insn,
    )

    def side(make: EngineMaker) -> Side:
        return lockstep.machine_side(options, lambda machine: make(machine.cpu, machine.debug), host_alu())

    outcome = lockstep.run(lambda: (side(Interpreter), side(engine)), random_icounts(total, seed, longest), inputs)
    assert outcome.divergence is None, str(outcome.divergence)
    return outcome
