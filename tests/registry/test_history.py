"""Runs and comparisons are remembered, and remembering never fails a run."""

import json
import shutil
from pathlib import Path

import pytest

from tests.registry.conftest import make_record
from tunefork.registry.history import (
    known_comparisons,
    known_runs,
    remember_comparison,
    remember_run,
)
from tunefork.registry.run import RunRecord, write_record
from tunefork.registry.store import Store


def _remember(folder: Path, record: RunRecord) -> None:
    folder.mkdir(exist_ok=True)
    write_record(folder, record)
    remember_run(folder, record)


def test_a_run_is_known_by_its_last_state_and_outlives_its_folder(tmp_path: Path) -> None:
    _remember(tmp_path / "run", make_record(status="trained", metrics={}))
    _remember(tmp_path / "run", make_record())
    _remember(tmp_path / "base", make_record(method=None, created="2020-01-01T00:00:00+00:00"))
    shutil.rmtree(tmp_path / "run")
    with Store.open() as store:
        older, newer = known_runs(store)
        figures = store.database.execute(
            "SELECT metric, value FROM evaluations WHERE run_folder = ?", (str(newer.folder),)
        ).fetchall()
    assert older.folder == tmp_path / "base" and newer.folder == tmp_path / "run"
    assert RunRecord.model_validate(newer.content) == make_record()
    assert dict(map(tuple, figures)) == {"loss": 1.25, "perplexity": 3.5}


def test_a_comparison_is_known(tmp_path: Path) -> None:
    content = {"created": "2026-11-24T12:00:00+00:00", "verdict": {"recommended": "lora"}}
    (tmp_path / "comparison.json").write_text(json.dumps(content))
    remember_comparison(tmp_path)
    remember_comparison(tmp_path)
    with Store.open() as store:
        (found,) = known_comparisons(store)
    assert found.folder == tmp_path and found.content == {"recommended": "lora"}


@pytest.mark.parametrize("damage", ["no folder", "no database", "newer"])
def test_a_store_that_cannot_be_written_fails_no_run(
    tmp_path: Path, home: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if damage == "no folder":
        (home / "store").write_text("")
    elif damage == "no database":
        (home / "store").mkdir()
        (home / "store" / "store.sqlite").write_bytes(b"x" * 10_000)
    else:
        with Store.open() as store:
            store.database.execute("PRAGMA user_version = 99")
    _remember(tmp_path / "run", make_record())
    said = capsys.readouterr()
    assert said.err.startswith(f"warning: {tmp_path / 'run'}: is not in the list") and not said.out
