"""One client's conversation: bytes in, bytes out, and which modes it has agreed on.

It must not know sockets or clocks; whoever moves the bytes calls `receive`, `advance` and `take_output`.
"""

import enum
from collections import deque
from collections.abc import Callable

from gdbstub.debuggee import Debuggee
from gdbstub.fields import (
    ALL_THREADS,
    ANY_THREAD,
    E2BIG,
    EBUSY,
    EINVAL,
    EIO,
    EPERM,
    ESRCH,
    PROCESS_ID,
    PacketError,
    ThreadId,
    hex_text,
)
from gdbstub.framing import (
    Ack,
    BadChecksum,
    Frame,
    FrameError,
    FrameReader,
    Interrupt,
    Packet,
    TooLong,
    compress_runs,
    expand_runs,
    frame,
    unescape,
)
from gdbstub.packets.breakpoints import TargetContext
from gdbstub.packets.command import Access, Command, Work
from gdbstub.packets.resume import encode_stop
from gdbstub.packets.table import COMMANDS, split_name
from gdbstub.target import Resume, StopEvent, TargetError

PACKET_SIZE_BYTES = 0x20000
# More output than this waiting for a slow client: nothing more is done for it until it has taken some.
CONGESTION_BYTES = 0x40000
MAX_QUEUED_BYTES = 0x100000
# Who has waited for a reply as long as this, and then sends another packet, does not expect that reply any more: gdb
# tells nobody when its user has broken off a `monitor` command.
PATIENCE_S = 1.0
_FRAMES_A_SLICE = 64
# Their data may have any byte, and only escapes are defined for it: runs are not expanded.
_BINARY_PACKETS = (b"X", b"qSearch:")
# E.text is not escaped, so it must do without the characters of framing.
_ERROR_TEXT = {**dict.fromkeys([*range(0x20), *range(0x7F, 0x100)], " "), **str.maketrans("}*", ")x", "#$")}


class Role(enum.Enum):
    """What a session may do with the guest."""

    NEW = enum.auto()  # nothing asked yet
    CONTROLLER = enum.auto()
    OBSERVER = enum.auto()  # read-only, as there is a controller
    DETACHED = enum.auto()  # it has said goodbye with D


class Session:
    """The protocol's state machine for one client.

    Attributes that packets read and write are public: `offered` (the client's features), `multiprocess`, `extended`,
    `acknowledging`, `text_errors` (E.text), `hex_error_texts` (lldb's form), `chosen_general_thread`,
    `chosen_resume_thread`, `has_resumed`, `documents` (objects of qXfer being read).
    """

    def __init__(
        self,
        debuggee: Debuggee,
        log: Callable[[str], None] = lambda _line: None,
        packet_size_bytes: int = PACKET_SIZE_BYTES,
    ) -> None:
        """Begin a conversation; `log` gets one line an event."""
        self.debuggee = debuggee
        self.target = debuggee.target
        self.layout = debuggee.layout
        self.packet_size_bytes = packet_size_bytes
        self.role = Role.NEW
        self.offered: frozenset[bytes] = frozenset()
        self.multiprocess = False
        self.extended = False
        self.acknowledging = True
        self.text_errors = False
        self.hex_error_texts = False
        self.chosen_general_thread = ANY_THREAD
        self.chosen_resume_thread = ANY_THREAD
        self.has_resumed = False
        self.documents: dict[tuple[bytes, bytes], bytes] = {}
        self.agent_context = TargetContext(self)
        self._log = log
        self._reader = FrameReader(packet_size_bytes)
        self._frames: deque[Frame] = deque()
        self._queued_bytes = 0
        self._work: Work | None = None
        self._work_command: Command | None = None
        self._work_since_s = 0.0
        self._output = bytearray()
        self._last_sent = b""
        self._awaiting_stop = False
        self._complaints: dict[str, int] = {}

    # For whoever moves the bytes.

    def receive(self, data: bytes) -> None:
        """Take bytes from the client and act on them; what takes long is left to `advance`."""
        for item in self._reader.feed(data):
            if isinstance(item, Interrupt) and self._work is not None:
                self._abandon_work()
            else:
                if isinstance(item, Packet) and self._work is not None and self._is_work_old():
                    self._drop_work()
                self._frames.append(item)
                self._queued_bytes += len(item.payload) if isinstance(item, Packet) else 1
        if self._work is None:
            self.advance()

    @property
    def has_work(self) -> bool:
        """Whether `advance` has something to do now."""
        return not self.is_congested and (self._work is not None or bool(self._frames))

    @property
    def accepts_input(self) -> bool:
        """Whether `receive` should be called; otherwise it would pile up packets for a client that does not listen."""
        return self._queued_bytes < MAX_QUEUED_BYTES and not self.is_congested

    @property
    def is_congested(self) -> bool:
        """Whether the client is so slow that nothing more should be produced for it."""
        return len(self._output) > CONGESTION_BYTES

    def advance(self) -> None:
        """Do a few milliseconds of work: packets that wait, or a slice of a long one."""
        for _ in range(_FRAMES_A_SLICE):
            if self._work is not None:
                self._advance_work(self._work)
                return
            if not self._frames or self.is_congested:
                return
            item = self._frames.popleft()
            self._queued_bytes -= len(item.payload) if isinstance(item, Packet) else 1
            self._handle(item)

    @property
    def has_output(self) -> bool:
        """Whether `take_output` would return something."""
        return bool(self._output)

    def take_output(self) -> bytes:
        """Return and forget what is to be sent to the client."""
        output = bytes(self._output)
        self._output.clear()
        return output

    def lose_connection(self) -> None:
        """End the conversation because the client is gone: breakpoints go, the guest stays stopped or runs on."""
        if self._work is not None:
            self._abandon_work()
        self._frames.clear()
        if self._reader.in_packet:
            self._log("the client vanished in the middle of a packet")
        for text, count in self._complaints.items():
            if count > 1:
                self._log(f"{text}: {count} times in all")
        self.debuggee.release(self, resume=False)
        self.role = Role.DETACHED

    # For the packets' handlers.

    @property
    def controls(self) -> bool:
        """Whether this session may change the guest."""
        return self.role is Role.CONTROLLER

    def send(self, payload: bytes) -> None:
        """Send one packet; binary data in it must be escaped already."""
        self._last_sent = frame(compress_runs(payload))
        self._output += self._last_sent

    def write_console(self, text: bytes) -> None:
        """Show text on the client's console; only while it waits for a stop or for the reply to qRcmd."""
        piece_bytes = self.packet_size_bytes // 4
        for start in range(0, len(text), piece_bytes):
            self.send(b"O" + hex_text(text[start : start + piece_bytes]))

    def claim(self) -> None:
        """Take control of the guest; PacketError if another session has it."""
        if not self.debuggee.claim(self):
            raise PacketError("another debugger controls the guest; this session is read-only", EBUSY)
        self.role = Role.CONTROLLER

    def detach(self) -> None:
        """Give up control, and let the guest run on."""
        self._awaiting_stop = False
        self.debuggee.release(self, resume=True)
        self.role = Role.DETACHED

    def resume(self, actions: tuple[Resume, ...]) -> None:
        """Let the guest go on; `stopped` will send the reply."""
        self.debuggee.resume(actions)
        self.has_resumed = True
        self._awaiting_stop = True

    def stopped(self, event: StopEvent) -> None:
        """Tell the client that the guest has stopped, if it waits for that."""
        if self._awaiting_stop:
            self._awaiting_stop = False
            self.write_console(event.text.encode())
            self.send(encode_stop(self, event))

    def general_thread(self) -> int:
        """Return the thread that register packets are about: the chosen one, or the one that stopped last."""
        if self.chosen_general_thread > ANY_THREAD:
            return self.chosen_general_thread
        return self.debuggee.last_stop.thread_id

    def check_thread(self, wanted: ThreadId) -> int:
        """Return the number of a thread that exists, ALL_THREADS or ANY_THREAD; otherwise raise PacketError."""
        if wanted.process not in (None, PROCESS_ID, ALL_THREADS, ANY_THREAD):
            raise PacketError(f"there is no process {wanted.process}", ESRCH)
        if wanted.thread > ANY_THREAD and all(thread.id != wanted.thread for thread in self.target.threads()):
            raise PacketError(f"there is no thread {wanted.thread}", ESRCH)
        return wanted.thread

    def thread_id(self, number: int) -> bytes:
        """Return a thread's id as this client wants it written."""
        return b"p%x.%x" % (PROCESS_ID, number) if self.multiprocess else b"%x" % number

    # Inside.

    def _handle(self, item: Frame) -> None:
        if isinstance(item, Packet):
            if self.acknowledging:
                self._output += b"+"
            self._handle_packet(item.payload)
        elif isinstance(item, Interrupt):
            # One that comes when the guest has stopped already has got its answer with that stop.
            if self.controls:
                self.debuggee.interrupt()
        elif isinstance(item, Ack):
            if not item.good and self.acknowledging:
                self._output += self._last_sent
        elif isinstance(item, BadChecksum):
            self._complain("bad checksum")
            if self.acknowledging:
                self._output += b"-"
            else:
                self._send_error(PacketError("bad checksum", EIO), None)
        else:
            self._handle_overlong(item)

    def _handle_overlong(self, item: TooLong) -> None:
        if self.acknowledging:
            self._output += b"+"
        text = f"a packet of {item.length_bytes} bytes is longer than {self.packet_size_bytes}"
        self._complain("overlong packet", text)
        self._send_error(PacketError(text, E2BIG), None)

    def _handle_packet(self, raw: bytes) -> None:
        if self.role is Role.NEW:
            self.role = Role.CONTROLLER if self.debuggee.claim(self) else Role.OBSERVER
            self._log("in control" if self.controls else "read-only, as another debugger controls the guest")
        command: Command | None = None
        try:
            payload = raw
            if not raw.startswith(_BINARY_PACKETS):
                payload = expand_runs(raw, self.packet_size_bytes)
            name, arguments = split_name(unescape(payload))
            command = COMMANDS.get(name)
            if command is None:
                self.send(b"")
                return
            self._check_access(command)
            reply = command.handle(self, arguments)
        except (PacketError, TargetError) as error:
            self._send_error(error, command)
        except FrameError as error:
            self._send_error(PacketError(str(error)), command)
        else:
            if isinstance(reply, bytes):
                self.send(reply)
            elif reply is not None:
                self._work, self._work_since_s = reply, self.debuggee.now_s()
                self._work_command = command

    def _check_access(self, command: Command) -> None:
        if command.access is Access.LOOK:
            return
        if self.role is Role.OBSERVER:
            raise PacketError("another debugger controls the guest; this session is read-only", EPERM)
        if not self.controls:
            raise PacketError("not attached to the guest", ESRCH)
        if command.access is Access.CONTROL:
            return
        if self.debuggee.end is not None:
            raise PacketError("the guest has ended", ESRCH)
        if self.debuggee.running:
            raise PacketError("the guest is running; interrupt it first", EBUSY)

    def _send_error(self, error: PacketError | TargetError, command: Command | None) -> None:
        number = error.number if isinstance(error, PacketError) else EINVAL
        text = str(error)
        if isinstance(error, PacketError) and number == EINVAL:
            self._complain("malformed packet", text)
        if self.hex_error_texts:
            self.send(b"E%02x;%b" % (number, hex_text(text)))
        elif self.text_errors or (command is not None and command.text_errors):
            self.send(b"E." + text.translate(_ERROR_TEXT).encode("ascii", "replace"))
        else:
            self.send(b"E%02x" % number)

    def _advance_work(self, work: Work) -> None:
        try:
            console = next(work)
        except StopIteration as stop:
            self._work = None
            self.send(stop.value)
        except (PacketError, TargetError) as error:
            self._work = None
            self._send_error(error, self._work_command)
        else:
            self.write_console(console)

    def _is_work_old(self) -> bool:
        return self.debuggee.now_s() - self._work_since_s > PATIENCE_S

    def _drop_work(self) -> None:
        if self._work is not None:
            self._work.close()
            self._work = None

    def _abandon_work(self) -> None:
        if self._work is not None:
            self._drop_work()
            self._send_error(PacketError("interrupted"), self._work_command)

    def _complain(self, kind: str, detail: str = "") -> None:
        """Log the first mistake of each kind, so that ten thousand of them are two lines."""
        count = self._complaints.get(kind, 0)
        self._complaints[kind] = count + 1
        if not count:
            self._log(f"{kind}: {detail}" if detail else kind)
