"""Recipes: what is read, what overrides it, and how each mistake is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from tunefork.errors import RecipeError
from tunefork.evaluate.forgetting import GENERAL
from tunefork.model.packaged import PACKAGED
from tunefork.recipe import Method, Recipe
from tunefork.recipe_file import KEYWORDS, anchor, dump, load, parse, read_fields, relative

SMALLEST: dict[str, Any] = {"model": "owner/name", "data": {"train": "owner/rows"}}
TEXT = "model: owner/name\ndata: {train: owner/rows}\n"


def _refusal(**sections: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        parse(SMALLEST | sections)
    return str(caught.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT)
    return path


def _load_refusal(file: Path, text: str | bytes, *overrides: str) -> str:
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError) as caught:
        load(file, overrides)
    return str(caught.value)


# What is read


def test_the_smallest_recipe_has_defaults(file: Path) -> None:
    recipe = load(file)
    assert recipe == parse(SMALLEST)
    assert recipe.model.id == "owner/name" and recipe.model.revision is None
    assert recipe.method is Method.LORA
    assert recipe.lora.rank == 16 and recipe.lora.targets == "all-linear"


def test_what_is_dumped_loads_equal(tmp_path: Path) -> None:
    recipe = parse(
        {
            "model": {"id": "owner/name", "revision": "1234567e8"},  # a commit, not a float
            "data": {
                "train": str(tmp_path / "rows.jsonl"),
                "labels": ["yes", "null", "1e4", "2026-01-02", "12", "ä: #"],
                "instruction": "two\nlines",
                "columns": {"text": "0x1F"},
            },
            "method": "full",
            "lora": {"targets": ["q_proj", "mlp.up_proj"]},
            "train": {"learning_rate": 1e-5, "max_steps": None, "packing": False},
            "compare": {"methods": ["full", "lora"], "learning_rates": {"lora": [1e-4, 2e-4, 1]}},
        }
    )
    written = tmp_path / "elsewhere" / "recipe.yaml"
    written.parent.mkdir()
    written.write_text(dump(recipe), encoding="utf-8")
    assert load(written) == recipe
    assert dump(load(written)) == dump(recipe)


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse(SMALLEST).lora.rank = 3


def test_what_is_read_again_is_not_what_was_made_of_it(file: Path) -> None:
    before = load(file)
    read_fields(file)["model"] = "another"
    assert load(file) == before


@pytest.mark.parametrize(
    ("written", "value"), [("1e-4", 1e-4), ("2E+1", 20.0), (".5", 0.5), ("3", 3.0), ("1.5e0", 1.5)]
)
def test_floats_are_yaml_1_2s(file: Path, written: str, value: float) -> None:
    file.write_text(TEXT + f"train: {{learning_rate: {written}}}\n")
    assert load(file).train.learning_rate == value


def test_a_revision_may_look_like_a_date(file: Path) -> None:
    file.write_text("model: {id: owner/name, revision: 2026-01-02}\ndata: {train: owner/rows}\n")
    assert load(file).model.revision == "2026-01-02"


def test_paths_are_those_of_the_recipes_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "recipes"
    (folder / "model").mkdir(parents=True)
    (tmp_path / "rows").mkdir()
    file = folder / "mine.yaml"
    file.write_text(
        "model: model\n"
        "data: {train: later.jsonl, eval: ../rows}\n"
        "evaluate: {forgetting: ./general.txt}\n"
    )
    monkeypatch.chdir(tmp_path)
    recipe = load(Path("recipes/mine.yaml"))
    assert recipe.model.id == str(folder / "model")
    assert recipe.data.train == str(folder / "later.jsonl")
    assert recipe.data.eval == str(tmp_path / "rows")
    assert recipe.evaluate.forgetting == str(folder / "general.txt")


@pytest.mark.parametrize("name", ["owner/name", "owner/name:test", "~nobody-at-all/x", "x" * 300])
def test_what_is_no_path_stays_as_it_is(file: Path, name: str) -> None:
    file.write_text(f'model: owner/name\ndata: {{train: "{name}"}}\n')
    recipe = load(file)
    assert recipe.data.train == name
    assert recipe.evaluate.forgetting == "general"


def test_a_keyword_means_the_same_in_every_folder(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("general", "smollm2-135m-instruct"):
        (file.parent / name).mkdir()
    file.write_text("model: smollm2-135m-instruct\ndata: {train: general}\n")
    recipe = load(file)
    assert (recipe.model.id, recipe.evaluate.forgetting) == ("smollm2-135m-instruct", "general")
    assert recipe.data.train == str(file.parent / "general")  # no keyword there
    monkeypatch.chdir(file.parent)
    assert anchor(recipe, Path.cwd()) == recipe
    meant = load(file, ("model=./smollm2-135m-instruct", "evaluate.forgetting=./general"))
    assert meant.model.id == str(file.parent / "smollm2-135m-instruct")
    assert meant.evaluate.forgetting == str(file.parent / "general")


def test_the_keywords_are_what_is_packaged() -> None:
    assert {"model": tuple(PACKAGED), "evaluate": (GENERAL,)} == KEYWORDS


# Overrides


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("lora.rank=32", "lora", "rank", 32),
        ("train.learning_rate=3e-4", "train", "learning_rate", 3e-4),
        ("train.packing=false", "train", "packing", False),
        ("train.max_steps=null", "train", "max_steps", None),
        ("data.labels=[a, 'no']", "data", "labels", ("a", "no")),
        ("data.columns.text=body", "data", "columns", {"text": "body"}),
        ("data.instruction='Is it: a=b?'", "data", "instruction", "Is it: a=b?"),
        ("model.revision=main", "model", "revision", "main"),
        ("model=other/name", "model", "id", "other/name"),
        (" lora.rank =32", "lora", "rank", 32),
    ],
)
def test_overrides_have_types_and_nest(
    file: Path, override: str, section: str, field: str, value: object
) -> None:
    assert getattr(getattr(load(file, (override,)), section), field) == value


def test_overrides_beat_the_file_and_the_last_one_wins(file: Path) -> None:
    file.write_text(TEXT + "lora: {rank: 4, alpha: 8}\nmethod: full\n")
    recipe = load(file, ("lora.rank=5", "lora.rank=6", "method=qlora"))
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.method) == (6, 8, Method.QLORA)


def test_a_path_in_an_override_is_the_recipes_too(file: Path) -> None:
    assert load(file, ("data.train=a.jsonl",)).data.train == str(file.parent / "a.jsonl")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.rank", "--set lora.rank: write KEY=VALUE"),
        ("=3", "--set =3: write KEY=VALUE"),
        ("method.x=3", "--set method.x=3: 'method' is not a section"),
        ("lora.rank=[1", "--set lora.rank:1: is not YAML: expected ',' or ']'"),
        ("lora.rnk=3", "command line: lora.rnk: unknown key; did you mean 'rank'?"),
        ("lorra.rank=3", "command line: lorra: unknown key; did you mean 'lora'?"),
        ("lora.targets=[q, 5]", "command line: lora.targets.1: should be a valid string"),
        ("lora.rank=0", "command line: lora.rank: should be greater than or equal to 1 (found 0)"),
    ],
)
def test_wrong_overrides(file: Path, override: str, message: str) -> None:
    assert message in _load_refusal(file, TEXT + "method: lora\n", override)


# Mistakes


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"lorra": {}}, "lorra: unknown key; did you mean 'lora'?"),
        ({"model": {"id": "m", "revison": "x"}}, "model.revison: unknown key; did you mean"),
        ({"data": {"train": "t", "evl": "x"}}, "data.evl: unknown key; did you mean 'eval'?"),
        ({"lora": {"rnk": 3}}, "lora.rnk: unknown key; did you mean 'rank'?"),
        ({"full": {"weight": 3}}, "full.weight: unknown key; did you mean 'weights'?"),
        ({"train": {"epoch": 3}}, "train.epoch: unknown key; did you mean 'epochs'?"),
        ({"evaluate": {"metric": 1}}, "evaluate.metric: unknown key; did you mean 'metrics'?"),
        ({"compare": {"seed": 1}}, "compare.seed: unknown key; did you mean 'seeds'?"),
        ({"lora": {"zzz": 3}}, "lora.zzz: unknown key; allowed: rank, alpha, scaling, dropout"),
    ],
)
def test_unknown_keys_name_the_nearest(sections: dict[str, Any], message: str) -> None:
    assert _refusal(**sections).startswith(f"recipe: {message}")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"lora": {"rank": 0}}, "lora.rank: should be greater than or equal to 1 (found 0)"),
        ({"lora": {"rank": "many"}}, "lora.rank: should be a whole number"),
        ({"lora": {"rank": 1.5}}, "lora.rank: should be a whole number"),
        ({"lora": {"rank": True}}, "lora.rank: must not be True"),
        ({"train": {"compile": True}}, "as); should be 'auto', 'always' or 'never'"),
        ({"lora": {"targets": []}}, "lora.targets: is an empty list"),
        ({"lora": {"targets": ["q", 5]}}, "lora.targets.1: should be a valid string (found 5)"),
        ({"lora": {"targets": "mlpp"}}, "lora.targets: should be 'all-linear', 'attention' or"),
        ({"lora": None}, "lora: must hold some of the keys rank, alpha"),
        ({"train": {"learning_rate": -1}}, "train.learning_rate: should be greater than 0"),
        ({"train": {"learning_rate": float("nan")}}, "train.learning_rate: should be a finite"),
        ({"train": {"max_grad_norm": float("inf")}}, "train.max_grad_norm: should be a finite"),
        ({"train": {"beta2": 1.0}}, "train.beta2: should be less than 1 (found 1.0)"),
        ({"train": {"seed": -1}}, "train.seed: should be greater than or equal to 0"),
        ({"train": {"schedule": "cosin"}}, "(found 'cosin'); did you mean 'cosine'?"),
        (
            {"train": {"micro_batch_tokens": 100}},
            "train.micro_batch_tokens: 100 is less than data.max_length (1024)",
        ),
        ({"method": "lorra"}, "method: should be 'lora', 'qlora' or 'full' (found 'lorra')"),
        (
            {"evaluate": {"metrics": ["loss", "acuracy"]}},
            "evaluate.metrics.1: should be 'loss', 'perplexity', 'accuracy', 'macro_f1', "
            "'exact_match' or 'rouge_l' (found 'acuracy'); did you mean 'accuracy'?",
        ),
        ({"evaluate": {"metrics": []}}, "evaluate.metrics: is an empty list"),
        ({"model": 5}, "model: must hold some of the keys id, revision"),
        ({"model": ""}, "model.id: String should have at least 1 character"),
        ({"data": {}}, "data.train: is missing; it has no default"),
        ({"data": {"train": "t", "labels": ["a", "a"]}}, "data.labels: holds the same value"),
        ({"data": {"train": "t", "labels": [False]}}, "(found False); put it in quotes"),
        ({"data": {"train": "t", "columns": 3}}, "data.columns: must be a mapping (found 3)"),
        ({"compare": {"methods": []}}, "compare.methods: is an empty list"),
        ({"compare": {"methods": ["lora", "lora"]}}, "compare.methods: holds the same value"),
        ({"compare": {"seeds": []}}, "compare.seeds: is an empty list"),
        ({"compare": {"seeds": [0, -1]}}, "compare.seeds.1: should be greater than or equal"),
        ({"compare": {"search_trials": 4}}, "compare.learning_rates.lora: has 3 rates, but"),
        (
            {"compare": {"learning_rates": {"full": [3e-4, 2e-4, 1e-4]}}},
            "compare.learning_rates.full: must ascend",
        ),
        (
            {"compare": {"learning_rates": {"lorra": [1e-4]}}},
            "compare.learning_rates.lorra: should be 'lora', 'qlora' or 'full'",
        ),
    ],
)
def test_bad_values_name_the_field(sections: dict[str, Any], message: str) -> None:
    assert message in _refusal(**sections)


def test_every_mistake_is_named_at_once() -> None:
    message = _refusal(
        lora={"rank": 0, "zzz": 1}, train={"epochs": -1}, method="x", data={"trian": "t"}
    )
    starts = [line.partition(": ")[2].partition(":")[0] for line in message.splitlines()]
    assert starts == ["data.train", "data.trian", "method", "lora.rank", "lora.zzz", "train.epochs"]


def test_a_method_not_compared_may_have_any_grid() -> None:
    rates = {"full": [3e-4, 2e-4]}
    recipe = parse(SMALLEST | {"compare": {"methods": ["lora"], "learning_rates": rates}})
    assert recipe.compare.learning_rates[Method.LORA] == (1e-4, 3e-4, 1e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXT + "lora: {rank: 3\n", "mine.yaml:4: is not YAML: expected ',' or '}'"),
        (TEXT + "lora:\n\trank: 3\n", "mine.yaml:4: is not YAML: found character '\\t'"),
        (TEXT + "lora: a: b\n", "mine.yaml:3: is not YAML: mapping values are not allowed"),
        (TEXT + "lora: {rank: 3}\nmodel: x\n", "mine.yaml:1: is not YAML: the key 'model' stands"),
        (TEXT + "lora: {rank: 3, rank: 4}\n", "mine.yaml:3: is not YAML: the key 'rank' stands"),
        (TEXT + "lora: !!python/object:os.system x\n", "mine.yaml:3: is not YAML: could not"),
        (TEXT + "---\n", "mine.yaml:3: is not YAML"),
        (TEXT + "# \a\n", "mine.yaml:3: is not YAML: special characters are not allowed"),
        (TEXT + "lora: {rank: 0b_}\n", "mine.yaml: is not YAML: invalid literal"),
        pytest.param(
            TEXT + "lora: " + "[" * 9000,
            "mine.yaml: is not YAML: maximum recursion depth",
            id="deep nesting",
        ),
        ("", "mine.yaml: must be a mapping of sections"),
        ("# nothing yet\n", "mine.yaml: must be a mapping of sections"),
        ("- model\n", "mine.yaml: must be a mapping of sections"),
        (b"model: caf\xe9\n", "mine.yaml: cannot be read ('utf-8' codec can't decode byte 0xe9"),
    ],
)
def test_files_that_are_no_recipe(file: Path, text: str | bytes, message: str) -> None:
    assert message in _load_refusal(file, text)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"gone\.yaml: cannot be read .*No such file"):
        load(tmp_path / "gone.yaml")
    with pytest.raises(RecipeError, match=r"cannot be read .*Is a directory"):
        load(tmp_path)


# The schema


def test_the_schema_is_closed_and_documents_every_field() -> None:
    schema = Recipe.model_json_schema()
    json.dumps(schema)
    sections = [schema, *(s for s in schema["$defs"].values() if s["type"] == "object")]
    assert len(sections) == 11
    for section in sections:
        assert section["additionalProperties"] is False, section["title"]
        for name, field in section["properties"].items():
            described = field.get("description") or "$ref" in field
            assert described, f"{section['title']}.{name}"
    assert schema["required"] == ["model", "data"]


def test_a_recipe_made_in_python_is_anchored_and_shortened_again(tmp_path: Path) -> None:
    recipe = parse({"model": "owner/name", "data": {"train": "rows/train.jsonl", "eval": "o/e"}})
    anchored = anchor(recipe, tmp_path)
    assert anchored.data.train == str(tmp_path.resolve() / "rows/train.jsonl")
    assert (anchored.model.id, anchored.data.eval) == ("owner/name", "o/e")
    assert anchor(anchored, tmp_path / "elsewhere") == anchored
    assert relative(anchored, tmp_path) == recipe
    assert relative(anchored, tmp_path / "elsewhere") == anchored


def test_options_of_deltas_are_refused_where_there_are_none() -> None:
    for lora in ({"dora": True}, {"modules_to_save": ["lm_head"]}):
        assert f"lora.{next(iter(lora))}: is set, but method full" in _refusal(
            method="full", lora=lora
        )
        parse(SMALLEST | {"method": "qlora", "lora": lora})
    message = _refusal(lora={"modules_to_save": ["lm_head", "lm_head"]})
    assert "lora.modules_to_save: holds the same value twice" in message
    message = _refusal(model={"id": "owner/name", "add_tokens": ["<a>", "<a>"]})
    assert "model.add_tokens: holds the same value twice" in message
    parse(SMALLEST | {"model": {"id": "owner/name", "add_tokens": ["<a>"]}, "method": "full"})
