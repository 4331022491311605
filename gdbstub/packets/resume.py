"""Letting the guest go on, and how it is told that it stopped: `c C s S vCont ?`.

It must not know how long the guest runs; the stop comes by way of the session.
"""

from typing import TYPE_CHECKING

from gdbstub.debuggee import EndKind
from gdbstub.fields import ALL_THREADS, ANY_THREAD, PROCESS_ID, PacketError, parse_number, parse_pair, parse_thread_id
from gdbstub.packets.command import Access, Command
from gdbstub.target import Resume, ResumeMode, Signal, StopEvent, StopReason

if TYPE_CHECKING:
    from gdbstub.session import Session

_MODES = {b"c": ResumeMode.CONTINUE, b"s": ResumeMode.STEP, b"r": ResumeMode.RANGE_STEP}
_WATCHES = {StopReason.WATCH: b"watch", StopReason.RWATCH: b"rwatch", StopReason.AWATCH: b"awatch"}
_BREAKS = {StopReason.SWBREAK: b"swbreak", StopReason.HWBREAK: b"hwbreak"}


def encode_stop(session: "Session", event: StopEvent) -> bytes:
    """Return the stop reply: `T` with reason, thread and a few registers, or `W` for an exit."""
    if event.reason is StopReason.EXITED:
        return encode_exit(session, b"W", event.status)
    fields = [b"T%02x" % event.signal]
    if event.reason in _WATCHES:
        fields.append(b"%b:%x;" % (_WATCHES[event.reason], event.address or 0))
    elif event.reason in _BREAKS and _BREAKS[event.reason] + b"+" in session.offered:
        fields.append(_BREAKS[event.reason] + b":;")
    fields.append(b"thread:%b;" % session.thread_id(event.thread_id))
    layout, target = session.layout, session.target
    fields += [
        b"%x:%b;" % (number, layout.encode(number, target.read_register(event.thread_id, number)))
        for number in layout.expedited
    ]
    return b"".join(fields)


def encode_exit(session: "Session", letter: bytes, status: int) -> bytes:
    """Return `W` and an exit status, or `X` and a signal."""
    return letter + b"%02x" % (status & 0xFF) + (b";process:%x" % PROCESS_ID if session.multiprocess else b"")


def report_stop(session: "Session", _arguments: bytes) -> bytes:
    """`?`: why the guest stopped; signal 0 for a read-only client while it runs."""
    debuggee = session.debuggee
    if debuggee.end is not None:
        if debuggee.end.kind is EndKind.KILLED:
            return encode_exit(session, b"X", Signal.KILL)
        return encode_exit(session, b"W", debuggee.end.status)
    if debuggee.running:
        return encode_stop(session, StopEvent(StopReason.SIGNAL, Signal.NONE, session.general_thread()))
    event = debuggee.last_stop
    if not session.has_resumed:
        # The breakpoint that stopped the guest for an earlier client is not one that this client knows.
        event = StopEvent(StopReason.SIGNAL, event.signal, event.thread_id)
    return encode_stop(session, event)


def resume_simply(mode: ResumeMode, arguments: bytes, session: "Session", signal: int = Signal.NONE) -> None:
    """Carry out `c [ADDR]` and its kin."""
    thread = session.chosen_resume_thread
    if arguments:
        address = parse_number(arguments)
        session.target.write_register(session.general_thread(), session.layout.pc, address & 0xFFFF_FFFF)
    session.resume((Resume(mode, thread if thread > ANY_THREAD else None, signal),))


def resume_with_signal(mode: ResumeMode, arguments: bytes, session: "Session") -> None:
    """Carry out `C SIG[;ADDR]` and its kin."""
    signal_text, _, address = arguments.partition(b";")
    resume_simply(mode, address, session, _parse_signal(signal_text))


def continue_(session: "Session", arguments: bytes) -> None:
    """`c [ADDR]`."""
    resume_simply(ResumeMode.CONTINUE, arguments, session)


def continue_with_signal(session: "Session", arguments: bytes) -> None:
    """`C SIG[;ADDR]`."""
    resume_with_signal(ResumeMode.CONTINUE, arguments, session)


def step(session: "Session", arguments: bytes) -> None:
    """`s [ADDR]`."""
    resume_simply(ResumeMode.STEP, arguments, session)


def step_with_signal(session: "Session", arguments: bytes) -> None:
    """`S SIG[;ADDR]`."""
    resume_with_signal(ResumeMode.STEP, arguments, session)


def list_actions(_session: "Session", _arguments: bytes) -> bytes:
    """`vCont?`: gdb uses vCont only if both forms of `c` and `s` are there."""
    return b"vCont;c;C;s;S;t;r"


def resume_threads(session: "Session", arguments: bytes) -> None:
    """`vCont;ACTION[:TID]...`: for each thread the leftmost action that fits it."""
    texts = arguments.removeprefix(b";").split(b";")
    parsed = [_parse_action(session, text) for text in texts]
    actions = tuple(action for action in parsed if action is not None)
    if actions:
        session.resume(actions)
    else:
        # Only `t`, for a guest that is stopped.
        event = StopEvent(StopReason.SIGNAL, Signal.NONE, session.general_thread())
        session.send(encode_stop(session, event))


def _parse_action(session: "Session", text: bytes) -> Resume | None:
    """Return what one action asks for, None for `t`."""
    action, has_thread, thread_text = text.partition(b":")
    thread: int | None = None
    if has_thread:
        number = session.check_thread(parse_thread_id(thread_text))
        thread = None if number in (ALL_THREADS, ANY_THREAD) else number
    letter, argument = action[:1], action[1:]
    if letter in (b"C", b"S"):
        return Resume(_MODES[letter.lower()], thread, _parse_signal(argument))
    if letter == b"r":
        start, end = parse_pair(argument)
        return Resume(ResumeMode.RANGE_STEP, thread, range_start=start, range_end=end)
    if argument or letter not in (b"c", b"s", b"t"):
        raise PacketError(f"no such action of vCont: {action[:20].decode('latin-1')}")
    return None if letter == b"t" else Resume(_MODES[letter], thread)


def _parse_signal(text: bytes) -> int:
    signal = parse_number(text)
    if signal > 0xFF:
        raise PacketError(f"there is no signal {signal}")
    return signal


COMMANDS = (
    Command(b"?", report_stop),
    Command(b"c", continue_, Access.CHANGE, text_errors=True),
    Command(b"C", continue_with_signal, Access.CHANGE, text_errors=True),
    Command(b"s", step, Access.CHANGE, text_errors=True),
    Command(b"S", step_with_signal, Access.CHANGE, text_errors=True),
    Command(b"vCont?", list_actions),
    Command(b"vCont", resume_threads, Access.CHANGE, text_errors=True),
)
