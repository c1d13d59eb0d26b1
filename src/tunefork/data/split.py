"""Which examples are held out, and in which order the rest is seen.

Examples are held out by a hash of what they say, never by their place in the file: copies of one
example fall on the same side, and the choice survives a shuffle of the file. Everything random
comes from a seed by way of numpy's generators.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from tunefork.data.example import Encoded, Example
from tunefork.errors import DataError


def content_key(example: Example) -> bytes:
    """Hash of all that an example says; runs of white space count as one space."""
    return _key([example.text or "", *(f"{m.role} {m.content}" for m in example.messages)])


def prompt_key(example: Example) -> bytes:
    """`content_key` of a conversation without its last answer."""
    return _key([f"{message.role} {message.content}" for message in example.messages[:-1]])


def _key(parts: Sequence[str]) -> bytes:
    return _digest("\0".join(" ".join(part.split()) for part in parts).encode())


def _digest(data: bytes, key: bytes = b"") -> bytes:
    return hashlib.blake2b(data, digest_size=16, key=key).digest()


def held_out(keys: Sequence[bytes], share: float) -> list[bool]:
    """Mark `share` of the distinct keys, those that sort first; at least one unless it is 0."""
    distinct = sorted(set(keys))
    count = max(1, round(share * len(distinct))) if share > 0 else 0
    chosen = set(distinct[:count])
    return [key in chosen for key in keys]


def validation_split(
    examples: Sequence[Encoded],
    share: float,
    seed: int,
    otherwise: str = "set compare.search_trials: 1",
) -> tuple[list[Encoded], list[Encoded]]:
    """Cut `share` of the examples off to choose by: (rest, validation), in the order given.

    The choice depends on `seed` and each example's ids. Raises DataError where a side is empty;
    `otherwise` is what can be done then beside giving more.
    """
    keys = [_digest(example.input_ids.tobytes(), seed.to_bytes(4, "big")) for example in examples]
    is_validation = held_out(keys, share)
    rest = [e for e, held in zip(examples, is_validation, strict=True) if not held]
    validation = [e for e, held in zip(examples, is_validation, strict=True) if held]
    if not rest or not validation:
        raise DataError(
            f"data.train: {len(examples)} examples ({len(set(keys))} different) are too few to cut "
            f"a validation share of {share:g} off; give more, or {otherwise}"
        )
    return rest, validation


def subset(count: int, limit: int | None, seed: int, stream: int) -> list[int]:
    """Ascending indices of a random `limit` of `count` examples; a larger limit only adds to it.

    Different `stream`s of one seed are independent.
    """
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(np.random.default_rng([seed, stream]).permutation(count)[:limit].tolist())


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of `n` examples in one epoch, a permutation of range(n)."""
    order: list[int] = np.random.default_rng([seed, epoch]).permutation(n).tolist()
    return order


def steps(
    n: int, *, batch_size: int, epochs: float, max_steps: int | None, seed: int
) -> list[list[int]]:
    """Indices of the examples of each optimiser step.

    Every epoch has an order of its own and its last batch may be short. The fraction of `epochs`
    is an epoch cut short, to the nearest example. At least one example is seen.
    """
    left = max(1, round(epochs * n))
    batches: list[list[int]] = []
    for epoch in range(-(-left // n)):
        if max_steps is not None and len(batches) >= max_steps:
            break  # before the epochs that would be shuffled for nothing
        order = epoch_order(n, seed, epoch)[: left - epoch * n]
        batches += [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    return batches[:max_steps]
