from __future__ import annotations

from xml.etree import ElementTree as ET

import pytest

from gdbstub.xmltext import escape, quote


@pytest.mark.parametrize("text", ["", "eax", "a<b>&c", "\"'", "two\nlines\tand\r\n", "&lt;", "é"])
def test_a_parser_reads_back_what_was_written(text: str) -> None:
    element = ET.fromstring(f"<e a={quote(text)}>{escape(text)}</e>")
    assert element.get("a") == text
    assert (element.text or "").splitlines() == text.splitlines()
