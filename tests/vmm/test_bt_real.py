"""`bt` against `interp` where real mode goes from segment to segment: far JMP, CALL and RET, INT n and IRET."""

from __future__ import annotations

import random
from functools import partial

import pytest

from machine.state import CS, EBX, ECX, ESP, SS
from tests.oracles.assembler import assemble
from tests.vmm.bare import ORIGIN, Bare, real
from tests.vmm.engines import bt_alone
from tests.vmm.twins import Twins
from vmm.native import modes, spaces
from vmm.native.inspection import Inspectable

pytestmark = pytest.mark.usefixtures("native_core")

STEPS = (400, 33)
SEGMENTS = (0x2000, 0x2100, 0x2008, 0x3FF8, 0x1, 0x7000)  # some overlap, one has a base that is no page
VECTOR = 0x60


def place(bare: Bare, selector: int, offset: int, source: str) -> None:
    """Code at selector:offset."""
    bare.memory.write((selector << 4) + offset, assemble(source, bits=16, origin=offset))


def set_vector(bare: Bare, vector: int, selector: int, offset: int) -> None:
    bare.memory.store(4 * vector, 4, selector << 16 | offset)


def prepare(bare: Bare) -> None:
    """In each segment: a routine at 100h, one that jumps on at 200h, and a handler at 300h."""
    for number, selector in enumerate(SEGMENTS):
        following = SEGMENTS[(number + 1) % len(SEGMENTS)]
        place(bare, selector, 0x100 + number, f"add bx, {number + 1}\nadc dx, bx\nretf")
        place(bare, selector, 0x140 + number, f"rol bx, 1\nlcall {following:#x}, {0x100 + (number + 1) % 6:#x}\nretf 2")
        place(bare, selector, 0x180 + number, f"sub bx, dx\nljmp {following:#x}, {0x140 + (number + 1) % 6:#x}")
        handler = "pushf\npop si\nadd di, si\nxor bx, 0x55\ncmp bx, dx\niret"
        handler = handler if number & 1 else "xor dx, bx\nsti\niret"
        place(bare, selector, 0x1C0 + number, handler)
        set_vector(bare, VECTOR + number, selector, 0x1C0 + number)
    place(bare, 0, 0x900, "push bp\nmov bp, sp\nand word ptr [bp + 6], 0xfeff\npop bp\ninc di\niret")
    set_vector(bare, 1, 0, 0x900)


LOOPS = {
    "call and return": "lcall 0x2000, 0x100\nlcall 0x2100, 0x101\nlcall 0x2008, 0x102\nlcall 0x3ff8, 0x103",
    "nested": "push cx\nlcall 0x2000, 0x140\npush cx\nlcall 0x7000, 0x145\npush ax\nlcall 1, 0x144",
    "jump": "push bx\nlcall 0x2000, 0x180\npush bx\nlcall 0x3ff8, 0x183",
    "interrupts": "int 0x60\nint 0x61\nint 0x62\nint 0x63\nint 0x64\nint 0x65",
    "flags kept": """
        stc
        std
        int 0x60
        adc ax, 1
        cld
        int 0x61
        sbb dx, ax
        cli
        int 0x62
        sti
        pushf
        pop si
        add di, si
    """,
    "indirect": """
        mov word ptr [0x500], 0x102
        mov word ptr [0x502], 0x2008
        lcall [0x500]
        mov si, 0x4fe
        lcall [si + 2]
    """,
    "as a jump": """
        mov word ptr [0x500], offset 2f
        mov word ptr [0x502], cs
        ljmp [0x500]
        nop
        2: inc bx
    """,
    "alias": "ljmp 0x10, offset 2f - 0x100\n2: inc bx\nljmp 0, offset 3f\n3: inc dx",
    "wide": "data32 lcall 0x2000, 0x1a0",
    "pushed": """
        push cs
        mov ax, offset 2f
        push ax
        retf
        2: pushf
        push cs
        mov ax, offset 3f
        push ax
        iret
        3: inc bx
    """,
    "flags popped": """
        mov ax, 0x7ad7
        and ax, 0xfdff
        push ax
        push cs
        mov ax, offset 2f
        push ax
        iret
        2: pushf
        pop si
        add di, si
        push 2
        popf
    """,
    "direction popped": """
        pushf
        pop ax
        xor ah, 4
        push ax
        push cs
        mov ax, offset 2f
        push ax
        iret
        2: pushf
        pop si
        add di, si
        mov si, 0x500
        lodsb
        add dx, si
    """,
    "alignment check": """
        pushfd
        or dword ptr [0x7ffc], 0x40000
        popfd
        int 0x61
        pushfd
        pop esi
        add edi, esi
    """,
    "trap flag": """
        pushf
        pop ax
        or ah, 1
        push ax
        push cs
        mov ax, offset 2f
        push ax
        iret
        2: inc bx
        inc dx
    """,
    "unreal stack": """
        mov ax, 0x1000
        mov ss, ax
        mov sp, 6
        int 0x60
        mov sp, 4
        lcall 0x2000, 0x100
        xor ax, ax
        mov ss, ax
        mov sp, 0x7000
    """,
    "wrap": """
        mov sp, 4
        int 0x61
        mov sp, 2
        lcall 0x2000, 0x100
        mov sp, 0
        lcall 0x2000, 0x100
        mov sp, 0x7000
    """,
    "pop at the end": "mov sp, 0xfffc\nlcall 0x2000, 0x100\nmov sp, 0x7000",
}


@pytest.mark.parametrize("name", LOOPS)
def test_loops(name: str) -> None:
    def prepare_all(bare: Bare) -> None:
        prepare(bare)
        place(bare, 0x2000, 0x1A0, "inc bx\ndata32 retf")
        place(bare, 0, 0xFFF0, "nop")

    with Twins(f"1: inc cx\n{LOOPS[name]}\njmp 1b", prepare_all, make_guest=real) as twins:
        twins.run(3000, STEPS)
        assert twins.reference.state.gpr[ECX] & 0xFFFF > 50


@bt_alone
@pytest.mark.parametrize("name", ["call and return", "nested", "jump", "interrupts", "indirect", "pushed"])
def test_they_stay_in_the_translation_cache(name: str) -> None:
    with Twins(f"1: inc cx\n{LOOPS[name]}\njmp 1b", prepare, make_guest=real) as twins:
        twins.run(2000)
        before = twins.count("callouts")
        twins.run(6000)
        assert twins.count("callouts") - before < 20


@bt_alone
def test_more_segments_than_are_remembered() -> None:
    """Some of them go by callouts, and come to the right place."""

    def prepare_many(bare: Bare) -> None:
        for number in range(100):
            place(bare, 0x2000 + 0x40 * number, 0x80, f"add bx, {number}\nrol bx, 1\nretf")

    source = """
        again: mov word ptr [0x500], 0x80
        mov word ptr [0x502], 0x2000
        1: lcall [0x500]
        add word ptr [0x502], 0x40
        cmp word ptr [0x502], 0x3900
        jne 1b
        inc cx
        jmp again
    """
    with Twins(source, prepare_many, make_guest=real) as twins:
        twins.run(6000, (3000, 77))
        assert twins.reference.state.gpr[ECX]


@bt_alone
def test_more_modes_than_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment that comes back has a new table, and finds the code that it had."""
    monkeypatch.setattr(spaces, "MAX_OTHER_TABLES", 2)
    monkeypatch.setattr(modes, "_MAX_SIGNATURES", 2)

    def prepare_calls(bare: Bare) -> None:
        for selector in SEGMENTS[:4]:
            place(bare, selector, 0x100, "mov cx, 40\nmov si, offset 2f\n1: call si\nloop 1b\nretf\n2: inc bx\nret")

    calls = "\n".join(f"lcall {selector:#x}, 0x100" for selector in SEGMENTS[:4])
    with Twins(f"1: {calls}\njmp 1b", prepare_calls, make_guest=real) as twins:
        twins.run(2000)
        before = twins.count("dispatch misses")
        twins.run(4000)
        assert twins.count("dispatch misses") - before < 200


@bt_alone
def test_the_fragments_for_a_byte_of_a_segment() -> None:
    """Its place in the page is not that of its offset."""
    with Twins("1: lcall 0x2008, 0x102\njmp 1b", prepare, make_guest=real) as twins:
        twins.run(400)
        engine = twins.other.engine
        assert isinstance(engine, Inspectable)
        assert [fragment.eip for fragment in engine.translations().covering(0x2_0080 + 0x102)] == [0x102]


def test_a_stack_in_the_page_of_the_code() -> None:
    """The push of a far CALL makes the page data, so that the CALL's own block is forgotten while it is executed."""

    def prepare_other_code(bare: Bare) -> None:
        prepare(bare)
        place(bare, 0, 0x100, "not dx\nretf")  # at the same offset in the segment that the CALL leaves

    source = f"mov sp, {ORIGIN + 0x800:#x}\n1: lcall 0x2000, 0x100\ninc cx\njmp 1b"
    with Twins(source, prepare_other_code, make_guest=real) as twins:
        twins.run(4000, STEPS)


def test_code_of_a_segment_is_written_to() -> None:
    source = """
        1: lcall 0x2000, 0x100
        int 0x61
        xor byte ptr [0x1], 0xff
        mov ax, 0x2010
        mov ds, ax
        xor byte ptr [0], 0x28
        xor ax, ax
        mov ds, ax
        inc cx
        jmp 1b
    """
    with Twins(source, prepare, make_guest=real) as twins:
        twins.run(4000, STEPS)
        assert twins.reference.state.gpr[EBX]


def test_protected_mode_and_back() -> None:
    """As boot loaders do for each service of the BIOS."""
    source = """
        lgdt [0x600]
        again: lcall 0x2000, 0x100
        int 0x61
        cli
        mov eax, cr0
        or al, 1
        mov cr0, eax
        ljmp 8, offset 1f
        1: .code32
        mov ax, 0x10
        mov ds, ax
        mov ss, ax
        inc ebx
        call 2f
        ljmp 0x18, offset 3f
        2: add edx, ebx
        ret
        3: .code16
        mov eax, cr0
        and al, 0xfe
        mov cr0, eax
        ljmp 0, offset 4f
        4: mov ax, 0
        mov ds, ax
        mov ss, ax
        lcall 0x2100, 0x101
        int 0x60
        inc cx
        jmp again
    """

    def prepare_tables(bare: Bare) -> None:
        prepare(bare)
        bare.memory.write(0x600, bytes.fromhex("1f 00 10 06 00 00"))
        descriptors = "0000000000000000 ffff0000009bcf00 ffff00000093cf00 ffff0000009b0000"
        bare.memory.write(0x610, bytes.fromhex(descriptors))

    with Twins(source, prepare_tables, make_guest=real) as twins:
        twins.run(4000, STEPS)
        assert twins.reference.state.gpr[ECX] & 0xFFFF > 20


def prepare_stack(bare: Bare, limit: int) -> None:
    prepare(bare)
    stack = bare.state.segments[SS]
    stack.load(0x1000, 0x1_0000, limit, stack.attributes)
    for at in range(0x1_7FF0, 0x1_8010, 2):
        bare.memory.store(at, 2, 0x100 if at & 2 else 0x2000)
    bare.memory.store(0x500, 4, 0x2000_0100)
    for vector in (0x0C, 0x0D):
        set_vector(bare, vector, 0, 0x900)


@bt_alone
@pytest.mark.parametrize("limit", [0x7FFF, 0xFFFF])
@pytest.mark.parametrize("work", ["retf", "iret", "retf 6"])
def test_pops_at_the_ends_of_the_stack(work: str, limit: int) -> None:
    def go(bare: Bare, sp: int) -> None:
        code = bare.state.segments[CS]
        code.load(0, 0, 0xFFFF, code.attributes)
        bare.state.gpr[ESP], bare.state.eip = sp, ORIGIN

    with Twins(f"mov cx, 3\n1: loop 1b\n{work}", lambda bare: prepare_stack(bare, limit), make_guest=real) as twins:
        for sp in (*range(0x7FF8, 0x8000), *range(0xFFF8, 0x1_0000)) if limit > 0x7FFF else range(0x7FF4, 0x7FFE):
            for _ in range(3):
                twins.each(partial(go, sp=sp))
                twins.run(6)


@bt_alone
@pytest.mark.parametrize("sp", [0x7FFF, 0x8000, 0x8001, 0x8003, 0x8006])
@pytest.mark.parametrize("work", ["lcall 0x2000, 0x100", "int 0x61", "lcall [0x500]"])
def test_pushes_at_the_end_of_the_stack(work: str, sp: int) -> None:
    """There is no delivering a fault of the stack on the same stack."""
    source = f"mov sp, 0x4000\nlcall 0x2000, 0x100\nmov cx, 40\n1: loop 1b\nmov sp, {sp}\n{work}\ninc di\n2: jmp 2b"
    with Twins(source, lambda bare: prepare_stack(bare, 0x7FFF), make_guest=real) as twins:
        twins.run(100)


@pytest.mark.parametrize("seed", range(12))
def test_random_walks(seed: int) -> None:
    """From routine to routine by whatever way, with a stack and a limit of CS or SS that may be odd."""
    chance = random.Random(seed)

    def prepare_walk(bare: Bare) -> None:
        prepare(bare)
        state = bare.state
        state.gpr[ESP] = draw.choice((0x7000, 0x7001, 0x18, 0xFFFE))
        stack = state.segments[SS]
        stack.load(stack.selector, 0, draw.choice((0xFFFF, 0xFFFF, 0x7FFF, 0xF_FFFF)), stack.attributes)
        code = state.segments[CS]
        code.load(code.selector, 0, draw.choice((0xFFFF, 0xFFFF, 0x3FFF)), code.attributes)
        set_vector(bare, 0x0D, 0, ORIGIN)
        set_vector(bare, 0x0C, 0, ORIGIN)

    ways = (
        "int {vector}",
        "lcall {segment:#x}, {routine:#x}",
        "push ax\nlcall {segment:#x}, {nested:#x}",
        "push ax\nlcall {segment:#x}, {jump:#x}",
        "sti",
        "cli",
        "stc\nrcl bx, 1",
        "push ax",
        "pop ax",
    )
    lines = []
    for _ in range(30):
        number = chance.randrange(len(SEGMENTS))
        lines.append(
            chance.choice(ways).format(
                vector=VECTOR + number,
                segment=SEGMENTS[number],
                routine=0x100 + number,
                nested=0x140 + number,
                jump=0x180 + number,
            )
        )
    source = "1: inc cx\n" + "\n".join(lines) + "\njmp 1b"
    state_seed = chance.random()
    draw = random.Random(state_seed)

    def prepare_both(bare: Bare) -> None:
        draw.seed(state_seed)
        prepare_walk(bare)

    with Twins(source, prepare_both, make_guest=real) as twins:
        twins.run(3000, STEPS)
