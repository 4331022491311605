"""`bt` against `interp` where a loop polls a port: what is passed over has no effect that one could see."""

from __future__ import annotations

import pytest

from machine.devices.pit import Pit
from machine.devices.system_control import PORT_B, PortB
from machine.state import EBX, EDX
from tests.vmm.bare import Bare, EngineMaker, flat
from tests.vmm.engines import bt_alone
from tests.vmm.twins import Twins

pytestmark = [pytest.mark.usefixtures("native_core"), bt_alone]

PORT = 0x50
PERIOD_NS = 700
COUNTER = 0x6000


class Toggle:
    """A device on port 50h whose bit 0 changes every PERIOD_NS; a write inverts bit 1."""

    def __init__(self, bare: Bare, *, promises: bool = True) -> None:
        self.clock = bare.clock
        self.loads = self.bit = 0
        bare.ports.register(PORT, PORT, self)
        if promises:
            bare.ports.promise(PORT, self.steady_until_ns)

    def load_port(self, _port: int, _size_bytes: int) -> int:
        self.loads += 1
        return self.clock.now_ns // PERIOD_NS & 1 | self.bit

    def store_port(self, _port: int, _size_bytes: int, _value: int) -> None:
        self.bit ^= 2

    def steady_until_ns(self) -> int:
        return (self.clock.now_ns // PERIOD_NS + 1) * PERIOD_NS


def polls(wait: str) -> str:
    """Waits for a one and a zero in turns, and counts in EBX."""
    return f"""
        again: mov eax, 0
        inc ebx
        rdtsc
        xor edi, eax
        {wait.replace("WHILE", "jz")}
        {wait.replace("WHILE", "jnz")}
        jmp again
    """


LOOPS = {
    "plain": "1: in al, 0x50\ntest al, 1\nWHILE 1b",
    "by register": "mov edx, 0x50\n1: in al, dx\nand al, 1\nWHILE 1b",
    "rotated": "jmp 2f\n1: nop\n2: in al, 0x50\ntest al, 1\nWHILE 1b",
    "with work": "1: in al, 0x50\nmov ecx, [0x6000]\nlea esi, [ecx + 5]\nshl esi, 1\ntest al, 1\nWHILE 1b",
    "with a way around": "1: in al, 0x50\ntest ebx, 1\njz 2f\nnop\n2: test al, 1\nWHILE 1b",
    "counting in a register": "1: inc ecx\nin al, 0x50\ntest al, 1\nWHILE 1b",
    "counting in memory": "1: inc dword ptr [0x6000]\nin al, 0x50\ntest al, 1\nWHILE 1b",
    "counting by way of a register": """
        1: mov ecx, [0x6000]
        inc ecx
        mov [0x6000], ecx
        xor ecx, ecx
        in al, 0x50
        test al, 1
        WHILE 1b
    """,
    "counting out of line": """
        jmp 1f
        3: inc dword ptr [0x6000]
        test al, 1
        ret
        1: in al, 0x50
        call 3b
        WHILE 1b
    """,
    "counting far away": """
        jmp 1f
        .skip 300
        3: inc dword ptr [0x6000]
        jmp 4f
        1: in al, 0x50
        jmp 3b
        4: test al, 1
        WHILE 1b
    """,
    "with time": "1: in al, 0x50\nmov ch, al\nrdtsc\nadd edi, eax\nmov al, ch\nmov edx, 0\ntest al, 1\nWHILE 1b",
    "with a write": "1: out 0x50, al\nin al, 0x50\ntest al, 1\nWHILE 1b",
    "with two reads": "1: in al, 0x50\nmov ah, al\nin al, 0x50\nand al, ah\ntest al, 1\nWHILE 1b",
    "with a string": "1: mov esi, 0x6000\nmov edi, 0x6010\nmovsb\nmov edi, 0\nin al, 0x50\ntest al, 1\nWHILE 1b",
}


@pytest.mark.parametrize("steps", [(100_000,), (5000, 777), (333, 40)])
@pytest.mark.parametrize("name", LOOPS)
def test_loops(name: str, steps: tuple[int, ...]) -> None:
    with Twins(polls(LOOPS[name]), Toggle) as twins:
        twins.run(sum(steps) * 20 if steps[0] < 1000 else 60_000, steps)
        assert twins.reference.state.gpr[EBX] > 5


@pytest.mark.parametrize("promises", [True, False])
def test_only_what_is_promised_is_passed_over(promises: bool) -> None:
    toggles: list[Toggle] = []
    with Twins(polls(LOOPS["plain"]), lambda bare: toggles.append(Toggle(bare, promises=promises))) as twins:
        twins.run(60_000)
        reference, other = (toggle.loads for toggle in toggles)
        rounds = twins.count("polling rounds passed over")
        assert reference - other >= rounds  # some of what is left is read by emitted code
        assert (rounds > reference * 0.9) == promises


def test_an_event_is_met_on_time() -> None:
    """It changes what the port reads in the midst of a stretch in which that would have been steady without it."""

    def prepare(bare: Bare) -> None:
        toggle = Toggle(bare)

        def ring() -> None:
            toggle.bit ^= 4
            bare.clock.schedule(bare.clock.now_ns + 1234, ring)

        bare.clock.schedule(1234, ring)

    source = """
        again: rdtsc
        add edx, eax
        xor ecx, edx
        inc ebx
        xor esi, 4
        1: in al, 0x50
        and al, 4
        cmp eax, esi
        mov eax, 0
        jne 1b
        jmp again
    """
    with Twins(source, prepare) as twins:
        twins.run(60_000, (9000, 777))
        assert twins.reference.state.gpr[EBX] > 40
        assert twins.count("polling rounds passed over") > 1000


def test_patched_in_the_midst() -> None:
    """The same loop computes at first, and stores later."""
    source = f"""
        again: mov esi, 40
        2: inc ebx
        1: in al, 0x50
        patched: lea edi, [{COUNTER:#x}]
        test al, 1
        jz 1b
        3: in al, 0x50
        test al, 1
        jnz 3b
        dec esi
        jnz 2b
        xor byte ptr [patched], 0x8C
        jmp again
    """  # LEA EDI, m and ADD m, EDI differ in more: 8Dh, 01h
    with Twins(source, Toggle) as twins:
        twins.run(90_000, (30_000, 777))
        assert twins.reference.memory.load(COUNTER, 4)


@pytest.mark.parametrize("ns_per_insn", [1, 37, 1000])
@pytest.mark.parametrize("control", [0xB0, 0xB6, 0xB4, 0xB8])
def test_the_timer_of_a_pc(control: int, ns_per_insn: int) -> None:
    """As boot loaders and kernels measure their clock: wait for OUT of counter 2, by port 61h."""
    source = f"""
        again: mov al, {control:#x}
        out 0x43, al
        mov al, 0x55
        out 0x42, al
        mov al, 0x02
        out 0x42, al
        mov al, 1
        out 0x61, al
        mov ecx, 4
        2: mov esi, 0x7FF
        1: in al, 0x61
        test al, 0x20
        jz 1b
        rdtsc
        xor edx, eax
        3: in al, 0x61
        test al, 0x20
        jz 4f
        dec esi
        jnz 3b
        4: loop 2b
        inc ebx
        jmp again
    """

    def make(source: str, engine: EngineMaker) -> Bare:
        bare = flat(source, engine)
        bare.clock.ns_per_insn = ns_per_insn
        pit = Pit(bare.clock, lambda _level: None)
        bare.ports.register(0x40, 0x43, pit)
        bare.ports.register(PORT_B, PORT_B, PortB(pit))
        bare.ports.promise(PORT_B, pit.steady_until_ns)
        return bare

    with Twins(source, make_guest=make) as twins:
        twins.run(90_000, (30_000, 777))
        assert twins.reference.state.gpr[EDX]
