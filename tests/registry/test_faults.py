"""Nothing that was acknowledged is lost: the short form of benchmarks/registry_faults.py."""

from pathlib import Path

import pytest

from benchmarks.registry_faults import hammer_tag, kill_publishes, prepare


@pytest.fixture(scope="module", autouse=True)
def _prepared() -> None:
    prepare()


def _check_tags(folder: Path, operations: int) -> None:
    found = hammer_tag(folder, operations)
    assert (found["operations"], found["lost"], found["torn"]) == (operations, 0, 0)
    assert 0.3 * operations < found["moves"] < 0.7 * operations


def _check_kills(folder: Path, kills: int, *, only_amidst: bool) -> None:
    found = kill_publishes(folder, kills, only_amidst=only_amidst)
    assert found["landed"] == kills
    assert found["lost_or_damaged"] == found["half_versions"] == found["would_not_open"] == 0
    assert found["visible"] >= found["acknowledged"] > 0
    assert found["amidst_a_publish"] > (kills - 1 if only_amidst else kills / 3)


def test_a_tag_moved_and_read_by_four_processes(tmp_path: Path) -> None:
    _check_tags(tmp_path, 80)


def test_publishes_that_are_killed(tmp_path: Path) -> None:
    _check_kills(tmp_path, 5, only_amidst=True)


@pytest.mark.slow
def test_a_thousand_moves_and_reads(tmp_path: Path) -> None:
    _check_tags(tmp_path, 1000)


@pytest.mark.slow
def test_two_hundred_kills(tmp_path: Path) -> None:
    _check_kills(tmp_path, 200, only_amidst=False)
