"""`bt` and `trap` against `interp` on segments that are not flat: bases, limits, rights, and loads of FS and GS."""

from __future__ import annotations

import random

import pytest

from tests.vmm.bare import GDT_BASE, Bare
from tests.vmm.streams import OFFSETS, SANDBOX, SANDBOX_PAGES, SEGMENT_KINDS, Program, Step, kinds_of_cases
from tests.vmm.test_bt_streams import run
from tests.vmm.twins import Twins

pytestmark = [
    pytest.mark.usefixtures("other_engine"),
    pytest.mark.parametrize("other_engine", ["bt", "trap"], indirect=True),
]

_FS_PREFIX = 0x64
_STEPS = 40
_EDGES = (SANDBOX - 1, SANDBOX + 0x0FFC, SANDBOX + 0x0FFF, SANDBOX + 0x1000, SANDBOX + 0x1001, SANDBOX + 0x1FFC)


@pytest.mark.parametrize("kind", range(len(SEGMENT_KINDS)), ids=[kind[0] for kind in SEGMENT_KINDS])
@pytest.mark.parametrize("user", [False, True])
def test_every_form_with_an_override(kind: int, user: bool) -> None:
    chance = random.Random(kind)
    cases = [case for case in kinds_of_cases() if case.instruction.memory_base or case.instruction.memory_displ_size]
    steps = [
        Step(
            case,
            _FS_PREFIX,
            chance.choice((*_EDGES, SANDBOX + 0x1000 * chance.randrange(SANDBOX_PAGES) + chance.choice(OFFSETS))),
            chance.randrange(64),
        )
        for case in chance.sample(cases, min(len(cases), 4 * _STEPS))
    ]
    for at in range(0, len(steps), _STEPS):
        registers = tuple(chance.getrandbits(32) for _ in range(8))
        program = Program(
            tuple(steps[at : at + _STEPS]),
            (0,) * (SANDBOX_PAGES + 2),
            user=user,
            write_protect=True,
            registers=registers,
            eflags=1,
            segments=(kind, 0),
        )
        run(program, 3 * _STEPS)


_DESCRIPTORS = {
    "based": "ffff3412 5693cf78",
    "short": "0f000050 00931000",
    "bytewise": "ffff0050 00934f00",
    "read only": "ffff0050 00914000",
    "not accessed": "ffff0050 00924000",
    "growing down": "ff0f0000 00974000",
    "code": "ffff0000 009b4f00",
    "absent": "ffff0000 00134f00",
    "system": "67000050 00890000",
}


@pytest.mark.parametrize("descriptor", _DESCRIPTORS)
@pytest.mark.parametrize("register", ["fs", "gs"])
def test_load_and_use(descriptor: str, register: str) -> None:
    """The third entry of the GDT is loaded, used and replaced, over and over."""

    def prepare(bare: Bare) -> None:
        bare.memory.write(GDT_BASE + 0x18, bytes.fromhex(_DESCRIPTORS[descriptor]))
        bare.state.gdtr.limit = 0x1F

    source = f"""
        mov ecx, 40
        xor esi, esi
    1:  mov eax, 0x18
        mov {register}, eax
        mov edx, {register}:[0x10]
        add edx, {register}:[esi+8]
        push dword ptr {register}:[esi]
        pop ebx
        xor eax, eax
        mov {register}, eax
        lea esi, [esi+2]
        rol word ptr [{GDT_BASE + 0x1A:#x}], 1
        loop 1b
        hlt
    """
    with Twins(source, prepare) as twins:
        twins.run(600, (7, 40, 1, 100))


def test_thread_local_storage_stays_in_the_tc() -> None:
    def prepare(bare: Bare) -> None:
        bare.memory.write(GDT_BASE + 0x18, bytes.fromhex("ffff0050 0093cf00"))
        bare.state.gdtr.limit = 0x1F

    source = """
        mov eax, 0x18
        mov gs, eax
    1:  mov ebx, gs:[8]
        inc dword ptr gs:[8]
        mov eax, gs:[ebx*4]
        mov gs:[0x10], ah
        add ch, gs:[0x10]
        xor cs:[0x1000], cl
        cmp byte ptr cs:[0x1000], 0
        jmp 1b
    """
    with Twins(source.replace("xor cs:[0x1000], cl", "and cl, cs:[0x1000]"), prepare) as twins:
        twins.run(20_000)
        assert twins.count("callouts") < 40
