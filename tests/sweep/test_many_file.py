"""What train-many is asked for, and every fault of it by file:line and field."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tunefork.errors import RecipeError
from tunefork.recipe_file import load
from tunefork.sweep.many_file import load_entries, load_many, save_entries

SHARED: dict[str, Any] = {
    "model": "some/model",
    "data": {"train": "shared.jsonl", "max_length": 64},
    "lora": {"rank": 4, "alpha": 8},
}


def _write(folder: Path, entries: Any, recipe: Any = SHARED, **more: Any) -> Path:
    file = folder / "customers.yaml"
    fields = {"recipe": recipe, "adapters": entries} | more
    file.write_text(yaml.safe_dump(fields, sort_keys=False))
    return file


def test_an_entry_beats_the_shared_recipe_field_by_field(tmp_path: Path) -> None:
    file = _write(
        tmp_path,
        [
            {
                "name": "acme",
                "data": {"train": "acme.jsonl"},
                "publish": "x/a",
                "tags": ["prod"],
            },
            {"name": "bolt", "lora": {"rank": 8}, "train": {"max_steps": 3}},
        ],
    )
    acme, bolt = load_many(file)
    assert acme.recipe.data.train == str(tmp_path / "acme.jsonl")
    assert acme.recipe.data.max_length == 64
    assert (acme.publish, acme.tags) == ("x/a", ("prod",))
    assert (bolt.recipe.lora.rank, bolt.recipe.lora.alpha) == (8, 8)
    assert bolt.recipe.train.learning_rate == 2e-4  # as `tunefork train` would take it
    assert acme.where.endswith("customers.yaml:10") and bolt.publish is None
    save_entries([acme, bolt], tmp_path / "entries.json")
    assert load_entries(tmp_path / "entries.json") == [acme, bolt]


def test_the_shared_recipe_may_be_a_file_of_another_folder(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "base.yaml").write_text(yaml.safe_dump(SHARED))
    file = _write(tmp_path, [{"name": "a", "data": {"eval": "own.jsonl"}}], "base/base.yaml")
    [entry] = load_many(file, prefix="team")
    assert entry.recipe.data.train == str(tmp_path / "base" / "shared.jsonl")
    assert entry.recipe.data.eval == str(tmp_path / "own.jsonl")
    assert entry.publish == "team/a"


def test_a_folder_of_recipes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(SHARED))
    assert [entry.name for entry in load_many(tmp_path)] == ["one", "two"]
    assert load_many(tmp_path)[0].recipe.lora == load(tmp_path / "one.yaml").lora
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(SHARED | {"model": "other/model"}))
    with pytest.raises(RecipeError, match=r"two.yaml: model: other/model, but .*one.yaml has some"):
        load_many(tmp_path)


A, B = {"name": "a"}, {"name": "b"}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "names no adapter"),
        ("acme", "adapters: must be a list"),
        (
            [A | {"lorra": {}}],
            r"yaml:10: lorra: unknown key; did you mean 'lora'",
        ),
        ([A | {"lora": {"rnk": 1}}], r":10 \(a\): lora.rnk: unknown key; did you mean"),
        ([{"lora": {"rank": 1}}], ":10: name: Field required"),
        ([A, dict(A)], ":11: name: a is taken by .*:10"),
        ([{"name": "../a"}], ":10: name: must be 1 to 80"),
        ([{"name": "many.json"}], ":10: name: must be .* not end in .json"),
        ([A | {"publish": "UP"}], ":10: publish: 'UP' is no name"),
        ([A | {"tags": ["prod"]}], ":10: tags: belong to a version"),
        (
            [A | {"publish": "x"}, B | {"publish": "x"}],
            ":12: publish: x is taken",
        ),
        ([A | {"model": "m"}], ":10: model: is the same for all adapters"),
        (
            [A, B | {"train": {"precision": "fp32"}}],
            ":11: train.precision: fp32",
        ),
        (["acme"], ":10: must be a mapping"),
    ],
)
def test_faults_name_their_line_and_field(tmp_path: Path, entries: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_many(_write(tmp_path, entries))


def test_every_faulty_entry_is_named_at_once(tmp_path: Path) -> None:
    entries = [A | {"lora": {"rank": 0}}, {"name": "b"}, {"name": "c", "x": 1}]
    with pytest.raises(RecipeError) as caught:
        load_many(_write(tmp_path, entries))
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"recipe": 3}, "recipe: must name a recipe file"),
        ({"recipe": SHARED | {"method": "full"}}, "method: full trains every weight"),
        ({"adaptors": []}, "adaptors: unknown key; did you mean 'adapters'"),
    ],
)
def test_faults_of_the_whole(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    file = _write(tmp_path, [{"name": "a"}], **fields)
    with pytest.raises(RecipeError, match=message):
        load_many(file)
