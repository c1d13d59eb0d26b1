"""One token by itself: its text, and the bytes behind it.

A token may be a part of a character, whose text alone cannot be put together again; its bytes can.
"""

from functools import lru_cache
from typing import Any


def text_of(tokenizer: Any, token_id: int) -> str:
    """The text of a token by itself. A decoder of SentencePiece's kind leaves the space out that a
    text begins with; here it stays."""
    name = tokenizer.convert_ids_to_tokens(token_id) or ""
    return name.replace("▁", " ") if name.startswith("▁") else str(tokenizer.decode([token_id]))


def token_bytes(token: str, text: str) -> bytes:
    """The bytes of a token that the tokenizer calls `token` and shows as `text`."""
    if "�" not in text:
        return text.encode("utf-8", "replace")
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):  # byte fallback
        return bytes([int(token[3:5], 16)])
    table = _byte_level()
    if all(character in table for character in token):
        return bytes(table[character] for character in token)
    return text.encode("utf-8", "replace")


@lru_cache(maxsize=1)
def _byte_level() -> dict[str, int]:
    """How byte-level tokenizers write bytes as characters (GPT-2's `bytes_to_unicode`)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in shown}
    for offset, byte in enumerate(byte for byte in range(256) if byte not in shown):
        table[chr(256 + offset)] = byte
    return table
