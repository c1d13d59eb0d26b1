"""SIGKILLs at random places of training and saving: nothing torn is taken up, nothing is lost.

The short form of `python -m benchmarks.faults kills`, whose thousand are in its results.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = """
import json
from benchmarks.faults import kills
for row in kills({}, {}):
    print(json.dumps(row))
"""


@pytest.mark.parametrize(
    ("each", "kinds"),
    [
        (1, ("lora",)),
        pytest.param(4, ("lora", "qlora", "full_8bit"), marks=pytest.mark.slow),
    ],
)
def test_killed_anywhere_a_run_goes_on_with_the_same_bits(
    each: int, kinds: tuple[str, ...]
) -> None:
    paths = f"{ROOT / 'src'}{os.pathsep}{ROOT}"
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(each * len(kinds), kinds)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["kills"] for row in rows] == [each] * len(kinds)
    for row in rows:
        assert sum(row["where"].values()) == row["kills"]
        for fault in ("unloadable", "not_bit_equal", "over_an_interval"):
            assert row[fault] == 0, row
