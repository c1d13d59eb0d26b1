"""Databases of every earlier schema become this one's and keep what they hold."""

import sqlite3
from pathlib import Path

import pytest

from tests.registry.artefacts import save_artefact
from tunefork.errors import StoreError
from tunefork.registry import migrations
from tunefork.registry.database import FILE, connect
from tunefork.registry.history import known_runs
from tunefork.registry.migrations import STEPS, VERSION
from tunefork.registry.store import Store

HERE = Path(__file__).parent / "schemas"


def _old(home: Path, version: int) -> None:
    """The database that tunefork had at schema `version`, with rows in each table."""
    (home / "store").mkdir(parents=True)
    database = sqlite3.connect(home / "store" / FILE)
    database.executescript((HERE / f"v{version}.sql").read_text())
    database.close()


def _schema(database: sqlite3.Connection) -> list[tuple[str, ...]]:
    rows = database.execute("SELECT type, name, tbl_name FROM sqlite_master ORDER BY type, name")
    columns = database.execute(
        "SELECT m.name, c.name, c.type, c.'notnull', c.pk FROM sqlite_master m "
        "JOIN pragma_table_info(m.name) c WHERE m.type = 'table' ORDER BY m.name, c.cid"
    )
    return [tuple(row) for row in [*rows, *columns]]


def test_each_version_has_a_database_here() -> None:
    assert {file.stem for file in HERE.glob("*.sql")} == {f"v{n + 1}" for n in range(VERSION)}


@pytest.mark.parametrize("version", range(1, VERSION + 1))
def test_an_old_database_is_brought_up(tmp_path: Path, version: int) -> None:
    _old(tmp_path / "old", version)
    with Store.open(tmp_path / "old") as store, Store.open(tmp_path / "new") as new:
        assert _schema(store.database) == _schema(new.database)
        found = store.resolve("support/acme:prod")
        assert (found.number, found.base, found.tags) == (1, "owner/name", ("prod",))
        (run,) = known_runs(store)
        assert run.content["seed"] == 3 and str(run.folder) == "/runs/mine"
        figures = store.database.execute("SELECT run_folder, metric, value, low FROM evaluations")
        assert [tuple(row) for row in figures] == [("/runs/mine", "loss", 1.25, 1.0)]
        new_one = store.publish(save_artefact(tmp_path / "a"), "support/acme")
        assert new_one.number == 3  # v2 was removed: its number is not given again
    with Store.open(tmp_path / "old") as store:
        assert len(store.list()) == 2


def test_a_newer_database_is_refused(tmp_path: Path) -> None:
    database = connect(tmp_path)
    database.execute(f"PRAGMA user_version = {VERSION + 1}")
    database.close()
    with pytest.raises(StoreError, match="was made by a newer tunefork .*TUNEFORK_HOME"):
        connect(tmp_path)


def test_a_step_that_fails_leaves_the_version_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _old(tmp_path, 1)
    broken = (STEPS[0], (*STEPS[1], "INSERT INTO gone VALUES (1)"))
    with monkeypatch.context() as patch:
        patch.setattr(migrations, "STEPS", broken)
        with pytest.raises(StoreError, match="no such table: gone"):
            Store.open(tmp_path)
    database = sqlite3.connect(tmp_path / "store" / FILE)
    assert database.execute("PRAGMA user_version").fetchone() == (1,)
    assert database.execute("SELECT metrics FROM runs").fetchone()
    database.close()
    Store.open(tmp_path).close()


def test_what_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / FILE).write_bytes(b"something else" * 100)
    with pytest.raises(StoreError, match=r"store.sqlite: .*damaged: put back a copy"):
        Store.open(tmp_path)


def test_settings_that_durability_rests_on(tmp_path: Path) -> None:
    database = connect(tmp_path)
    settings = ("journal_mode", "synchronous", "foreign_keys")
    found = [database.execute(f"PRAGMA {name}").fetchone()[0] for name in settings]
    assert found == ["delete", 3, 1]  # 3: EXTRA, which is FULL and more
    database.close()
