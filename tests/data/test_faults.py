"""Each fault on its way from the recipe to report, error and warning."""

from collections.abc import Callable
from typing import Any

import pytest

from tunefork.data.check import check, render_report
from tunefork.data.faults import FAULTS, Fault, FaultReport
from tunefork.data.loader import load_data
from tunefork.data.report import Report
from tunefork.errors import DataError, RecipeError
from tunefork.recipe import FaultSection, Recipe

Write = Callable[..., str]
Make = Callable[..., Recipe]

LONG = " ".join(f"word{n}" for n in range(40))
ODD = {
    "messages": [
        {"role": "user", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
}
EVEN = {"messages": ODD["messages"][1:]}


def _asked(*prompts: str) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "completion": f"answer {n}"} for n, prompt in enumerate(prompts)]


def _labelled(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"text": text, "label": label} for text, label in pairs]


def _many(label: str, count: int, start: int = 0) -> list[dict[str, Any]]:
    return _labelled(*((f"{label} {n}", label) for n in range(start, start + count)))


HELD = _asked("something else", "and more")
BALANCED = [*_many("fox", 8), *_many("dog", 8)]
BALANCED_HELD = [*_many("fox", 5, 50), *_many("dog", 5, 50)]

CASES: dict[str, tuple[list[Any], list[Any], str]] = {
    "duplicates": (
        [*_asked("a", "b"), {"prompt": "a ", "completion": "answer  0"}],
        HELD,
        "train.jsonl:3: repeats train.jsonl:1",
    ),
    "near_duplicates": (
        [*_asked(LONG, "b", "c"), {"prompt": LONG, "completion": "word"}],
        HELD,
        "train.jsonl:4: is 93% like train.jsonl:1",
    ),
    "near_overlap": (
        _asked("a", LONG, "c"),
        [*HELD, {"prompt": LONG + " more", "completion": "answer 1"}],
        "eval.jsonl:3: is 88% like train.jsonl:2",
    ),
    "contradictions": (
        [*BALANCED, {"text": "fox 3", "label": "dog"}],
        BALANCED_HELD,
        "train.jsonl:17: has the text of train.jsonl:4",
    ),
    "roles": ([ODD], [EVEN], "train.jsonl:1: two user turns in a row (messages[1])"),
    "unicode": (_asked("a", "b\ufffd"), HELD, "train.jsonl:2: replacement character U+FFFD (1 "),
    "markup": (_asked("a", "b </s>\n</s> c"), HELD, "train.jsonl:2: </s> (2 times)"),
    "secrets": (
        _asked("a", "key " + "AK" + "IAQ7W3KZ5MN2XVBP4T"),
        HELD,
        "train.jsonl:2: AWS access key id (20 characters)",
    ),
    "emails": (
        _asked("a", "b"),
        [*HELD, *_asked("jo@acme.io")],
        "eval.jsonl:3: e-mail address (10 characters)",
    ),
    "similar_labels": (
        [*_many("fox", 8), *_many("Fox", 8, 20)],
        [*_many("fox", 5, 50), *_many("Fox", 5, 80)],
        "train.jsonl:1: its label is nearly that of train.jsonl:9",
    ),
    "imbalance": (
        [*_many("fox", 21), *_many("dog", 1)],
        BALANCED_HELD,
        "train.jsonl:22: its label has 1 training examples, the most frequent 21",
    ),
    "few_eval": (
        BALANCED,
        BALANCED_HELD[:-3],
        "train.jsonl:9: evaluation examples of its label: 2",
    ),
}
"""What has the fault, and no other."""

CLEAN: dict[str, tuple[list[Any], list[Any]]] = {
    "another answer is no duplicate": (
        [*_asked("a", "b"), {"prompt": "a", "completion": "answer 9"}],
        HELD,
    ),
    "short and one word apart": (_asked("close my account", "open my account"), HELD),
    "every class equal": (BALANCED, BALANCED_HELD),
    "20 to 1": ([*_many("fox", 20), *_many("dog", 1)], BALANCED_HELD),
    "labels that differ": (
        [*_many("fox", 8), *_many("foxes", 8)],
        [*_many("fox", 5, 50), *_many("foxes", 5, 50)],
    ),
}


def _settings(fault: str) -> list[str]:
    values = FaultSection.model_json_schema()["properties"][fault]["enum"]
    return [value for value in values if value != "warn"]


@pytest.fixture
def look(write_rows: Write, make_recipe: Make, tokenizer: Any) -> Callable[..., Report]:
    """Check rows; further arguments are `data.faults`."""

    def run(train: list[Any], held: list[Any], **faults: Any) -> Report:
        files = {"train": write_rows(train), "eval": write_rows(held, "eval.jsonl")}
        return check(make_recipe(**files, faults=faults), tokenizer)

    return run


def _names(report: Report) -> list[str]:
    return [str(found.fault) for found in report.faults]


@pytest.mark.parametrize("fault", CASES)
def test_a_fault_is_found_alone_and_the_recipe_decides(
    fault: str, look: Callable[..., Report]
) -> None:
    train, held, place = CASES[fault]
    report = look(train, held)
    assert _names(report) == [fault] and report.errors == ()
    (found,) = report.faults
    assert (found.severity, found.setting) == ("warn", f"data.faults.{fault}")
    assert any(str(p).startswith(place) for p in found.places)
    assert place in report.warnings[0] and found.remedy in report.warnings[0]

    report = look(train, held, **{fault: "error"})
    assert report.warnings == () and len(report.errors) == 1
    assert (
        place in report.errors[0]
        and f"set data.faults.{fault} to one of warn" in (report.errors[0])
    )
    report = look(train, held, **{fault: "ignore"})
    assert (report.faults, report.errors, report.warnings) == ((), (), ())


@pytest.mark.parametrize("fault", [name for name in CASES if "drop" in _settings(name)])
def test_what_is_dropped_is_gone(
    fault: str, look: Callable[..., Report], write_rows: Write, make_recipe: Make, tokenizer: Any
) -> None:
    train, held, _ = CASES[fault]
    if fault == "roles":  # of which one good conversation must be left
        other = {"messages": [ODD["messages"][0], ODD["messages"][2]]}
        train = [ODD, other]
    before, report = look(train, held), look(train, held, **{fault: "drop"})
    used = before.train.num_examples + before.eval.num_examples
    left = report.train.num_examples + report.eval.num_examples
    dropped = report.faults[0].count
    assert 0 < used - left == dropped and report.errors == ()
    rows = "row is" if dropped == 1 else "rows are"
    assert f"{dropped} {rows} left out" in report.warnings[0]
    files = {"train": write_rows(train), "eval": write_rows(held, "eval.jsonl")}
    recipe = make_recipe(**files, faults={fault: "drop"})
    once = load_data(recipe, tokenizer)
    again = load_data(recipe, tokenizer, is_checked=True)
    assert once.fingerprint() == again.fingerprint()
    assert len(once.train) + len(once.eval) == left


@pytest.mark.parametrize("case", CLEAN)
def test_what_is_no_fault(case: str, look: Callable[..., Report]) -> None:
    report = look(*CLEAN[case])
    assert (report.faults, report.warnings) == ((), ())
    assert "faults: none found" in render_report(report)


def test_near_texts_of_which_the_template_is_the_same(look: Callable[..., Report]) -> None:
    head = "please answer the following request of a customer as shortly as you can and be kind:"
    texts = [f"{head} number{n} item{n} place{n}" for n in range(80)]
    assert look(_asked(*texts), HELD).faults == ()


def test_bad_rows_are_counted_by_kind(look: Callable[..., Report]) -> None:
    turn = {"role": "user", "content": "x"}
    bad = [
        {"messages": [turn]},
        {"messages": [turn | {"role": "king"}]},
        {"messages": [turn, {"role": "assistant", "content": "\ud800"}]},
        {"messages": [turn, {"role": "assistant", "content": " "}]},
        "{",
    ]
    good = {"messages": [turn, {"role": "assistant", "content": "y"}]}
    report = look([good, *bad], [{"messages": [turn | {"content": "z"}, good["messages"][1]]}])
    found = {fault.fault: fault for fault in report.faults}
    assert found[Fault.BAD_ROWS].kinds == {
        "wrong roles": 2,
        "broken unicode": 1,
        "unreadable or incomplete": 1,
    }
    assert found[Fault.EMPTY_ANSWERS].places[0].source == "train.jsonl:5"
    assert all(fault.severity == "error" for fault in report.faults)
    text = render_report(report)
    assert "error bad_rows" in text and "(data.bad_rows)" in text


def test_labels_named_but_never_trained(
    write_rows: Write, make_recipe: Make, tokenizer: Any
) -> None:
    files = {"train": write_rows(BALANCED), "eval": write_rows(BALANCED_HELD, "eval.jsonl")}
    recipe = make_recipe(**files, labels=["fox", "dog", "ant"])
    (found,) = check(recipe, tokenizer).faults
    assert found.fault is Fault.IMBALANCE
    assert str(found.places[0]).startswith("data.labels[2]: its label has 0 training examples")
    held = [*BALANCED_HELD, {"text": "tiny", "label": "ant"}]
    recipe = make_recipe(
        train=files["train"],
        eval=write_rows(held, "eval.jsonl"),
        labels=["fox", "dog", "ant"],
        faults={"unseen_labels": "error"},
    )
    with pytest.raises(DataError, match=r"never trained on.*set data.faults.unseen_labels"):
        load_data(recipe, tokenizer)


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        ({"imbalance": "drop"}, "data.faults.imbalance"),
        ({"secret": "warn"}, "did you mean 'secrets'"),
        ({"near_similarity": 0.2}, "data.faults.near_similarity"),
        (
            {"near_similarity": 0.9, "near_duplicates": "ignore", "near_overlap": "ignore"},
            "near_similarity: has no use where near_duplicates and near_overlap: ignore",
        ),
        ({"imbalance_ratio": 3, "imbalance": "ignore"}, "imbalance_ratio: has no use"),
    ],
)
def test_a_setting_that_cannot_apply_is_refused(
    faults: dict[str, Any], said: str, make_recipe: Make
) -> None:
    with pytest.raises(RecipeError, match=said):
        make_recipe(train="x.jsonl", faults=faults)


@pytest.mark.parametrize("name", ["imbalance", "few_eval", "similar_labels", "contradictions"])
def test_labels_settings_are_for_classification(name: str, look: Callable[..., Report]) -> None:
    with pytest.raises(DataError, match=f"data.faults.{name}: is for classification"):
        look(_asked("a"), HELD, **{name: "error"})


def test_roles_are_for_turns(look: Callable[..., Report]) -> None:
    with pytest.raises(DataError, match=r"data.faults.roles: plain text has no turns"):
        look([{"text": "a"}], [{"text": "b"}], roles="error")


def test_the_table_is_whole() -> None:
    assert set(FAULTS) == set(Fault)
    settings = {kind.setting for kind in FAULTS.values() if kind.setting}
    fields = {f"data.faults.{name}" for name in FaultSection.model_fields}
    fields -= {f"data.faults.{n}" for n in FaultSection.model_fields if _is_number(n)}
    assert fields | {"data.bad_rows", "data.too_long", "data.overlap"} == settings
    assert FaultReport.model_json_schema()["properties"]["fault"]


def _is_number(name: str) -> bool:
    return not isinstance(getattr(FaultSection(), name), str)
