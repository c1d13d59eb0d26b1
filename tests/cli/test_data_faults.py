"""Data faults on the command line: refused before a weight is loaded, said once, never quoted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Call, Ended

Write = Callable[..., Path]

CANARY = "kumquat"
TOKEN = "ghp" + "_" + "kumquatQ7w3K9z5M1n2X4v6B8p0T" * 2
EMAIL = f"{CANARY}@acme.io"


def _turns(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _planted() -> list[Any]:
    """A canary in every text, and every fault that a conversation can have."""
    long = " ".join(f"{CANARY}{n}" for n in range(40))
    good = _turns(("user", f"{CANARY} {TOKEN} {EMAIL}\ufffd"), ("assistant", f"{CANARY} {TOKEN}"))
    return [
        good,
        good,
        _turns(("system", f"{CANARY} {EMAIL}"), ("user", long), ("assistant", CANARY)),
        _turns(("user", f"{long} {CANARY}"), ("assistant", CANARY)),
        _turns(("user", CANARY), ("user", CANARY), ("assistant", CANARY)),
        _turns(("tool", CANARY), ("user", CANARY), ("assistant", f"{CANARY}\0")),
        _turns(("user", CANARY), ("assistant", "")),
        _turns((CANARY, CANARY), ("assistant", CANARY)),
        _turns(("user", CANARY)) | {CANARY: CANARY},
        f'{{"messages": "{CANARY}',
        {"messages": CANARY},
        _turns(("user", f"\ud800{CANARY}"), ("assistant", CANARY)),
    ]


HELD = [
    _turns(("user", f"{CANARY} of evaluation"), ("assistant", CANARY)),
    _turns(("user", " ".join(f"{CANARY}{n}" for n in range(1, 40))), ("assistant", CANARY)),
]
FOUND = ("duplicates", "near_duplicates", "near_overlap", "roles", "unicode", "secrets", "emails")
FATAL = [word for name in FOUND for word in ("--set", f"data.faults.{name}=error")]


def _clean(ended: Ended) -> str:
    said = ended.out + ended.err
    for secret in (CANARY, TOKEN, EMAIL, TOKEN[4:20]):
        assert secret not in said
    return said


@pytest.mark.parametrize("before", [(), ("--debug",)])
@pytest.mark.parametrize("after", [(), ("--json",)])
@pytest.mark.parametrize("severity", [[], FATAL], ids=["warn", "error"])
def test_no_row_is_quoted(
    tunefork: Call,
    write_recipe: Write,
    before: tuple[str, ...],
    after: tuple[str, ...],
    severity: list[str],
) -> None:
    data = {"train": "train.jsonl", "eval": "eval.jsonl", "max_length": 1024}
    file = write_recipe(_planted(), HELD, data=data)
    ended = tunefork(*before, "data", "check", file, *after, *severity)
    said = _clean(ended)
    assert ended.status == 2
    assert all(name in said for name in (*FOUND, "bad_rows", "empty_answers"))
    assert "GitHub token (60 characters)" in said and "e-mail address (15 characters)" in said
    if after:
        faults = {fault["fault"]: fault for fault in json.loads(ended.out)["faults"]}
        assert faults["secrets"]["kinds"] == {"GitHub token": 4}
        assert faults["secrets"]["severity"] == ("error" if severity else "warn")


@pytest.mark.parametrize("verb", ["train", "compare"])
def test_a_fatal_fault_refuses_the_run_before_any_weight_is_loaded(
    tunefork: Call,
    write_recipe: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr("tunefork.trial.trial.load_model", load)
    rows = _planted()[:6]
    for fault in FOUND:
        file = write_recipe(
            rows,
            HELD,
            data={
                "train": "train.jsonl",
                "eval": "eval.jsonl",
                "max_length": 1024,
                "faults": {fault: "error"},
            },
        )
        ended = tunefork("--debug", verb, file, "--out", tmp_path / "out")
        said = _clean(ended)
        assert ended.status == 2 and f"or set data.faults.{fault} to one of" in said
        assert not (tmp_path / "out").exists()


def test_training_says_a_warning_once_on_one_line(
    tunefork: Call, write_recipe: Write, tmp_path: Path
) -> None:
    data = {"train": "train.jsonl", "eval": "eval.jsonl", "max_length": 128}
    rows = [_turns(("user", f"{CANARY} {n} {EMAIL}"), ("assistant", "x")) for n in range(8)]
    file = write_recipe(rows, HELD[:1], data=data)
    ended = tunefork("train", file, "--out", tmp_path / "out")
    said = _clean(ended)
    assert ended.status == 0
    (line,) = [line for line in said.splitlines() if "e-mail" in line]
    assert line.startswith("warning: 8 examples hold an e-mail address; ")
    assert "train.jsonl:1" in line and "`tunefork data check` says more" in line
    kept = "".join(f.read_text() for f in (tmp_path / "out").rglob("*.json*"))
    assert EMAIL not in kept
