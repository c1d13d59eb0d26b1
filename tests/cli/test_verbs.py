"""Each verb on good input: what it prints and what it leaves."""

import atexit
import gc
import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from typer.main import get_command

from tests.cli.conftest import SECRET, Call
from tests.registry.conftest import make_record
from tunefork.cli.app import app
from tunefork.installed import version
from tunefork.recipe import Recipe
from tunefork.recipe_file import load
from tunefork.registry.provenance import versions
from tunefork.registry.run import RunRecord, read_record, write_record

Write = Callable[..., Path]


def test_no_verb_and_help_show_the_verbs(tunefork: Call) -> None:
    for arguments in ((), ("--help",), ("-h",)):
        ended = tunefork(*arguments)
        for verb in ("compare", "train", "evaluate", "chat", "runs", "data", "recipe"):
            assert verb in ended.out + ended.err
        assert ended.status in ((0,) if arguments else (0, 2))  # which of them is typer's affair


def test_no_help_is_lost_as_markup() -> None:
    """Rich takes [words] for markup and prints nothing of them: a default is `show_default`."""
    verbs, texts = [get_command(app)], list[str]()
    while verbs:
        verb = verbs.pop()
        verbs += getattr(verb, "commands", {}).values()
        texts += [verb.help or "", *(getattr(each, "help", None) or "" for each in verb.params)]
    assert len(texts) > 100 and [text for text in texts if re.search(r"\[[a-z]", text)] == []


def test_a_source_tree_that_is_not_installed_knows_its_version(
    tunefork: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = metadata.version("tunefork")
    found = metadata.distribution

    def without(name: str) -> metadata.Distribution:
        return found("not-installed" if name == "tunefork" else name)

    monkeypatch.setattr(metadata, "distribution", without)
    version.cache_clear()
    ended = tunefork("--version")
    assert (ended.status, ended.out) == (0, f"tunefork {installed}\n")
    assert versions()["tunefork"] == installed


def test_the_end_looks_for_no_garbage(tunefork: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    at_end: list[object] = []
    monkeypatch.setattr(atexit, "register", at_end.append)
    tunefork("--version")
    assert gc.freeze in at_end


def test_the_schema_is_json(tunefork: Call) -> None:
    ended = tunefork("recipe", "schema")
    assert ended.status == 0 and json.loads(ended.out) == Recipe.model_json_schema()


def test_a_shown_recipe_is_that_recipe(tunefork: Call, write_recipe: Write, tmp_path: Path) -> None:
    file = write_recipe()
    ended = tunefork("recipe", "show", file, "--set", "lora.rank=7", "--set", "method=full")
    (tmp_path / "shown.yaml").write_text(ended.out)
    assert ended.status == 0 and "warmup_share" in ended.out
    assert load(tmp_path / "shown.yaml") == load(file, ("lora.rank=7", "method=full"))


def test_data_check_counts(tunefork: Call, write_recipe: Write) -> None:
    ended = tunefork("data", "check", write_recipe())
    assert ended.status == 0 and "rows 12, used 12" in ended.out
    fields = json.loads(tunefork("data", "check", write_recipe(), "--json").out)
    assert fields["train"]["labels"] == {"dog": 6, "fox": 6} and fields["errors"] == []


def test_data_show_marks_what_is_supervised(tunefork: Call, write_recipe: Write) -> None:
    ended = tunefork("data", "show", write_recipe(), "--row", 2)
    assert ended.status == 0 and f"{SECRET} 1" in ended.out and "fox" in ended.out
    assert re.match(r"train.jsonl:2: \d+ tokens, \d of them supervised\n", ended.out)


def test_train_then_evaluate_chat_and_runs(
    tunefork: Call, write_recipe: Write, tmp_path: Path
) -> None:
    file, out = write_recipe(), tmp_path / "runs" / "mine"
    ended = tunefork("train", file, "--out", out, "--method", "lora", "--set", "train.seed=3")
    assert ended.status == 0 and "lora: ok, 2 steps" in ended.out and "accuracy" in ended.out
    record = read_record(out)
    assert record is not None and record.seed == 3 and (out / "adapter").is_dir()

    again = tunefork("train", file, "--out", out, "--set", "train.seed=3", "--json")
    assert again.status == 0 and json.loads(again.out)["created"] == record.created

    ended = tunefork("evaluate", out, file, "--json")
    assert ended.status == 0
    measured = {name: list(figure.values()) for name, figure in json.loads(ended.out).items()}
    assert measured["loss"] == pytest.approx(record.metrics["loss"], rel=1e-4)
    assert "95 % interval" in tunefork("evaluate", out, file).out

    ended = tunefork("chat", out, "--message", "hello", "--max-new-tokens", 4)
    assert ended.status == 0 and ended.out.endswith("\n")

    ended = tunefork("runs", tmp_path / "runs")
    assert ended.status == 0 and "lora" in ended.out and str(out) in ended.out
    (listed,) = json.loads(tunefork("runs", tmp_path / "runs", "--json").out)
    assert listed["folder"] == str(out) and listed["seed"] == 3


def test_a_run_folder_is_named_by_recipe_and_method(
    tunefork: Call, write_recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []
    monkeypatch.chdir(tmp_path)

    def train_run(_: Recipe, folder: Path, **options: object) -> RunRecord:
        seen.append(folder)
        return make_record(status="interrupted", metrics={})

    monkeypatch.setattr("tunefork.trial.trial.train_run", train_run)
    ended = tunefork("train", write_recipe(), "--method", "full")
    assert seen == [Path("runs/mine-full")]
    assert ended.status == 130 and "stopped; the same command goes on from there" in ended.err
    assert "lora: interrupted, 3 steps" in ended.out and "95 %" not in ended.out


def test_chat_goes_on_until_an_empty_line_or_the_end(
    tunefork: Call, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for last in ("", None):
        typed = iter(["hello", "the dog", last])

        def read(_: str, typed: object = typed) -> str:
            line = next(typed)  # type: ignore[call-overload]
            if line is None:
                raise EOFError
            return str(line)

        monkeypatch.setattr("builtins.input", read)
        ended = tunefork("chat", base, "--max-new-tokens", 2)
        assert ended.status == 0 and ended.out.count("\n") >= 2


def test_runs_of_an_empty_folder_are_none(tunefork: Call, tmp_path: Path) -> None:
    assert json.loads(tunefork("runs", tmp_path, "--json").out) == []
    write_record(tmp_path, make_record(method=None, learning_rate=None, metrics={}))
    assert "base" in tunefork("runs", tmp_path).out


def test_runs_goes_on_past_another_programs_file(tunefork: Call, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    write_record(tmp_path / "b", make_record(status="trained", metrics={}))
    (tmp_path / "a" / "run.json").write_text("{}")
    ended = tunefork("runs", tmp_path)
    assert ended.status == 0 and "trained" in ended.out and "is not a run's record" in ended.err
    ended = tunefork("runs", tmp_path, "--json")
    assert ended.status == 0 and [row["status"] for row in json.loads(ended.out)] == ["trained"]


def test_gpu_memory_grows_by_segments_unless_the_user_says_otherwise(
    tunefork: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, older = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
    for given, found in (
        ({}, "expandable_segments:True"),
        ({ours: "backend:native"}, "backend:native"),
        ({older: "backend:native"}, None),
    ):
        with monkeypatch.context() as patch:
            for name in (ours, older):
                patch.setenv(name, "")  # so that it is put back as it was
                patch.delenv(name)
            for name, value in given.items():
                patch.setenv(name, value)
            tunefork("--version")
            assert os.environ.get(ours) == found


def test_the_installed_program(tmp_path: Path) -> None:
    """The real entry point in a process of its own: bad input, no traceback, status 2."""
    script = Path(sysconfig.get_path("scripts")) / "tunefork"
    called = [sys.executable, "-m", "tunefork"]
    for command in ([str(script)] if script.exists() else called, called):
        done = subprocess.run(
            [*command, "train", "gone.yaml"], capture_output=True, text=True, cwd=tmp_path
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: gone.yaml: cannot be read")
        assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())
