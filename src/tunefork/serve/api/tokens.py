"""Log probabilities as the API tells them, with the bytes behind each token.

A token may be a part of a character, whose text alone cannot be put together again; its bytes can.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from tunefork.serve.engine import TokenLogprob


def chat_tokens(tokenizer: Any, logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """`logprobs.content` of a chat completion."""
    return [
        _token(tokenizer, entry.token_id, entry.text, entry.logprob)
        | {"top_logprobs": [_token(tokenizer, *top) for top in entry.top]}
        for entry in logprobs
    ]


def completion_logprobs(
    logprobs: Sequence[TokenLogprob], top: int, offset: int
) -> dict[str, list[Any] | None]:
    """`logprobs` of a completion whose text begins at `offset` of what is told."""
    tokens = [entry.text for entry in logprobs]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [_finite(entry.logprob) for entry in logprobs],
        "top_logprobs": [
            {text: _finite(logprob) for _, text, logprob in entry.top[:top]} for entry in logprobs
        ]
        if top
        else None,
        "text_offset": offsets,
    }


def _token(tokenizer: Any, token_id: int, text: str, logprob: float) -> dict[str, Any]:
    raw = token_bytes(tokenizer.convert_ids_to_tokens(token_id) or "", text)
    return {"token": text, "bytes": list(raw), "logprob": _finite(logprob)}


def _finite(logprob: float) -> float:
    """JSON has no infinity; the API says -9999.0 for what cannot be."""
    return logprob if logprob > -9999.0 else -9999.0


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
