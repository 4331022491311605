"""Text in XML documents, as content and as attributes: what the standard library's module for it does.

It must not know the documents, and imports nothing: that module would bring an HTTP client along at every start.
"""


def escape(text: str) -> str:
    """The text as content of an element."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def quote(text: str) -> str:
    """The text as an attribute's value, in double quotes; ends of lines and tabs survive a parser's normalisation."""
    escaped = escape(text).replace('"', "&quot;")
    return f'"{escaped}"'.replace("\n", "&#10;").replace("\r", "&#13;").replace("\t", "&#9;")
