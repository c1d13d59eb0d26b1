"""The loss on a general text: by hand, from every kind of file, and its complaints."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny import tiny_model
from tunefork.errors import DataError
from tunefork.evaluate.forgetting import (
    MAX_LENGTH,
    encode_passages,
    forgetting_columns,
    read_passages,
)
from tunefork.evaluate.statistics import estimate

PASSAGES = ["w5 w6 w7 w8", "w9 w10\nw11 w12 w13 w14 w15", "w16 w17"]


def _measure(
    tokenizer: Any, location: object, max_length: int = MAX_LENGTH, **options: Any
) -> dict[str, Any]:
    batching: dict[str, Any] = {"max_tokens": 64, "packing": True, "pad_id": 0} | options
    passages = encode_passages(tokenizer, str(location), max_length=max_length)
    return forgetting_columns(tiny_model(), passages, **batching)


def _write(folder: Path, name: str) -> Path:
    path = folder / name
    if path.suffix == ".txt":
        path.write_text("\n\n \n".join(PASSAGES) + "\n", encoding="utf-8")
    else:
        rows = (json.dumps({"text": text}) for text in PASSAGES)
        path.write_text("\n".join(rows), encoding="utf-8")
    return path


@torch.inference_mode()
def _by_hand(tokenizer: Any, text: str) -> float:
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    return float(tiny_model()(ids, labels=ids).loss) * (ids.shape[1] - 1)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("name", ["general.txt", "general.jsonl"])
def test_each_passage_has_its_own_loss(
    tokenizer: Any, tmp_path: Path, name: str, packing: bool
) -> None:
    columns = _measure(tokenizer, _write(tmp_path, name), packing=packing)
    assert columns["forgetting_tokens"].tolist() == [3, 6, 1]
    expected = [_by_hand(tokenizer, text) for text in PASSAGES]
    np.testing.assert_allclose(columns["forgetting_loss_sum"], expected, rtol=1e-5)
    found = estimate("forgetting_loss", [columns], samples=200)
    assert found.value == pytest.approx(sum(expected) / 10, rel=1e-5)
    assert found.low <= found.value <= found.high


def test_long_passages_are_cut_and_fit_in_a_pass(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("w5 w6 w7 w8 w9 " * 20)
    whole = _measure(tokenizer, path, max_tokens=8)
    assert whole["forgetting_tokens"].tolist() == [99]
    cut = _measure(tokenizer, path, max_tokens=8, max_length=30)
    assert cut["forgetting_tokens"].tolist() == [29]


def test_passages_know_their_lines(tmp_path: Path) -> None:
    sources = [source for source, _ in read_passages(str(_write(tmp_path, "general.txt")))]
    assert sources == ["general.txt:1", "general.txt:4", "general.txt:8"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("none.txt", None, r"evaluate\.forgetting: .*none\.txt"),
        ("none.jsonl", None, r"none\.jsonl"),
        ("empty.txt", b" \n\n", r"evaluate\.forgetting: .*empty\.txt holds no text"),
        ("empty.jsonl", b"\n", r"empty\.jsonl"),
        ("bad.txt", b"fine \xff", r"evaluate\.forgetting: .*bad\.txt: is not UTF-8"),
        ("bad.jsonl", b'{"text": "w5 w6"}\nsecret\n', r"evaluate\.forgetting: bad\.jsonl:2"),
        ("bare.jsonl", b'{"secret": "w5 w6"}\n', r"bare\.jsonl:1: needs a field 'text'"),
        ("number.jsonl", b'{"text": 5}\n', r"number\.jsonl:1: needs a field 'text'"),
        ("blank.jsonl", b'{"text": " "}\n', r"blank\.jsonl:1: needs a field 'text'"),
        ("short.txt", b"w5\n\nw6\n", r"evaluate\.forgetting: .*no passage of two tokens"),
        ("other.csv", b"text\nw5 w6\n", r"evaluate\.forgetting: .*neither 'general' nor"),
    ],
)
def test_what_cannot_be_measured_is_named(
    tokenizer: Any, tmp_path: Path, name: str, content: bytes | None, expected: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=expected) as caught:
        _measure(tokenizer, path)
    assert "secret" not in str(caught.value)


def test_a_folder_is_not_a_text(tmp_path: Path) -> None:
    folder = tmp_path / "folder.txt"
    folder.mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        read_passages(str(folder))
