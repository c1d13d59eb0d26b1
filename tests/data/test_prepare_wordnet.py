"""The rank experiment's data: the same rows each time, every label among them."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "prepare_wordnet.py"


def _prepare(source: Path, out: Path) -> list[list[dict[str, str]]]:
    arguments = ["--source", source, "--out", out, "--train", "60", "--eval", "10"]
    command = [sys.executable, SCRIPT, *arguments]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    files = (out / "train.jsonl", out / "eval.jsonl")
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def test_a_part_with_every_label_and_no_unknown_one(tmp_path: Path) -> None:
    labels = ["common"] * 200 + ["rare"] * 5 + ["noun"] * 100
    for name, more in (("train", []), ("test", ["never trained on"] * 40)):
        with gzip.open(tmp_path / f"wordnet_lexname_{name}.jsonl.gz", "wt") as stream:
            for at, label in enumerate([*labels, *more]):
                stream.write(json.dumps({"text": f"{name} {at}", "label": label}) + "\n")
    train, held = _prepare(tmp_path, tmp_path / "out")
    assert len(train) == 60 and len(held) == 10
    assert sum(row["label"] == "rare" for row in train) == 5
    assert {row["label"] for row in held} <= {"common", "rare", "noun"}
    assert [train, held] == _prepare(tmp_path, tmp_path / "again")
