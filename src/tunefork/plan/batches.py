"""How a recipe's examples fall into forward passes: the largest one, and what they are in the mean.

With the data at hand its examples are packed as training will pack them. Without it, from a few
numbers, examples are taken to be of mean length, and the largest pass to be full of the longest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nlargest

from tunefork.data.example import Encoded
from tunefork.data.pack import ROW_LENGTH, MicroBatch, pack
from tunefork.data.split import steps
from tunefork.errors import BadInputError
from tunefork.plan.passes import Shape
from tunefork.recipe import Recipe

_MOST_STEPS = 200
"""Optimiser steps that are packed to see how examples fall in the mean."""
_HEAVIEST = 20
"""Steps that are packed to find the largest pass."""


@dataclass(frozen=True, slots=True)
class Work:
    """How much is to be trained, in numbers."""

    examples: int
    tokens: int
    """In one pass over the examples, prompts included."""
    supervised_tokens: int
    epochs: float
    max_length: int
    """Longest example, tokens."""
    batch_size: int
    max_steps: int | None = None


@dataclass(frozen=True, slots=True)
class Batches:
    """How the work falls into steps and passes."""

    largest: Shape
    """The forward pass that takes the most memory."""
    mean: Shape
    """What passes are like in the mean, whole numbers."""
    passes_per_step: float
    num_steps: int
    note: str


def batches_of_data(examples: Sequence[Encoded], recipe: Recipe, *, seed: int) -> Batches:
    """From the data itself."""
    section = recipe.train
    schedule = steps(
        len(examples),
        batch_size=section.batch_size,
        epochs=section.epochs,
        max_steps=section.max_steps,
        seed=seed,
    )
    seen = schedule[:: max(1, len(schedule) // _MOST_STEPS)]

    def passes(steps: Sequence[Sequence[int]]) -> list[Shape]:
        return [
            shape_of(batch)
            for step in steps
            for batch in pack(
                [examples[at] for at in step],
                max_tokens=section.micro_batch_tokens,
                packing=section.packing,
            )
        ]

    shapes = passes(seen)
    count = len(shapes)
    rows = round(sum(shape.rows for shape in shapes) / count) or 1
    tokens = sum(shape.rows * shape.length for shape in shapes) / count
    mean = Shape(
        rows=rows,
        length=max(1, round(tokens / rows)),
        supervised=max(1, round(sum(shape.supervised for shape in shapes) / count)),
        is_masked=sum(shape.is_masked for shape in shapes) * 2 > count,
        segments=max(rows, round(sum(shape.num_segments for shape in shapes) / count)),
        squares=sum(shape.attended for shape in shapes) / count,
    )
    return Batches(
        largest=max([*shapes, *passes(_heaviest(schedule, examples))], key=_weight),
        mean=mean,
        passes_per_step=count / len(seen),
        num_steps=len(schedule),
        note=f"{len(examples)} training examples, packed as training packs them",
    )


def _heaviest(
    schedule: Sequence[Sequence[int]], examples: Sequence[Encoded]
) -> list[Sequence[int]]:
    """The steps with the most tokens, and those with the longest examples."""
    lengths = [len(example.input_ids) for example in examples]
    by_sum = nlargest(_HEAVIEST, schedule, key=lambda step: sum(lengths[at] for at in step))
    return by_sum + nlargest(_HEAVIEST, schedule, key=lambda step: max(lengths[at] for at in step))


def shape_of(batch: MicroBatch) -> Shape:
    """Of a packed micro-batch. Rows of several examples, or of padding, need a mask."""
    rows, length = batch.input_ids.shape
    is_masked = bool((batch.position_ids[:, 1:] == 0).any())
    lengths = batch.segments.starts.diff().double()
    return Shape(
        rows,
        length,
        len(batch.supervised[0]),
        is_masked,
        segments=len(lengths),
        squares=float(lengths.square().sum()),
    )


def _weight(shape: Shape) -> tuple[int, int]:
    return shape.rows * shape.length, shape.supervised


def work_of(
    recipe: Recipe, *, examples: int | None = None, tokens: int | None = None
) -> Work | None:
    """How much is to be trained, where it is told and not read from the data; None where not.

    Raises BadInputError for numbers that no data of this recipe could have.
    """
    if examples is None and tokens is None:
        return None
    if examples is None or tokens is None:
        raise BadInputError("--examples and --tokens: give both, or neither to read the data")
    if tokens < 2 * examples:
        raise BadInputError(
            f"--tokens: {tokens} is less than two for each of --examples {examples}; give the "
            "tokens of all examples together"
        )
    if tokens > recipe.data.max_length * examples:
        raise BadInputError(
            f"--tokens: {tokens} is more than data.max_length ({recipe.data.max_length}) for each "
            f"of --examples {examples}"
        )
    return Work(
        examples=examples,
        tokens=tokens,
        supervised_tokens=tokens,
        epochs=recipe.train.epochs,
        max_length=recipe.data.max_length,
        batch_size=recipe.train.batch_size,
        max_steps=recipe.train.max_steps,
    )


def batches_of_numbers(
    work: Work, *, micro_batch_tokens: int | None = None, packing: bool = True
) -> Batches:
    """From numbers alone; the largest pass is as large as it may become."""
    limit = micro_batch_tokens or max(4096, work.max_length)
    batch_size = min(work.batch_size, work.examples)
    step_tokens = work.tokens / work.examples * batch_size
    width = max(min(work.max_length, limit), min(ROW_LENGTH, limit) if packing else 1)
    share = min(1.0, work.supervised_tokens / work.tokens)
    most_rows = max(1, limit // width)
    largest_rows = min(most_rows, max(1, -(-batch_size * work.max_length // width)))
    passes = max(1.0, step_tokens / (most_rows * width))
    mean_rows = max(1, min(most_rows, round(step_tokens / passes / width)))
    mean_length = max(1, min(width, round(step_tokens / passes / mean_rows)))
    is_masked = packing and work.max_length > 1

    def shape(rows: int, length: int) -> Shape:
        tokens = rows * length
        segments = max(rows, round(tokens * work.examples / work.tokens)) if is_masked else rows
        return Shape(rows, length, max(1, round(share * tokens)), is_masked, segments)

    return Batches(
        largest=shape(largest_rows, width),
        mean=shape(mean_rows, mean_length),
        passes_per_step=passes,
        num_steps=_num_steps(work),
        note="from the numbers given; lengths are assumed to be near their mean",
    )


def _num_steps(work: Work) -> int:
    """As `data.split.steps` has them: the last one of every epoch may be short."""
    epochs, rest = divmod(max(1, round(work.epochs * work.examples)), work.examples)
    steps = epochs * -(-work.examples // work.batch_size) + -(-rest // work.batch_size)
    return steps if work.max_steps is None else min(steps, work.max_steps)
