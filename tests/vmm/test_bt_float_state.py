"""`bt` and `trap` against `interp` where the state of the FPU is saved, loaded and initialized, if plain in the TC."""

from __future__ import annotations

import random

import pytest

from machine.faults import Vector
from machine.fpustate import MXCSR
from machine.state import CR0_TS, CR4_OSFXSR, EBX, EDX, ESI
from tests.oracles.assembler import assemble
from tests.vmm.bare import Bare, set_handler, set_page
from tests.vmm.test_bt_floating import DATA, HIDDEN, floating
from tests.vmm.twins import Twins

pytestmark = pytest.mark.usefixtures("other_engine")

AREA = 0x2_2000
IMAGES = 0x4_0000
COUNT = 32
IMAGE_BYTES = 512


@pytest.fixture(autouse=True)
def _enter_for_every_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmm.bt.MIN_BUDGET_INSNS", 1)


def skip(bytes_: int, *, error_code: bool) -> bytes:
    """A handler that counts in EBX and goes on behind an instruction of so many bytes."""
    return assemble(f"{'add esp, 4' if error_code else 'nop'}\nadd dword ptr [esp], {bytes_}\ninc ebx\niretd")


def with_images(bare: Bare) -> None:
    """What `floating` has, images with all kinds of bits, and handlers that skip 3 bytes."""
    floating(bare)
    for vector, has_code in ((Vector.NM, False), (Vector.UD, False), (Vector.GP, True), (Vector.PF, True)):
        set_handler(bare, vector, skip(3, error_code=has_code))
    chance = random.Random(7)
    for number in range(COUNT):
        image = bytearray(chance.randbytes(IMAGE_BYTES))
        image[0:4] = (0x027F | number << 8 & 0xC00).to_bytes(2, "little") + (number << 11 & 0x3800).to_bytes(
            2, "little"
        )
        image[MXCSR : MXCSR + 4] = (0x1F80 | chance.getrandbits(6) | chance.getrandbits(1) << 6).to_bytes(4, "little")
        match number % 8:
            case 1:
                image[2:4] = (0x8080 | chance.getrandbits(6)).to_bytes(2, "little")  # ES and B, but all is masked
            case 3:
                image[0:2] = chance.randbytes(2)  # reserved bits, unmasked exceptions
            case 5:
                image[0:4] = chance.randbytes(4)  # and pending ones
            case 7:
                image[MXCSR : MXCSR + 4] = (1 << chance.randrange(16, 32) | 0x1F80).to_bytes(4, "little")
        bare.memory.write(IMAGES + IMAGE_BYTES * number, bytes(image))


def callouts(twins: Twins) -> dict[str, object]:
    statistics = twins.other.engine.statistics()
    return {name: count for name, count in statistics.items() if name.startswith("callouts of ")}


def test_a_switch_of_tasks_stays_in_the_cache() -> None:
    source = f"""
    1:  fld qword ptr [{DATA}+8]
        sqrtpd xmm1, [{DATA}+16]
        fxsave [{AREA}]
        fninit
        fld1
        pxor xmm1, xmm1
        stmxcsr [{AREA}+0x200]
        ldmxcsr [{AREA}+0x200]
        fxsave [{AREA}+0x400]
        fxrstor [{AREA}]
        fstp qword ptr [{DATA}]
        fxrstor [{AREA}+0x400]
        fxsave [{AREA}+0x800]
        jmp 1b
    """
    with Twins(source, with_images) as twins:
        twins.run(280, (14, 3))
        before = callouts(twins)
        twins.run(2800, (700,))
        assert callouts(twins) == before


def test_images_with_any_bits() -> None:
    """What has reserved bits or pending exceptions is interpreted; the rest is loaded as the interpreter does."""
    source = f"""
    1:  fxrstor [esi]
        fxsave [{AREA}]
        fnstenv [{AREA}+0x200]
        add esi, {IMAGE_BYTES}
        inc edx
        cmp edx, {COUNT}
        jne 1b
        mov esi, {IMAGES}
        xor edx, edx
        jmp 1b
    """

    def prepare(bare: Bare) -> None:
        with_images(bare)
        bare.state.gpr[ESI] = IMAGES
        bare.state.gpr[EDX] = 0

    with Twins(source, prepare) as twins:
        twins.run(COUNT * 7 * 4, (5, 7, 31))
        assert twins.reference.state.gpr[EBX] >= 3 * (COUNT // 8)  # #GP for MXCSR


def test_mxcsr_with_any_bits() -> None:
    source = f"""
    1:  mov [{AREA}], edx
        stc
        ldmxcsr [esi]
        adc edi, 1
        stmxcsr [{AREA}+4]
        xor edx, edi
        rol edx, 5
        and edx, 0x3ffff
        jmp 1b
    """

    def prepare(bare: Bare) -> None:
        with_images(bare)
        bare.state.gpr[ESI] = AREA
        bare.state.gpr[EDX] = 0x1F80

    with Twins(source, prepare) as twins:
        twins.run(3000, (9, 100, 4))
        assert twins.reference.state.gpr[EBX] > 20


@pytest.mark.parametrize("operation", ["fxsave", "fxrstor", "ldmxcsr"])
@pytest.mark.parametrize(
    "address",
    [AREA + 8, AREA + 0xE00, AREA + 0xE10, HIDDEN - 0x100, HIDDEN + 0xF00, 0xFFFF_FF00, 0x1200],
)
def test_areas(operation: str, address: int) -> None:
    """Not aligned, in two pages, not there, behind the end of memory, and beside code."""

    def prepare(bare: Bare) -> None:
        with_images(bare)
        image = bare.memory.read(IMAGES, IMAGE_BYTES)
        if address < 0x10_0000:
            bare.memory.write(address, image)
        bare.state.gpr[ESI] = address

    source = f"1: stc\n{operation} [esi]\nadc edi, 0\nfld qword ptr [{DATA}]\nfstp st\ninc ecx\njmp 1b"
    with Twins(source, prepare) as twins:
        twins.run(150, (8, 3))


@pytest.mark.parametrize("operation", ["fxsave [esi]", "fxrstor [esi]", "ldmxcsr [esi]", "fninit\n.byte 0x90"])
@pytest.mark.parametrize("without", ["fxsr", "ts", "user"])
def test_rights(operation: str, without: str) -> None:
    """Without CR4.OSFXSR, with CR0.TS; or the area is read-only to all with CR0.WP set."""

    def prepare(bare: Bare) -> None:
        with_images(bare)
        bare.memory.write(AREA, bare.memory.read(IMAGES, IMAGE_BYTES))
        bare.state.gpr[ESI] = AREA
        if without == "fxsr":
            bare.state.cr4 &= ~CR4_OSFXSR
        elif without == "ts":
            bare.state.cr0 |= CR0_TS
        else:
            set_page(bare, AREA, AREA | 5)
            bare.state.cr0 |= 1 << 16

    source = f"1: stc\n{operation}\nadc edi, 0\ninc ecx\ncmp ecx, 9\njne 2f\nclts\n2: jmp 1b"
    with Twins(source, prepare) as twins:
        twins.run(200, (7, 3))


def test_a_lazy_switch_stays_in_the_cache(other_engine: str) -> None:
    source = f"""
    1:  mov eax, cr0
        or eax, 8
        mov cr0, eax
        mov esi, cr0
        clts
        fxrstor [{IMAGES}]
        fxsave [{AREA}]
        mov edi, cr0
        jmp 1b
    """
    with Twins(source, with_images) as twins:
        twins.run(90, (9, 2))
        before = callouts(twins)
        twins.run(1800, (450,))
        # Where a VMM wants to know of CR0, each is an exit.
        assert callouts(twins) == before or other_engine != "bt"


def test_any_bits_of_cr0_that_concern_the_fpu() -> None:
    """MP, EM and TS in all combinations; #NM and #UD clear EM and TS, and the instruction is tried again."""
    source = """
    1:  mov eax, cr0
        mov ecx, edx
        and ecx, 0xe
        and eax, 0xfffffff1
        or eax, ecx
        mov cr0, eax
        mov esi, cr0
        fld1
        fstp st
        movaps xmm0, xmm1
        mov cr0, eax
        fwait
        clts
        stc
        mov edi, cr0
        adc edx, 1
        movaps xmm1, xmm0
        mov cr0, eax
        movaps xmm1, xmm0
        jmp 1b
    """

    def prepare(bare: Bare) -> None:
        with_images(bare)
        handler = assemble("push eax\nmov eax, cr0\nand eax, 0xfffffff3\nmov cr0, eax\npop eax\ninc ebx\niretd")
        for vector in (Vector.NM, Vector.UD):
            set_handler(bare, vector, handler)

    with Twins(source, prepare) as twins:
        twins.run(2400, (700, 5, 31))
        assert twins.reference.state.gpr[EBX] > 50
