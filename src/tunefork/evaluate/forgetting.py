"""What fine-tuning cost elsewhere: the loss on a general text that is not the training domain.

Full fine-tuning forgets more than LoRA at equal learning (Biderman et al. 2024, LoRA Learns Less
and Forgets Less, arXiv:2405.09673, section 5), which a loss on the task's own held-out examples
cannot show. Every passage is an example of its own, so that the interval and the pairing with the
untouched base work as they do for every other metric.
"""

from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from tunefork.data.example import Encoded, RowProblem
from tunefork.data.read import read_rows
from tunefork.errors import DataError
from tunefork.evaluate.loss import loss_columns
from tunefork.evaluate.statistics import Columns

GENERAL = "general"
MAX_LENGTH = 128
"""Tokens of a passage that count: the interval comes from many passages, not from long ones."""
_FIELD = "evaluate.forgetting"


def encode_passages(
    tokenizer: Any, location: str, *, max_length: int = MAX_LENGTH
) -> list[Encoded]:
    """Each passage's first `max_length` tokens; `location` is as `read_passages` takes it.

    Raises DataError as `read_passages` does, or where no passage has two tokens.
    """
    passages = list(encode_each(tokenizer, location, max_length=max_length))
    if not passages:
        raise DataError(f"{_FIELD}: {location} has no passage of two tokens or more")
    return passages


def encode_each(
    tokenizer: Any, location: str, *, max_length: int = MAX_LENGTH
) -> Iterator[Encoded]:
    """As `encode_passages`, one after the other: for whom the first few are enough."""
    for source, text in read_passages(location):
        input_ids = np.array(tokenizer(text)["input_ids"][:max_length], dtype=np.int32)
        if len(input_ids) > 1:  # the first token is given, so one alone leaves nothing to predict
            yield Encoded(source, input_ids, np.ones(len(input_ids), dtype=np.bool_))


def forgetting_columns(
    model: PreTrainedModel,
    passages: Sequence[Encoded],
    *,
    max_tokens: int,
    packing: bool,
    pad_id: int,
) -> Columns:
    """Columns `forgetting_loss_sum` (nats) and `forgetting_tokens` of each passage."""
    longest = max(len(passage.input_ids) for passage in passages)  # may be over data.max_length
    max_tokens = max(max_tokens, longest)
    columns = loss_columns(model, passages, max_tokens=max_tokens, packing=packing, pad_id=pad_id)
    return {f"forgetting_{name}": values for name, values in columns.items()}


def read_passages(location: str) -> list[tuple[str, str]]:
    """(file:line, text) of each passage of a general text.

    `location` is `general` (the packaged text, described in general.md), a .jsonl file with a field
    `text`, or a .txt file with blank lines between passages. Raises DataError, with file:line where
    a line is at fault, for a file that is missing, unreadable, empty or holds anything else.
    """
    if location == GENERAL:
        path = files("tunefork.evaluate").joinpath("general.jsonl")
        return list(_rows(str(path)))
    match Path(location).suffix.lower():
        case ".jsonl":
            return list(_rows(location))
        case ".txt":
            return _paragraphs(Path(location))
    raise DataError(
        f"{_FIELD}: {location} is neither {GENERAL!r} nor a .jsonl or .txt file; give one of "
        "these, or null to leave forgetting out"
    )


def _rows(location: str) -> Iterator[tuple[str, str]]:
    for row in read_rows(location):
        if isinstance(row, RowProblem):
            raise DataError(f"{_FIELD}: {row}")
        text = row.fields.get("text")
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{_FIELD}: {row.source}: needs a field 'text' that is not empty")
        yield row.source, text


def _paragraphs(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{_FIELD}: {path}: is not UTF-8 (byte {error.start + 1})") from error
    except OSError as error:
        raise DataError(f"{_FIELD}: {path}: cannot be read ({error.strerror})") from error
    passages: list[tuple[str, str]] = []
    start, paragraph = 1, list[str]()
    for number, line in enumerate([*lines, ""], start=1):
        if line.strip():
            if not paragraph:
                start = number
            paragraph.append(line)
        elif paragraph:
            passages.append((f"{path.name}:{start}", "\n".join(paragraph)))
            paragraph = []
    if not passages:
        raise DataError(f"{_FIELD}: {path} holds no text; give passages with blank lines between")
    return passages
