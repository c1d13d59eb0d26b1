"""The largest pass is found among all steps; the mean from some of them."""

import numpy as np

from tunefork.data.example import Encoded
from tunefork.data.pack import pack
from tunefork.data.split import steps
from tunefork.plan.batches import batches_of_data, shape_of
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
