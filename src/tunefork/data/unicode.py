"""Text that was broken on its way here: what a model would learn to write is wrong.

(Half a surrogate pair is no text at all and makes its row a bad one, see `convert.py`; bytes that
are not UTF-8 likewise, see `read.py`.)

UTF-8 read as Windows-1252 or Latin-1 ("mojibake", "Ã©" for "é") is told from real text as ftfy
(https://github.com/rspeer/python-ftfy) tells it, at its surest: a run that begins as such text
does and that gives valid UTF-8 when encoded back.
"""

import re
import unicodedata
from collections.abc import Iterator

_CONTROL = re.compile("[\x01-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f]")
"""C0 and C1 but for tab, line feed, form feed, carriage return, NEL; NUL is a kind of its own."""

_CP1252 = {bytes([byte]).decode("cp1252", "ignore") or chr(byte): byte for byte in range(256)}
"""Windows-1252, its five holes filled as browsers do (https://encoding.spec.whatwg.org/)."""
_AS_BYTE = _CP1252 | {chr(byte): byte for byte in range(256)}
_TAIL = "".join(re.escape(c) for c, byte in _AS_BYTE.items() if 0x80 <= byte <= 0xBF)
# Lead bytes that prose has no use for before such characters. "Â»" and "Ã»" end a quotation.
_MOJIBAKE = re.compile(
    rf"[ÂÃ](?!»)[{_TAIL}]|â[€\x80][{_TAIL}]|ï»¿|ï¿½|ðŸ[{_TAIL}]{{2}}|(?:[ÐÑ][{_TAIL}]){{2,}}"
)


def find_broken(text: str) -> Iterator[tuple[str, int]]:
    """(kind, how many) of each way in which `text` is broken."""
    if "\0" in text:
        yield "NUL character", text.count("\0")
    if controls := len(_CONTROL.findall(text)):
        yield "control character", controls
    if text.isascii():
        return
    if "\ufffd" in text:
        yield "replacement character U+FFFD", text.count("\ufffd")
    if "\ufeff" in text:
        yield "byte-order mark", text.count("\ufeff")
    if mojibake := sum(_is_utf8(match[0]) for match in _MOJIBAKE.finditer(text)):
        yield "UTF-8 read as another encoding", mojibake


def _is_utf8(text: str) -> bool:
    try:
        bytes(_AS_BYTE[character] for character in text).decode("utf-8")
    except (KeyError, UnicodeDecodeError):
        return False
    return True


def plain_form(label: str) -> str:
    """What two labels share that differ only in case, white space, width or composition."""
    return " ".join(unicodedata.normalize("NFKC", label).casefold().split())
