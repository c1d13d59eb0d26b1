"""Which runs a sweep is made of."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunefork.errors import RecipeError
from tunefork.recipe import Recipe
from tunefork.recipe_file import dump, load
from tunefork.sweep.variants import KNOBS, variants

Make = Callable[..., Recipe]


def test_a_grid_has_every_combination_each_a_recipe_of_its_own(make_recipe: Make) -> None:
    recipe = make_recipe(
        sweep={"rank": [2, 4], "learning_rate": [1e-4, 5e-5], "seed": [0, 7]}, train={"seed": 3}
    )
    found = variants(recipe)
    assert [v.name for v in found[:5]] == [
        "r2-lr1e-4-s0",
        "r2-lr1e-4-s7",
        "r2-lr5e-5-s0",
        "r2-lr5e-5-s7",
        "r4-lr1e-4-s0",
    ]
    assert len(found) == 8 and len({v.configuration for v in found}) == 4
    last = found[-1].recipe
    assert (last.lora.rank, last.train.learning_rate, last.train.seed) == (4, 5e-5, 7)
    assert last.lora.alpha == recipe.lora.alpha
    assert {v.recipe.data_seed for v in found} == {3}  # all draw their examples alike
    assert last.sweep == Recipe.model_fields["sweep"].default


def test_every_knob_reaches_its_field(make_recipe: Make, tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "rank": 3,
        "alpha": 5.0,
        "scaling": "rslora",
        "targets": ("q_proj", "v_proj"),
        "dropout": 0.25,
        "data": "/x/mix.jsonl",
        "batch_size": 2,
        "epochs": 0.5,
        "max_steps": 9,
        "schedule": "constant",
        "warmup_share": 0.5,
        "weight_decay": 0.125,
        "learning_rate": 7e-4,
        "seed": 11,
    }
    assert set(values) == set(KNOBS)
    recipe = make_recipe(sweep={knob: [value] for knob, value in values.items()})
    [variant] = variants(recipe)
    for knob, (section, field) in KNOBS.items():
        assert getattr(getattr(variant.recipe, section), field) == values[knob], knob
    file = tmp_path / "recipe.yaml"
    file.write_text(dump(variant.recipe))
    assert load(file) == variant.recipe  # what the run folder will hold


def test_a_random_search_draws_configurations_not_seeds(make_recipe: Make) -> None:
    def names(seed: int) -> list[str]:
        sweep = {
            "rank": [1, 2, 3, 4],
            "alpha": [8, 16, 32],
            "seed": [0, 1],
            "search": "random",
            "count": 5,
            "search_seed": seed,
        }
        return [v.name for v in variants(make_recipe(sweep=sweep))]

    assert len(names(0)) == 10 == len(set(names(0)))
    assert names(0) == names(0) != names(1)
    assert sum(name.endswith("-s1") for name in names(0)) == 5


def test_names_are_unique_and_fit_for_folders(make_recipe: Make) -> None:
    recipe = make_recipe(
        sweep={
            "targets": [["q_proj", "self_attn.v_proj"], "mlp"],
            "data": ["/a/mix one.jsonl", "/b/mix one.jsonl"],
        }
    )
    names = [v.name for v in variants(recipe)]
    assert len(set(names)) == 4
    assert names[0].startswith("q_proj+self_attn.v_proj-mix_one")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"sweep": {"rank": [2]}, "method": "full"}, "method: full .*sweep lora or qlora"),
        ({"sweep": {}}, "varies nothing; .*--rank 8,16"),
        (
            {"sweep": {"learning_rate": [1e-4]}, "train": {"learning_rate": 1e-3}},
            "train.learning_rate: 0.001 is one rate",
        ),
        ({"sweep": {"data": ["a.jsonl"]}, "data": {"eval": None}}, "give data.eval"),
        ({"sweep": {"seed": list(range(5000))}}, "5,000 variants; at most 4,096"),
    ],
)
def test_what_cannot_be_swept_is_refused(
    make_recipe: Make, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        variants(make_recipe(**sections))


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"rank": [4, 4]}, "sweep.rank: holds the same value twice"),
        ({"rank": [0]}, "sweep.rank.0"),
        ({"rnk": [1]}, "did you mean 'rank'"),
        ({"search": "random", "rank": [1]}, "give both, or neither"),
        ({"count": 3, "rank": [1]}, "give both, or neither"),
        ({"halving": {"keep": 1.0}}, "sweep.halving.keep"),
        ({"halving": {"kep": 0.5}}, "did you mean 'keep'"),
        ({"targets": ["mpl"]}, "sweep.targets"),
    ],
)
def test_errors_name_the_field(make_recipe: Make, sweep: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_recipe(sweep=sweep)
