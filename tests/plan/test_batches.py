"""The largest pass is found among all steps; the mean from some of them."""

import numpy as np
import pytest

from tunefork.data.example import Encoded
from tunefork.data.pack import pack
from tunefork.data.split import steps
from tunefork.plan.batches import Work, batches_of_data, batches_of_numbers, shape_of
from tunefork.recipe import DataSection, ModelSection, Recipe, TrainSection


def test_the_largest_pass_of_many_steps() -> None:
    draw = np.random.default_rng(1)
    lengths = np.clip(draw.lognormal(5.0, 0.9, 6000), 8, 2000).astype(int)
    examples = [
        Encoded(f"f:{n}", np.zeros(length, np.int32), np.ones(length, bool))
        for n, length in enumerate(lengths)
    ]
    recipe = Recipe(
        model=ModelSection(id="-"),
        data=DataSection(train="-", max_length=2048),
        train=TrainSection(batch_size=4),
    )
    section = recipe.train
    everything = [
        shape_of(batch)
        for step in steps(len(examples), batch_size=4, epochs=1.0, max_steps=None, seed=0)
        for batch in pack(
            [examples[at] for at in step], max_tokens=section.micro_batch_tokens, packing=True
        )
    ]
    found = batches_of_data(examples, recipe, seed=0)
    assert found.num_steps == 1500
    largest = max(shape.rows * shape.length for shape in everything)
    assert found.largest.rows * found.largest.length >= 0.97 * largest
    mean = sum(shape.rows * shape.length for shape in everything) / len(everything)
    assert found.mean.rows * found.mean.length > 0.8 * mean


@pytest.mark.parametrize("examples", [1, 63, 1000])
@pytest.mark.parametrize("epochs", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("max_steps", [None, 7])
def test_numbers_have_as_many_steps_as_data(
    examples: int, epochs: float, max_steps: int | None
) -> None:
    work = Work(examples, 100 * examples, 10 * examples, epochs, 128, 16, max_steps)
    run = steps(examples, batch_size=16, epochs=epochs, max_steps=max_steps, seed=0)
    assert batches_of_numbers(work).num_steps == len(run)


def test_a_step_holds_no_more_examples_than_there_are() -> None:
    one = batches_of_numbers(Work(1, 100, 10, 1.0, 128, 16))
    assert one.mean.rows * one.mean.length * one.passes_per_step == 100
