"""Log probabilities as the API tells them, with the bytes behind each token."""

from codecs import getincrementaldecoder
from collections.abc import Sequence
from typing import Any

from tunefork.serve.engine import TokenLogprob
from tunefork.serve.token_text import token_bytes


def chat_tokens(tokenizer: Any, logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """`logprobs.content` of a chat completion."""
    return [
        _token(tokenizer, entry.token_id, entry.text, entry.logprob)
        | {"top_logprobs": [_token(tokenizer, *top) for top in entry.top]}
        for entry in logprobs
    ]


class Offsets:
    """Where the tokens of one answer begin in its text, which may come in parts. One in the midst
    of a character begins where that does; a special one has no text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._at = tokenizer, 0
        self._decoder = getincrementaldecoder("utf-8")("replace")
        added = tokenizer.added_tokens_decoder
        self._special = {token_id for token_id, token in added.items() if token.special}

    def of(self, entry: TokenLogprob) -> int:
        """The next token's."""
        at, is_shown = self._at, entry.token_id not in self._special
        raw = _raw(self._tokenizer, entry.token_id, entry.text) if is_shown else b""
        self._at += len(self._decoder.decode(raw))
        return at


def completion_logprobs(
    tokenizer: Any, logprobs: Sequence[TokenLogprob], top: int, offsets: Offsets
) -> dict[str, list[Any] | None]:
    """`logprobs` of a completion, or of the next part of it."""
    likeliest: list[dict[str, float]] = []
    for entry in logprobs:
        likeliest.append({})
        for token_id, text, logprob in entry.top[:top]:  # of two with one name: the likelier
            likeliest[-1].setdefault(_name(tokenizer, token_id, text), _finite(logprob))
    return {
        "tokens": [_name(tokenizer, entry.token_id, entry.text) for entry in logprobs],
        "token_logprobs": [_finite(entry.logprob) for entry in logprobs],
        "top_logprobs": likeliest if top else None,
        "text_offset": [offsets.of(entry) for entry in logprobs],
    }


def _name(tokenizer: Any, token_id: int, text: str) -> str:
    """As the API has it: a part of a character is `bytes:\\xf0\\x9f`."""
    raw = _raw(tokenizer, token_id, text)
    if raw == text.encode("utf-8", "replace"):
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _raw(tokenizer: Any, token_id: int, text: str) -> bytes:
    return token_bytes(tokenizer.convert_ids_to_tokens(token_id) or "", text)


def _token(tokenizer: Any, token_id: int, text: str, logprob: float) -> dict[str, Any]:
    raw = _raw(tokenizer, token_id, text)
    return {"token": text, "bytes": list(raw), "logprob": _finite(logprob)}


def _finite(logprob: float) -> float:
    """JSON has no infinity; the API says -9999.0 for what cannot be."""
    return logprob if logprob > -9999.0 else -9999.0
