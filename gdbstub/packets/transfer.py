"""`qXfer:OBJECT:read`: documents that a client reads in pieces.

It must not know how their facts come about; the target gives them.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from gdbstub.fields import BAD_TRANSFER, ENOENT, PacketError, parse_pair
from gdbstub.framing import escape
from gdbstub.packets.command import Command
from gdbstub.target import MemoryRegion
from gdbstub.xmltext import escape as escape_xml
from gdbstub.xmltext import quote

if TYPE_CHECKING:
    from gdbstub.session import Session

_XML = '<?xml version="1.0"?>\n'


def transfer(session: "Session", arguments: bytes) -> bytes:
    """`qXfer:OBJECT:read:ANNEX:OFFSET,LENGTH`: `m` and a piece, or `l` and the last one."""
    fields = arguments.split(b":")
    if len(fields) != 5:
        raise PacketError("qXfer needs an object, read, an annex, an offset and a length", BAD_TRANSFER)
    _, name, operation, annex, window = fields
    reader = _OBJECTS.get(name)
    if reader is None or operation != b"read":
        return b""
    try:
        offset, length = parse_pair(window)
    except PacketError as error:
        raise PacketError(error.text, BAD_TRANSFER) from error
    # All pieces are of the document as it was when its first one was read.
    if offset == 0 or (name, annex) not in session.documents:
        session.documents = {(name, annex): reader(session, annex.decode("latin-1"))}
    document = session.documents[name, annex]
    piece = document[offset : offset + min(length, session.packet_size_bytes // 2)]
    return (b"m" if offset + len(piece) < len(document) else b"l") + escape(piece)


def _read_features(session: "Session", annex: str) -> bytes:
    if annex != "target.xml":
        raise PacketError(f"there is no {annex}", BAD_TRANSFER)
    return session.layout.target_xml


def _read_threads(session: "Session", annex: str) -> bytes:
    _expect_no_annex(annex)
    rows = "".join(
        f'<thread id="{session.thread_id(thread.id).decode()}" core="0" name={quote(thread.name)}>'
        f"{escape_xml(thread.extra)}</thread>\n"
        for thread in session.target.threads()
    )
    return f"{_XML}<threads>\n{rows}</threads>\n".encode()


def _read_memory_map(session: "Session", annex: str) -> bytes:
    _expect_no_annex(annex)
    regions = session.target.memory_map()
    if regions is None:
        raise PacketError("there is no memory map", ENOENT)
    return _memory_map_xml(regions).encode()


def _memory_map_xml(regions: Iterable[MemoryRegion]) -> str:
    rows = "".join(
        f'<memory type="{region.kind.value}" start="{region.start:#x}" length="{region.length:#x}"/>\n'
        for region in regions
    )
    return f"{_XML}<memory-map>\n{rows}</memory-map>\n"


def _read_exec_file(session: "Session", _annex: str) -> bytes:
    name = session.target.exec_file()
    if name is None:
        raise PacketError("there is no executable file", ENOENT)
    return name.encode()


def _read_os_data(session: "Session", annex: str) -> bytes:
    tables = session.target.os_tables()
    rows: Iterable[dict[str, str]]
    if annex in ("", "types"):
        rows = [{"Type": name, "Description": text, "Title": name} for name, text in tables.items()]
    elif annex in tables:
        rows = [dict(row) for row in session.target.os_rows(annex)]
    else:
        raise PacketError(f"there is no table {annex}", BAD_TRANSFER)
    items = "".join(f"<item>{_columns_xml(row)}</item>\n" for row in rows)
    return f"{_XML}<osdata type={quote(annex or 'types')}>\n{items}</osdata>\n".encode()


def _columns_xml(row: dict[str, str]) -> str:
    return "".join(f"<column name={quote(title)}>{escape_xml(text)}</column>" for title, text in row.items())


def _expect_no_annex(annex: str) -> None:
    if annex:
        raise PacketError(f"there is no {annex}", BAD_TRANSFER)


_OBJECTS: dict[bytes, Callable[["Session", str], bytes]] = {
    b"features": _read_features,
    b"threads": _read_threads,
    b"memory-map": _read_memory_map,
    b"exec-file": _read_exec_file,
    b"osdata": _read_os_data,
}

COMMANDS = (Command(b"qXfer", transfer),)
