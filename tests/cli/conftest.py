"""The command line called in this process, and a recipe of a tiny model for it to use."""

import json
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from tests.folders import save_model
from tunefork.cli.main import main

SECRET = "kumquat"
"""Stands in every row: no message may show it."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How the program ended, and what it said."""

    status: int
    out: str
    err: str


Call = Callable[..., Ended]

command_of = cache(typer.main.get_command)
"""typer makes all verbs' commands anew at every call: most of what a test of a message takes."""


@pytest.fixture
def tunefork(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run `tunefork` with the given arguments."""
    monkeypatch.setattr("typer.main.get_command", command_of)

    def call(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["tunefork", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "300")
        monkeypatch.setenv("TERM", "dumb")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        capsys.readouterr()
        on_interrupt = signal.getsignal(signal.SIGINT)  # which `main` ignores at its end
        with pytest.raises(SystemExit) as caught:
            main()
        signal.signal(signal.SIGINT, on_interrupt)
        said = capsys.readouterr()
        return Ended(int(caught.value.code or 0), said.out, said.err)

    return call


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama's folder."""
    folder = tmp_path_factory.mktemp("base")
    save_model(folder)
    return folder


def rows(count: int, start: int = 0) -> list[Any]:
    """Classification rows in two classes."""
    return [
        {"text": f"{SECRET} {n}", "label": "fox" if n % 2 else "dog"}
        for n in range(start, start + count)
    ]


@pytest.fixture
def write_recipe(base: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe over the tiny model, and its rows; sections given replace those here."""

    def write(
        train: list[Any] | None = None, held: list[Any] | None = None, **sections: Any
    ) -> Path:
        for name, given in (
            ("train", rows(12) if train is None else train),
            ("eval", rows(6, 100) if held is None else held),
        ):
            lines = [row if isinstance(row, str) else json.dumps(row) for row in given]
            (tmp_path / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
        fields = {
            "model": str(base),
            "data": {"train": "train.jsonl", "eval": "eval.jsonl", "max_length": 128},
            "lora": {"rank": 4},
            "train": {"max_steps": 2, "batch_size": 4, "precision": "fp32"},
            "evaluate": {"forgetting": None, "bootstrap_samples": 200},
        }
        file = tmp_path / "mine.yaml"
        file.write_text(yaml.safe_dump(fields | sections))
        return file

    return write
