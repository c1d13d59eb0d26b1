"""The packaged general text is what its description says."""

import hashlib
import json
import re
from importlib.resources import files

import pytest

from tunefork.evaluate.forgetting import GENERAL, read_passages

_FOLDER = files("tunefork.evaluate")


@pytest.fixture(scope="module")
def passages() -> list[dict[str, str]]:
    lines = _FOLDER.joinpath("general.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def description() -> str:
    return _FOLDER.joinpath("general.md").read_text(encoding="utf-8")


def test_the_description_states_its_digest(description: str) -> None:
    content = _FOLDER.joinpath("general.jsonl").read_bytes()
    assert len(content) < 90_000
    assert re.findall(r"`([0-9a-f]{64})`", description) == [hashlib.sha256(content).hexdigest()]


def test_the_description_counts_every_passage(
    passages: list[dict[str, str]], description: str
) -> None:
    table = re.findall(r"^\| `([^`]+)` \| (\d+) \|", description, re.MULTILINE)
    for prefix, count in table:
        found = sum(passage["source"].startswith(prefix) for passage in passages)
        assert found == int(count), prefix
    assert sum(int(count) for _, count in table) == len(passages)
    assert f"{len(passages)} passages" in description


def test_passages_are_short_english_and_all_different(passages: list[dict[str, str]]) -> None:
    assert 75 <= len(passages) <= 100
    for passage in passages:
        assert passage.keys() == {"source", "text"}
        assert 60 <= len(passage["text"].split()) <= 250, passage["source"]
        assert passage["text"] == passage["text"].strip()
        letters = [letter for letter in passage["text"] if letter.isalpha()]
        assert sum(letter.isascii() for letter in letters) > 0.98 * len(letters)
    firsts = {" ".join(passage["text"].split()[:12]) for passage in passages}
    assert len(firsts) == len(passages)


def test_no_passage_is_about_the_demo_s_domain(passages: list[dict[str, str]]) -> None:
    text = "\n".join(passage["text"] for passage in passages)
    domain = r"\b(AWS|Amazon|EC2|S3|cloud (service|provider|computing)s?)\b"
    assert not re.search(domain, text, re.IGNORECASE)


def test_it_is_what_forgetting_reads(passages: list[dict[str, str]]) -> None:
    read = read_passages(GENERAL)
    assert [text for _, text in read] == [passage["text"] for passage in passages]
    assert read[1][0] == "general.jsonl:2"
