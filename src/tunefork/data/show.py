"""`tunefork data show`: a sequence as the model sees it, what is supervised marked."""

from itertools import groupby
from typing import Any

from rich.text import Text

from tunefork.data.example import Encoded

OPENING, CLOSING = "⟦", "⟧"


def show(encoded: Encoded, tokenizer: Any) -> Text:
    """The text of `encoded`, special tokens included, each supervised run coloured and in ⟦ ⟧.

    A character whose bytes are split between two runs shows as the replacement character.
    """
    text = Text()
    tokens = zip(encoded.input_ids.tolist(), encoded.supervised.tolist(), strict=True)
    for is_supervised, run in groupby(tokens, key=lambda token: token[1]):
        ids = [token_id for token_id, _ in run]
        words = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if is_supervised:
            text.append(f"{OPENING}{words}{CLOSING}", style="bold green")
        else:
            text.append(words, style="dim")
    return text
