"""The demo's data script, on a small package laid out like botocore."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "prepare_aws.py"


def run(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script with the packages in `site` only."""
    code = (
        f"import sys; sys.path = [{str(site)!r}] + [p for p in sys.path if 'site-packages' not in "
        f"p]; sys.argv[1:] = {list(arguments)!r}; import runpy; "
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    site = tmp_path / "site"
    paths = []
    for folder, versions in (("ec2", ("2014", "2016")), ("s3", ("2006",))):
        for version in versions:
            documentation = {
                f"Op{n}": {
                    "documentation": f"<p>Does {folder} thing\n <b>{n}</b> of {version}.</p>"
                }
                for n in range(20)
            }
            documentation["Shared"] = {"documentation": "Lists the tags."}
            documentation["Long"] = {"documentation": f"In {folder} it ends. " + "word " * 100}
            path = f"botocore/data/{folder}/{version}/service-2.json.gz"
            (site / path).parent.mkdir(parents=True)
            (site / path).write_bytes(
                gzip.compress(json.dumps({"operations": documentation}).encode())
            )
            paths.append(path)
    info = site / "botocore-1.44.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: botocore\nVersion: 1.44.5\n")
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in paths))
    return site


def read(path: Path) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(row["text"], row["label"]) for row in rows]


def test_balanced_disjoint_and_the_same_again(site: Path, tmp_path: Path) -> None:
    arguments = ["--services", "2", "--train", "24", "--eval", "10"]
    outcome = run(site, "--out", str(tmp_path / "a"), *arguments)
    assert outcome.returncode == 0, outcome.stderr
    assert "24 rows" in outcome.stdout and "EC2 12" in outcome.stdout
    train, held = read(tmp_path / "a" / "train.jsonl"), read(tmp_path / "a" / "eval.jsonl")
    assert (len(train), len(held)) == (24, 10)
    assert sum(label == "S3" for _, label in train) == 12
    assert sum(label == "S3" for _, label in held) == 5
    texts = [text for text, _ in train + held]
    assert len(set(texts)) == 34
    assert "Lists the tags." not in texts
    assert not any("2014" in text or "<" in text for text in texts)
    assert all(len(text) <= 200 for text in texts)
    run(site, "--out", str(tmp_path / "b"), *arguments)
    assert read(tmp_path / "b" / "train.jsonl") == train


def test_long_texts_end_with_a_sentence(site: Path, tmp_path: Path) -> None:
    outcome = run(site, "--out", str(tmp_path), "--services", "2", "--train", "40", "--eval", "2")
    assert outcome.returncode == 0, outcome.stderr
    texts = {text for name in ("train", "eval") for text, _ in read(tmp_path / f"{name}.jsonl")}
    assert {"In ec2 it ends.", "In s3 it ends."} <= texts


def test_what_cannot_be_had(site: Path, tmp_path: Path) -> None:
    outcome = run(tmp_path, "--out", str(tmp_path))
    assert outcome.returncode == 1
    assert "pip install --no-deps botocore==1.44.5" in outcome.stderr
    outcome = run(site, "--out", str(tmp_path), "--services", "2", "--train", "100")
    assert outcome.returncode == 1 and "ask for fewer" in outcome.stderr
    outcome = run(site, "--out", str(tmp_path))
    assert outcome.returncode == 1 and "no service 'rds'" in outcome.stderr
    outcome = run(site, "--out", str(tmp_path), "--services", "1")
    assert outcome.returncode == 2 and "not within 2 to 20" in outcome.stderr


def test_other_tasks(site: Path, tmp_path: Path) -> None:
    def rows(task: str, name: str) -> list[dict[str, str]]:
        return [json.loads(line) for line in (tmp_path / task / name).read_text().splitlines()]

    everything = ["--services", "2", "--train", "36", "--eval", "6"]
    for task in ("name", "document"):
        outcome = run(site, "--out", str(tmp_path / task), "--task", task, *everything)
        assert outcome.returncode == 0, outcome.stderr
    for row in rows("name", "train.jsonl"):
        assert row.keys() == {"prompt", "completion"}
        number = row["completion"].removeprefix("Op")
        assert f" {number} of" in row["prompt"] or number == "Long"
    documents = rows("document", "train.jsonl") + rows("document", "eval.jsonl")
    assert all(row.keys() == {"text"} for row in documents)
    assert sum(len(row["text"]) > 200 for row in documents) == 2
