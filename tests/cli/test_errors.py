"""Bad input ends in status 2 and a message that says where; failures in 1; no traceback unasked."""

import errno
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from tests.cli.conftest import SECRET, Call, Ended, rows
from tunefork.errors import DivergedError

Write = Callable[..., Path]

OF_A_RECIPE = [
    ("compare",),
    ("train",),
    ("evaluate", "BASE"),
    ("data", "check"),
    ("data", "show"),
    ("recipe", "show"),
]
ON_DATA = OF_A_RECIPE[:-1]


def _is_bad_input(ended: Ended, *said: str) -> None:
    assert ended.status == 2, ended
    for words in said:
        assert words in ended.out + ended.err
    assert "Traceback" not in ended.out + ended.err
    assert SECRET not in ended.out + ended.err


@pytest.fixture
def on(tunefork: Call, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run a verb (a tuple, BASE standing for the tiny model) on a recipe, in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(verb: tuple[str, ...], *arguments: object) -> Ended:
        return tunefork(*(base if word == "BASE" else word for word in verb), *arguments)

    return call


# Recipes


@pytest.mark.parametrize("verb", OF_A_RECIPE)
def test_a_missing_recipe(on: Call, verb: tuple[str, ...], tmp_path: Path) -> None:
    _is_bad_input(on(verb, "gone.yaml"), "error: gone.yaml: cannot be read", "No such file")
    _is_bad_input(on(verb, tmp_path), "cannot be read", "Is a directory")


@pytest.mark.parametrize("verb", OF_A_RECIPE)
def test_a_wrong_recipe(on: Call, verb: tuple[str, ...], write_recipe: Write) -> None:
    file = write_recipe(lora={"rank": 0, "alhpa": 3})
    _is_bad_input(
        on(verb, file),
        "mine.yaml: lora.rank: should be greater than or equal to 1 (found 0)",
        "mine.yaml: lora.alhpa: unknown key; did you mean 'alpha'?",
    )
    _is_bad_input(on(verb, write_recipe(), "--set", "lora.rank"), "--set lora.rank: write KEY=")
    _is_bad_input(on(verb, write_recipe(), "--set", "method=lorra"), "did you mean 'lora'?")
    file.write_text("model: [\n")
    _is_bad_input(on(verb, file), "mine.yaml:2: is not YAML")


def test_a_wrong_method_flag(on: Call, write_recipe: Write) -> None:
    ended = on(("train",), write_recipe(), "--method", "qlorra")
    _is_bad_input(ended, "method: should be 'lora', 'qlora' or 'full'", "did you mean 'qlora'?")


# Models


@pytest.mark.parametrize("verb", [("compare",), ("train",), ("data", "check"), ("data", "show")])
def test_an_unknown_model(on: Call, verb: tuple[str, ...], write_recipe: Write) -> None:
    _is_bad_input(on(verb, write_recipe(model="/gone/model")), "model.id: /gone/model is no model")
    _is_bad_input(on(verb, write_recipe(model="owner/name")), "model.id: owner/name cannot be")


@pytest.mark.parametrize("verb", [("compare",), ("train",)])
@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 400}, "lora.rank: 400 is above the size of"),
        ({"targets": ["q_prj"]}, "lora.targets: 'q_prj' matches no linear layer"),
        ({"targets": []}, "lora.targets: is an empty list"),
    ],
)
def test_deltas_that_do_not_fit(
    on: Call, verb: tuple[str, ...], write_recipe: Write, lora: dict[str, Any], message: str
) -> None:
    _is_bad_input(on(verb, write_recipe(lora=lora)), message)
    assert not Path("runs").exists()


# Data


@pytest.mark.parametrize("verb", ON_DATA)
@pytest.mark.parametrize("name", ["gone.jsonl", "../gone.csv", "~nobody-at-all/x.jsonl"])
def test_missing_data(on: Call, verb: tuple[str, ...], write_recipe: Write, name: str) -> None:
    _is_bad_input(on(verb, write_recipe(), "--set", f"data.train={name}"), Path(name).name)


FAULTY: dict[str, tuple[dict[str, Any], str]] = {
    "not JSON": ({"train": [*rows(4), f"{{{SECRET}"]}, "train.jsonl:5: is not JSON"),
    "no label": ({"train": [*rows(4), {"text": SECRET}]}, "train.jsonl:5"),
    "empty answer": ({"train": [*rows(4), {"text": SECRET, "label": ""}]}, "train.jsonl:5"),
    "too long": ({"train": [*rows(4), {"text": SECRET * 99, "label": "dog"}]}, "train.jsonl:5"),
    "leakage": ({"held": rows(3)}, "3 of 3 evaluation examples are training examples"),
    "no rows": ({"train": []}, "train.jsonl"),
    "no evaluation rows": ({"held": []}, "eval.jsonl"),
    "unknown fields": ({"train": [{"body": SECRET}]}, "no row has the fields of a known format"),
    "unknown label": (
        {"held": [{"text": SECRET + " 9", "label": "cat"}]},
        "eval",
    ),
}


@pytest.mark.parametrize("verb", [v for v in ON_DATA if v != ("data", "show")])
@pytest.mark.parametrize("case", FAULTY)
def test_faulty_data(on: Call, verb: tuple[str, ...], write_recipe: Write, case: str) -> None:
    files, message = FAULTY[case]
    _is_bad_input(on(verb, write_recipe(**files)), message)
    assert not Path("runs").exists()


def test_data_check_prints_the_whole_report_before_it_ends(on: Call, write_recipe: Write) -> None:
    file = write_recipe(train=[*rows(4), "x", {"text": SECRET}], held=rows(2))
    ended = on(("data", "check"), file)
    _is_bad_input(ended, "rows 6, used 4", "train.jsonl:5", "train.jsonl:6", "error: data.eval: 2")
    ended = on(("data", "check"), file, "--json")
    _is_bad_input(ended, '"errors": [')


def test_data_check_passes_what_the_recipe_says_to_drop(on: Call, write_recipe: Write) -> None:
    file = write_recipe(train=[*rows(8), "x"], held=rows(2))
    drop = ("--set", "data.bad_rows=drop", "--set", "data.overlap=drop")
    ended = on(("data", "check"), file, *drop)
    assert ended.status == 0 and "train.jsonl:9" in ended.out
    _is_bad_input(on(("data", "check"), file, *drop[:2]), "error: data.eval: 2")


def test_a_row_past_the_last(on: Call, write_recipe: Write) -> None:
    ended = on(("data", "show"), write_recipe(), "--row", 13)
    _is_bad_input(ended, "--row: 13 is past the last of 12 training examples")


@pytest.mark.parametrize("verb", [("compare",), ("train",), ("evaluate", "BASE")])
def test_a_metric_that_the_data_cannot_have(
    on: Call, verb: tuple[str, ...], write_recipe: Write
) -> None:
    texts = [{"text": f"{SECRET} {n}"} for n in range(20)]
    file = write_recipe(
        train=texts[:12], held=texts[12:], evaluate={"metrics": ["loss", "accuracy"]}
    )
    _is_bad_input(on(verb, file), "accuracy")
    assert not Path("runs").exists()


def test_a_primary_metric_that_is_not_measured(on: Call, write_recipe: Write) -> None:
    ended = on(("compare",), write_recipe(compare={"primary_metric": "rouge_l"}))
    _is_bad_input(ended, "compare.primary_metric: rouge_l is not measured")


# Folders and targets


@pytest.mark.parametrize("verb", [("compare",), ("train",)])
def test_another_recipes_run_stays_as_it_is(
    on: Call, verb: tuple[str, ...], write_recipe: Write, tmp_path: Path
) -> None:
    file, out = write_recipe(), tmp_path / "out"
    out.mkdir()
    (out / "recipe.yaml").write_bytes(file.read_bytes().replace(b"rank: 4", b"rank: 2"))
    before = (out / "recipe.yaml").read_bytes()
    _is_bad_input(on(verb, file, "--out", out), "holds a run of another recipe", "--out")
    assert [f.name for f in out.iterdir()] == ["recipe.yaml"]
    assert (out / "recipe.yaml").read_bytes() == before
    _is_bad_input(on(verb, file, "--out", file), "exists and is no run folder")


@pytest.mark.parametrize("target", ["/gone/run", "owner/name", "~nobody-at-all/run"])
def test_a_target_of_nothing(on: Call, write_recipe: Write, target: str) -> None:
    _is_bad_input(on(("evaluate", target), write_recipe()), target)
    _is_bad_input(on(("chat", target), "-m", "hello"), target)


def test_runs_of_no_folder(on: Call) -> None:
    _is_bad_input(on(("runs",)), "error: runs: no such folder; give the folder that holds runs")


# How the command line is used


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("comparr", "x.yaml"), "No such command 'comparr'"),
        (("train",), "Missing argument 'RECIPE'"),
        (("evaluate", "x"), "Missing argument 'RECIPE'"),
        (("chat",), "give RUN_OR_MODEL or --server"),
        (("train", "x.yaml", "--rank", "3"), "No such option: --rank"),
        (("data", "show", "x.yaml", "--row", "0"), "--row"),
        (("chat", "x", "--temperature", "-1"), "--temperature"),
        (("chat", "x", "--max-new-tokens", "0"), "--max-new-tokens"),
        (("recipe", "shwo"), "No such command 'shwo'"),
    ],
)
def test_wrong_arguments(tunefork: Call, arguments: tuple[str, ...], message: str) -> None:
    _is_bad_input(tunefork(*arguments), message)


# Failures


def _fail(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def train_run(*_: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("tunefork.trial.trial.train_run", train_run)


@pytest.mark.parametrize(
    ("error", "said", "unsaid"),
    [
        (DivergedError("step 3: the loss is nan"), "error: step 3: the loss is nan", "fault of"),
        (RuntimeError("broken"), "error: RuntimeError: broken\nThis is a fault of", "disk"),
        (
            OSError(errno.ENOSPC, "No space left on device", "x/run.json"),
            "error: the disk is full ([Errno 28] No space left on device: 'x/run.json'); free some",
            "fault of",
        ),
        (
            SafetensorError("I/O error: No space left on device (os error 28)"),
            "error: the disk is full (I/O error",
            "fault of",
        ),
    ],
)
def test_failures_end_in_1(
    on: Call,
    write_recipe: Write,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    said: str,
    unsaid: str,
) -> None:
    _fail(monkeypatch, error)
    ended = on(("train",), write_recipe())
    assert ended.status == 1 and said in ended.err and unsaid not in ended.err
    assert "Traceback" not in ended.err


def test_ctrl_c_ends_in_130(on: Call, write_recipe: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    _fail(monkeypatch, KeyboardInterrupt())
    ended = on(("train",), write_recipe())
    assert (ended.status, ended.err.strip()) == (
        130,
        "stopped; the same command goes on from there",
    )


def test_ctrl_c_that_a_library_makes_an_error_of(
    on: Call, write_recipe: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train_run(*_: object, **options: object) -> None:
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        raise ModuleNotFoundError("Could not import module 'PreTrainedModel'")

    monkeypatch.setattr("tunefork.trial.trial.train_run", train_run)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    ended = on(("train",), write_recipe())
    signal.signal(signal.SIGINT, before)
    assert (ended.status, ended.err.strip()) == (
        130,
        "stopped; the same command goes on from there",
    )


@pytest.mark.parametrize(
    ("verb", "said"),
    [
        ("train", "stopped; the same command goes on from there\n"),
        ("evaluate", "stopped; what was finished is kept\n"),
        ("serve", "stopped\n"),
    ],
)
def test_ctrl_c_while_the_verbs_are_imported(
    verb: str, said: str, tunefork: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "tunefork.cli.app":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "tunefork.cli.app")
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    ended = tunefork(verb, "mine.yaml")
    assert (ended.status, ended.err) == (130, said)


@pytest.mark.parametrize(
    ("error", "status"), [(None, 2), (DivergedError("nan"), 1), (RuntimeError("broken"), 1)]
)
def test_debug_shows_the_traceback_and_keeps_the_status(
    tunefork: Call,
    write_recipe: Write,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception | None,
    status: int,
) -> None:
    if error is not None:
        _fail(monkeypatch, error)
    ended = tunefork("--debug", "train", "gone.yaml" if error is None else write_recipe())
    assert ended.status == status
    assert "Traceback (most recent call last)" in ended.err and "error: " in ended.err
