"""The examples of many adapters' steps become passes, each adapter's tokens standing together.

A pass holds at most a budget of tokens, taken from the adapters in the order of their slots; what
an adapter has over is in the next pass, and its gradient adds up. Where a mask keeps examples apart
a row is one adapter's alone: a masked token has no weight, but times NaN that is NaN. All rows are
as wide, so the width is chosen that leaves the least padding. Where the model takes segments there
are no rows to fill, and tokens simply follow each other.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from tunefork.data.bucket import WHOLE_ROWS
from tunefork.data.example import Encoded
from tunefork.data.pack import ROW_LENGTH, MicroBatch, fill_rows, lay_out
from tunefork.data.slots import Slots

_MOST_WIDTHS = 8
_ATTENTION = 2500
"""Width at which attention over a row's scores takes as long as all else (SmolLM2-135M on a CPU:
10 % of a pass at 256)."""


def passes(
    chosen: Sequence[Sequence[Encoded]],
    *,
    max_tokens: int,
    packing: bool,
    pad_id: int,
    in_segments: bool = False,
) -> list[MicroBatch]:
    """Micro-batches of at most `max_tokens`, padding included, of each slot's examples.

    `MicroBatch.example` is the index among its slot's. Raises ValueError where an example is longer
    than a pass.
    """
    lengths = [[len(example.input_ids) for example in own] for own in chosen]
    longest = max(max(own, default=0) for own in lengths)
    if longest > max_tokens:
        raise ValueError(f"an example has {longest} tokens, more than a pass ({max_tokens})")
    same = {length for own in lengths for length in own}
    if in_segments and not (len(same) == 1 and longest % WHOLE_ROWS == 0):
        return _one_row(chosen, max_tokens, pad_id)
    if in_segments or not packing:
        width, rows = longest, [[[at] for at in range(len(own))] for own in lengths]
    else:
        width, rows = _evenest(lengths, longest, max_tokens)
    return _cut(chosen, rows, width, max_tokens // width, pad_id)


def _evenest(
    lengths: Sequence[Sequence[int]], longest: int, max_tokens: int
) -> tuple[int, list[list[list[int]]]]:
    """The row width that costs least, and each slot's rows."""
    limit = min(max(ROW_LENGTH, longest), max_tokens)
    totals = {min(max(longest, sum(own)), limit) for own in lengths if own}
    wanted = sorted(totals | {longest, limit})
    stride = -(-len(wanted) // _MOST_WIDTHS)
    best: tuple[float, int, list[list[list[int]]]] | None = None
    for length in {longest, *wanted[::stride], limit}:
        rows = [fill_rows(own, length) if own else [] for own in lengths]
        used = [
            sum(own[at] for at in row) for own, r in zip(lengths, rows, strict=True) for row in r
        ]
        width = max(used)
        cost = width * len(used) * (1 + width / _ATTENTION)
        if best is None or cost < best[0]:
            best = (cost, width, rows)
    assert best is not None
    return best[1], best[2]


def _cut(
    chosen: Sequence[Sequence[Encoded]],
    rows: Sequence[Sequence[Sequence[int]]],
    width: int,
    rows_in_pass: int,
    pad_id: int,
) -> list[MicroBatch]:
    everything = [(slot, row) for slot, own in enumerate(rows) for row in own]
    found = []
    for start in range(0, len(everything), rows_in_pass):
        part = everything[start : start + rows_in_pass]
        examples: list[Encoded] = []
        laid: list[list[int]] = []
        for slot, row in part:
            laid.append(list(range(len(examples), len(examples) + len(row))))
            examples += [chosen[slot][at] for at in row]
        counts = [width * sum(own == slot for own, _ in part) for slot in range(len(chosen))]
        origin = [at for _, row in part for at in row]
        found.append(_with_slots(lay_out(examples, laid, width, pad_id), counts, origin))
    return found


def _one_row(chosen: Sequence[Sequence[Encoded]], max_tokens: int, pad_id: int) -> list[MicroBatch]:
    found: list[MicroBatch] = []
    part: list[Encoded] = []
    origin: list[int] = []
    counts = [0] * len(chosen)

    def close() -> None:
        batch = lay_out(part, [range(len(part))], sum(counts), pad_id)
        found.append(_with_slots(batch, counts, origin))

    for slot, own in enumerate(chosen):
        for at, example in enumerate(own):
            if part and sum(counts) + len(example.input_ids) > max_tokens:
                close()
                part, origin, counts = [], [], [0] * len(chosen)
            part.append(example)
            origin.append(at)
            counts[slot] += len(example.input_ids)
    close()
    return found


def _with_slots(batch: MicroBatch, counts: Sequence[int], origin: Sequence[int]) -> MicroBatch:
    rows_s, columns_s = batch.supervised
    at_s = rows_s * batch.input_ids.shape[1] + columns_s
    own = torch.tensor([*origin, -1])[batch.example]
    return replace(batch, example=own, slots=Slots.of(counts, at_s))


def unsupervised(examples: Sequence[Encoded], pad_id: int) -> list[Encoded]:
    """As many tokens, as padding: what stands where a failed adapter's were."""
    return [
        replace(
            example,
            input_ids=np.full_like(example.input_ids, pad_id),
            supervised=np.zeros_like(example.supervised),
        )
        for example in examples
    ]
