"""Tokens become text as they come: whole characters only, and never what belongs to a stop text.

A character may take several tokens, and a token's text may depend on those before it (a leading
space), so they are decoded in the company of the last ones before them. Text that may yet turn out
to be the beginning of a stop text waits.
"""

from collections.abc import Sequence
from typing import Any

from tunefork.serve.token_text import token_bytes

_CONTEXT = 6
"""Tokens that are decoded along; what precedes a token by more does not change its text."""
_MOST_WAITING = 8
"""No character of UTF-8 has more than 4 bytes: what is not whole after these is none."""
_NO_CHARACTER = "�"


class Detokenizer:
    """The text of one answer, piece by piece.

    The pieces put together are the text of all tokens, special ones left out, up to the first of
    `stop` (texts). Bytes that make no character become U+FFFD.
    """

    def __init__(
        self, tokenizer: Any, prompt_ids: Sequence[int] = (), stop: Sequence[str] = ()
    ) -> None:
        self.stopped = False
        """A stop text was met: no more will come."""
        self._backend = tokenizer.backend_tokenizer
        self._stop = tuple(stop)
        self._waiting: list[int] = []
        self._held = ""
        self._begin_after(prompt_ids)

    def push(self, token_ids: Sequence[int]) -> str:
        """What can be shown now that `token_ids` came; often empty."""
        if self.stopped:
            return ""
        text = "".join(map(self._decode, token_ids))
        return self._until_stop(text) if self._stop else text

    def flush(self) -> str:
        """What was waiting, now that the answer is over."""
        if self.stopped:
            return ""
        text = self._until_stop(self._take(self._text()))
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _decode(self, token_id: int) -> str:
        self._waiting.append(token_id)
        text = self._text()
        if text.endswith(_NO_CHARACTER) and len(self._waiting) < _MOST_WAITING:
            return ""
        return self._take(text)

    def _text(self) -> str:
        return str(self._backend.decode([*self._before, *self._waiting], skip_special_tokens=True))

    def _take(self, text: str) -> str:
        """What `text` has that was not shown; the tokens behind it wait no longer."""
        new = text[self._shown :]
        self._begin_after([*self._before, *self._waiting])
        self._waiting = []
        return new

    def _begin_after(self, ids: Sequence[int]) -> None:
        self._before = list(ids[-_CONTEXT:])
        before = self._backend.decode(self._before, skip_special_tokens=True)
        # A character that the prompt leaves open is completed by the answer.
        is_open = not self._waiting and before.endswith(_NO_CHARACTER) and self._is_open()
        self._shown = len(before.rstrip(_NO_CHARACTER) if is_open else before)

    def _is_open(self) -> bool:
        """Whether what the context ends with is no U+FFFD that somebody has written."""
        name, text = self._backend.id_to_token, self._backend.decode
        parts = [token_bytes(name(one) or "", text([one])) for one in self._before]
        return not b"".join(parts).endswith(_NO_CHARACTER.encode())

    def _until_stop(self, text: str) -> str:
        self._held += text
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(shown) :]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that `stop` may begin with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
