"""Sessions beside and after each other: who controls the guest, what a client leaves behind, long work, bad input."""

import random
from time import perf_counter
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdbstub.debuggee import End, EndKind
from gdbstub.session import CONGESTION_BYTES, MAX_QUEUED_BYTES, PACKET_SIZE_BYTES, PATIENCE_S, Role
from gdbstub.target import MemoryKind, MemoryRegion, StintEnd, StopEvent, TargetError
from tests.gdbstub.toy import COUNTER, EIP, IDLE, TEXT, TICK, ToyTarget
from tests.gdbstub.wire import Talk, pack, unpack


def runs(talk: Talk) -> bool:
    return talk.debuggee.running


def works(talk: Talk) -> bool:
    return talk.session.has_work


def listens(talk: Talk) -> bool:
    return talk.session.accepts_input


def attached(talk: Talk) -> bool:
    return talk.target.attached


def beside(first: Talk) -> Talk:
    return Talk(first.target, first.debuggee)


def test_attaching_stops_a_running_guest_and_detaching_lets_it_go() -> None:
    talk = Talk(ack=True)
    talk.debuggee.start()
    talk.debuggee.stint()
    assert runs(talk)
    assert not attached(talk)
    assert talk.ask(b"?").startswith(b"T05thread:1;")
    assert not runs(talk)
    assert attached(talk)
    assert talk.ask(b"D", run=False) == b"OK"
    assert runs(talk)
    assert not attached(talk)


def test_connecting_alone_changes_nothing() -> None:
    talk = Talk(ack=True)
    talk.debuggee.start()
    talk.send_raw(b"+++GET / HTTP/1.0\r\n\r\n\x03", run=False)
    assert runs(talk)
    assert not talk.debuggee.controlled
    assert talk.send_raw(b"$?#00", run=False) == b"-"
    assert runs(talk)


def test_second_client_is_read_only() -> None:
    first = Talk()
    second = beside(first)
    assert first.session.role is Role.CONTROLLER
    assert second.session.role is Role.OBSERVER
    assert second.ask(b"m1000,1") == b"b8"
    assert second.ask(b"?").startswith(b"T05")
    assert second.ask(b"p8") == b"00100000"
    for packet in (
        b"P0=01000000",
        b"G00",
        b"M2000,1:00",
        b"X2000,0:",
        b"c",
        b"s",
        b"vCont;c",
        b"Z0,1000,1",
        b"z0,1000,1",
    ):
        assert second.ask(packet) == b"E.another debugger controls the guest; this session is read-only"
    for packet in (b"vKill;1", b"vRun;", b"vAttach;1"):
        assert second.ask(packet).startswith(b"E.another debugger controls")
    for packet in (b"k", b"R00", b"vCtrlC"):
        assert second.ask(packet).startswith(b"E")
    assert second.ask(b"QPassSignals:4") == b"OK"
    assert first.target.passed == frozenset()
    assert first.target.calls == ["attach"]
    # poke 7
    assert second.ask_all(b"qRcmd,706f6b652037") == [b"O" + b"only for who controls the guest\n".hex().encode(), b"OK"]


def test_second_client_looks_while_the_guest_runs() -> None:
    first = Talk()
    second = beside(first)
    assert first.ask_all(b"c", run=False) == []
    assert second.ask(b"?", run=False).startswith(b"T00thread:1;")
    counts = []
    for _ in range(3):
        first.debuggee.stint()
        counts.append(int.from_bytes(bytes.fromhex(second.ask(b"m2000,4", run=False).decode()), "little"))
    assert counts == sorted(set(counts))
    # Its Ctrl-C is nobody's.
    assert second.send_raw(b"\x03", run=False) == b""
    assert runs(first)
    # What it asks in the meantime reaches only itself.
    assert first.session.take_output() == b""
    assert unpack(first.send_raw(b"\x03")).packets[0].startswith(b"T02")


def test_second_client_leaves() -> None:
    first = Talk()
    second = beside(first)
    first.ask(b"Z0,1011,1")
    assert second.ask(b"D") == b"OK"
    second.session.lose_connection()
    assert not runs(first)
    assert first.target.code
    assert first.ask(b"c").startswith(b"T05")


def test_second_client_stays_read_only_when_the_first_leaves_until_it_attaches() -> None:
    first = Talk()
    second = beside(first)
    first.session.lose_connection()
    assert second.ask(b"c").startswith(b"E")
    third = beside(first)
    assert third.session.role is Role.CONTROLLER
    assert second.ask(b"vAttach;1").startswith(b"E.another debugger")
    third.session.lose_connection()
    assert second.ask(b"vAttach;1").startswith(b"T05")
    assert second.ask(b"s").startswith(b"T05")


def test_vanishing_leaves_a_stopped_guest_stopped_without_breakpoints() -> None:
    first = Talk()
    first.ask(b"qSupported:swbreak+")
    first.ask(b"Z0,1011,1")
    first.ask(b"Z2,2000,4")
    first.ask(b"QPassSignals:4")
    assert first.ask(b"c").startswith(b"T05swbreak:;")
    assert first.ask(b"?").startswith(b"T05swbreak:;")
    first.session.receive(b"$m10")
    first.session.lose_connection()
    assert "the client vanished in the middle of a packet" in first.log
    assert not runs(first)
    assert not first.target.code
    assert not first.target.watches
    assert not first.target.passed
    second = beside(first)
    second.ask(b"qSupported:swbreak+")
    # Not a swbreak, which would be a breakpoint that this client knows.
    assert second.ask(b"?").startswith(b"T05thread:1;8:11100000;")


def test_vanishing_leaves_a_running_guest_running() -> None:
    first = Talk()
    first.ask(b"Z0,1011,1;X3,220027")
    first.ask_all(b"c", run=False)
    first.debuggee.stint()
    first.session.lose_connection()
    assert runs(first)
    before = first.target.get(0)
    first.debuggee.stint()
    assert first.target.get(0) > before
    second = beside(first)
    assert not runs(first)
    assert second.ask(b"?").startswith(b"T05thread:1;")


def test_vanishing_in_the_middle_of_a_step_leaves_it_running() -> None:
    talk = Talk()
    talk.target.registers[EIP] = IDLE
    talk.ask_all(b"s", run=False)
    assert talk.debuggee.stint() is StintEnd.IDLE
    talk.session.lose_connection()
    talk.target.registers[EIP] = TEXT
    assert talk.debuggee.stint() is StintEnd.BUDGET


def test_stop_text_comes_before_the_stop_and_only_to_who_waits() -> None:
    first = Talk()
    second = beside(first)
    text, stop = first.ask_all(b"c1027")
    assert bytes.fromhex(text[1:].decode()) == b"an invalid instruction\n"
    assert stop.startswith(b"T04")
    assert second.session.take_output() == b""


def test_quit_ends_the_program() -> None:
    talk = Talk()
    assert talk.ask(b"qRcmd," + b"quit 5".hex().encode()) == b"OK"
    assert talk.debuggee.end == End(EndKind.QUIT, 5)


def test_long_work_is_done_in_slices_and_can_be_interrupted() -> None:
    talk = Talk()
    talk.session.receive(pack(b"qRcmd," + b"slow 100".hex().encode()))
    assert works(talk)
    talk.session.receive(pack(b"qC"))
    for _ in range(5):
        talk.session.advance()
    slices = len(unpack(talk.session.take_output()).packets)
    assert 5 <= slices <= 6
    talk.session.receive(b"\x03")
    while talk.session.has_work:
        talk.session.advance()
    assert unpack(talk.session.take_output()).packets == [b"E16", b"QC1"]


def test_work_is_dropped_for_a_client_that_goes_on_without_its_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk()
    talk.session.receive(pack(b"qRcmd," + b"slow 100".hex().encode()))
    for _ in range(5):
        talk.session.advance()
    talk.session.take_output()
    later_s = talk.debuggee.now_s() + PATIENCE_S + 1
    monkeypatch.setattr(talk.debuggee, "now_s", lambda: later_s)
    assert talk.ask(b"qC") == b"QC1"
    assert talk.target.slow_commands == 0
    assert not works(talk)


def test_vanishing_closes_long_work() -> None:
    talk = Talk()
    talk.session.receive(pack(b"qRcmd," + b"slow 100".hex().encode()))
    assert talk.target.slow_commands == 1
    talk.session.lose_connection()
    assert talk.target.slow_commands == 0
    assert not works(talk)


def test_killing_twice_kills_once() -> None:
    talk = Talk()
    assert talk.ask(b"vKill;1") == b"OK"
    assert talk.ask(b"vKill;1") == b"OK"
    assert talk.target.calls.count("kill") == 1


def test_crc_of_large_memory_takes_slices() -> None:
    talk = Talk(ToyTarget(4 << 20))
    source = random.Random(3)
    talk.target.ram[:] = source.randbytes(4 << 20)
    talk.session.receive(pack(b"qCRC:0,400000"))
    slices = 0
    while talk.session.has_work:
        talk.session.advance()
        slices += 1
    (reply,) = unpack(talk.session.take_output()).packets
    assert slices >= 16
    # zlib's has reflected bits and inverts at the end.
    reflected = bytes(int(f"{byte:08b}"[::-1], 2) for byte in talk.target.ram)
    assert int(reply[1:], 16) == int(f"{crc32(reflected) ^ 0xFFFFFFFF:032b}"[::-1], 2)


def test_crc_is_gdbs() -> None:
    """Against the bit-by-bit definition: polynomial 04C11DB7, from all ones, most significant bit first."""
    talk = Talk()
    for data in (b"", b"\0", b"123456789", bytes(range(256))):
        crc = 0xFFFF_FFFF
        for byte in data:
            crc ^= byte << 24
            for _ in range(8):
                crc = (crc << 1 ^ (0x04C1_1DB7 if crc >> 31 else 0)) & 0xFFFF_FFFF
        talk.target.ram[0x3000 : 0x3000 + len(data)] = data
        assert talk.ask(b"qCRC:3000,%x" % len(data)) == b"C%08x" % crc


def test_memory_map_and_exec_file_are_offered_if_the_target_has_them() -> None:
    target = ToyTarget(exec_file="/boot/ker*nel")
    target.map = [MemoryRegion(0, 0xF0000), MemoryRegion(0xF0000, 0x10000, MemoryKind.ROM)]
    talk = Talk(target)
    features = talk.ask(b"qSupported").split(b";")
    assert {b"qXfer:memory-map:read+", b"qXfer:exec-file:read+"} <= set(features)
    assert talk.ask(b"qXfer:exec-file:read:1:0,1000") == b"l/boot/ker}\nnel"
    reply = talk.ask(b"qXfer:memory-map:read::0,1000")
    assert b'<memory type="ram" start="0x0" length="0xf0000"/>' in reply
    assert b'<memory type="rom" start="0xf0000" length="0x10000"/>' in reply


def test_pieces_of_a_document_are_of_one_version() -> None:
    target = ToyTarget()
    target.map = [MemoryRegion(0, 0x1000)]
    talk = Talk(target)
    first = talk.ask(b"qXfer:memory-map:read::0,40")
    target.map = [MemoryRegion(0, 0x2000), MemoryRegion(0x2000, 0x1000)]
    second = talk.ask(b"qXfer:memory-map:read::40,1000")
    assert first[:1] + second[:1] == b"ml"
    assert (first[1:] + second[1:]).count(b"<memory ") == 1


def test_ten_thousand_garbage_packets() -> None:
    talk = Talk()
    source = random.Random(4)
    for _ in range(100):
        data = b"".join(pack(source.randbytes(source.randrange(30)).translate(None, b"#$")) for _ in range(100))
        talk.send_raw(data, run=False)
        if talk.debuggee.running:
            talk.debuggee.interrupt()
            talk.session.take_output()
    if not talk.session.controls:
        talk.ask(b"vAttach;1", run=False)
    assert talk.ask(b"qC") == b"QC1"
    assert len(talk.log) < 10


def test_garbage_is_worked_off_in_slices() -> None:
    talk = Talk()
    talk.session.receive(pack(b"m2000,4") * 1000)
    handled = len(unpack(talk.session.take_output()).packets)
    assert 0 < handled < 200
    assert works(talk)


def test_client_that_never_reads_is_not_served_without_bound() -> None:
    talk = Talk()
    request = pack(b"x2000,10000")
    talk.target.ram[0x2000:0x12000] = random.Random(5).randbytes(0x10000)
    for _ in range(100000):
        if not talk.session.accepts_input:
            break
        talk.session.receive(request)
    assert not listens(talk)
    assert not works(talk)
    assert len(talk.session._output) < CONGESTION_BYTES + 2 * PACKET_SIZE_BYTES
    assert talk.session._queued_bytes < MAX_QUEUED_BYTES + PACKET_SIZE_BYTES
    talk.session.take_output()
    assert listens(talk)


def test_overlong_packet_gets_an_error_and_the_session_goes_on() -> None:
    talk = Talk()
    data = pack(b"X2000,30000:" + b"a" * 0x30000)
    assert unpack(talk.send_raw(data)).packets == [b"E07"]
    assert talk.ask(b"m2000,1") == b"00"
    assert talk.log == ["in control", f"overlong packet: a packet of {len(data) - 4} bytes is longer than 131072"]
    talk = Talk(ack=True)
    assert talk.send_raw(data)[:1] == b"+"


def test_largest_packet_that_is_allowed() -> None:
    talk = Talk()
    body = b"X2000,1fff0:"
    body = body[:-1] + b":" + b"a" * 0x1FFF0
    assert len(body) <= PACKET_SIZE_BYTES
    assert talk.ask(body) == b"OK"
    assert talk.ask(b"m%x,1" % (0x2000 + 0x1FFEF)) == b"61"


@pytest.mark.parametrize("packet", [b"m0,100000000", b"m0,ffffffff", b"x0,ffffffffffffffff"])
def test_read_of_gigabytes_gets_what_fits(packet: bytes) -> None:
    talk = Talk()
    reply = unpack(talk.send_raw(pack(packet)))
    assert len(reply.packets[0]) <= PACKET_SIZE_BYTES + 1


def test_agent_printf_goes_out_while_the_guest_runs_on() -> None:
    talk = Talk()
    text = b"x\0"
    code = b"\x22\0\x22\0\x34\0" + len(text).to_bytes(2, "big") + text + b"\x27"
    assert talk.ask(b"Z0,%x,1;cmds:0,X%x,%b" % (TICK, len(code), code.hex().encode())) == b"OK"
    talk.ask_all(b"c", run=False)
    stints = 0
    while not talk.session.is_congested:
        assert talk.debuggee.stint() is StintEnd.BUDGET
        stints += 1
    # A congested client makes every hit end its stint, so that what drives it can wait.
    size = len(talk.session._output)
    talk.debuggee.stint()
    assert len(talk.session._output) - size < 20
    assert set(unpack(talk.session.take_output()).packets) == {b"O78"}
    assert unpack(talk.send_raw(b"\x03")).packets[-1].startswith(b"T02")


def test_slow_conditions_end_a_stint_early() -> None:
    talk = Talk()
    talk.ask(b"Z0,%x,1;X3,220027" % TICK)
    talk.ask_all(b"c", run=False)
    before = talk.debuggee.now_s()
    for _ in range(20):
        talk.debuggee.stint()
    # The clock of these tests advances with each look at it, so a stint of 5 ms has room for 50 looks.
    assert talk.debuggee.now_s() - before < 20 * 0.0055
    assert talk.target.get(0) > 20


def test_false_condition_on_real_clock_is_cheap() -> None:
    talk = Talk()
    talk.debuggee.now_s = perf_counter
    talk.ask(b"Z0,%x,1;X8,2320001922001327" % TICK)
    check = next(iter(talk.target.code.values())).check
    assert check is not None
    talk.debuggee.stint_deadline_s = perf_counter() + 60
    talk.target.ram[COUNTER] = 1
    begun = perf_counter()
    for _ in range(1000):
        check()
    # Measured at 2 us; the bound is for a busy machine.
    assert (perf_counter() - begun) / 1000 < 100e-6


class Contrary(ToyTarget):
    """A target that stops because it cannot go on."""

    def run(self, budget_insns: int) -> StopEvent | StintEnd:
        raise TargetError(f"the engine gave up with {budget_insns} instructions to go")


def test_target_that_cannot_run_stops_with_its_text() -> None:
    talk = Talk(Contrary())
    text, stop = talk.ask_all(b"c")
    assert bytes.fromhex(text[1:].decode()) == b"the engine gave up with 1000 instructions to go\n"
    assert stop.startswith(b"T06")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=60), max_size=20), st.booleans())
def test_random_bytes_never_wedge_a_session(chunks: list[bytes], acknowledging: bool) -> None:
    talk = Talk(ack=acknowledging)
    for chunk in chunks:
        talk.send_raw(chunk, run=False)
        if talk.debuggee.running:
            talk.debuggee.stint()
    assert_alive(talk)


NAMES = st.sampled_from(
    b"g G p P m x M X c s C S vCont;c vCont;r1,2 vCont? Z0,1011,1 Z2,2000,4 z0, ? D k R vRun; vAttach;1 vKill; ! H T "
    b"qC qCRC: qSearch:memory: qXfer:features:read:target.xml: qXfer:threads:read:: qRcmd, qSupported: QPassSignals: "
    b"qThreadExtraInfo, qMemoryRegionInfo: QStartNoAckMode vCtrlC qSymbol: QEnableErrorStrings".split(b" "),
)
ARGUMENTS = st.one_of(
    st.binary(max_size=20),
    st.from_regex(rb"[0-9a-f]{0,9}[,:;=][0-9a-f]{0,9}", fullmatch=True),
    st.just(b""),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(NAMES, ARGUMENTS), max_size=15))
def test_random_packets_get_answers(requests: list[tuple[bytes, bytes]]) -> None:
    talk = Talk(ToyTarget(0x4000))
    for name, arguments in requests:
        payload = name + arguments.translate(None, b"#$")
        unpack(talk.send_raw(pack(payload), run=False))
        if talk.debuggee.running:
            talk.debuggee.stint()
    assert_alive(talk)


def assert_alive(talk: Talk) -> None:
    """Whatever came before: the session answers, or an ended guest can be started again."""
    talk.send_raw(b"#00\x03$#00+", run=False)
    if talk.debuggee.running:
        talk.debuggee.interrupt()
    talk.session.take_output()
    replies = unpack(talk.send_raw(pack(b"vMustReplyEmpty") + pack(b"vRun;"), run=False)).packets
    assert replies[-2] == b""
    assert replies[-1].startswith(b"T05")
    assert unpack(talk.send_raw(pack(b"m1000,2"), run=False)).packets[-1] == b"b800"
