"""Control tokens within a text: `<|im_end|>` in an answer ends it, whatever it was meant as.

A tokenizer reads them wherever they stand, so what follows one in a turn is trained on, or obeyed,
as a turn of another role that no check of supervision has seen.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any


def control_tokens(tokenizer: Any) -> frozenset[str]:
    """What `tokenizer` reads as one of its special tokens; words and single signs aside, which
    some use to fill up rows."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    found = {str(token) for token in tokenizer.all_special_tokens}
    found |= {token.content for token in added if token.special}
    return frozenset(token for token in found if len(token) > 2 and not token.isalnum())


def find_markup(tokens: frozenset[str]) -> Callable[[str], Iterator[tuple[str, int]]]:
    """Of a text each of `tokens` that it holds, and how many."""
    longest_first = sorted(tokens, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def find(text: str) -> Iterator[tuple[str, int]]:
        yield from Counter(pattern.findall(text)).items()

    return find
