"""A conversation with one model, rendered as it was rendered in training, streamed.

A model that was trained to label texts was never shown a conversation: each of its training rows
was one text under the run's instruction. So it is asked each text as such a row, by itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from transformers import TextIteratorStreamer

from tunefork.data.chat import Renderer
from tunefork.data.convert import add_instruction, convert, default_instruction, detect, rename
from tunefork.data.example import Example, Message, Row
from tunefork.data.ingest import ingest
from tunefork.data.read import read_rows
from tunefork.data.template import LABEL_CUE
from tunefork.errors import DataError
from tunefork.evaluate.generate import stop_ids
from tunefork.recipe import DataSection

_PEEK = 20
"""Rows that are looked at to see whether a file is labelled."""


class Conversation:
    """Turns so far, and the model that answers them.

    `data` is the section of the recipe that the model was trained with: its template is used, its
    system turn where `system` gives none, and its instruction where it was a classification. Raises
    DataError where that instruction lists the labels of training data that cannot be read.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        data: DataSection | None = None,
        *,
        system: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        data = data or DataSection(train="-")  # of a model as it is: the defaults, and no data
        self.system = data.system if system is None else system
        self.renderer = Renderer(tokenizer, data)
        self.instruction = find_instruction(data)
        self.messages: list[Message] = []
        sample = self.renderer.sample
        self.stop_ids = stop_ids(model, tokenizer, [sample] if sample else [])

    def asked(self, text: str) -> list[Message]:
        """The turns that are sent to the model to have `text` answered."""
        opening = [Message("system", self.system)] if self.system else []
        if self.instruction is None:
            return [*(self.messages or opening), Message("user", text)]
        return [*opening, self._as_row(text, self.instruction)]

    def ask(self, text: str) -> Iterator[str]:
        """Yields the answer in pieces; both turns are added once it is complete."""
        turns = self.asked(text)
        ids = torch.tensor([self.renderer.prompt_ids(turns)], device=self.model.device)
        streamer = TextIteratorStreamer(
            self.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=600.0
        )
        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            sampling = {"do_sample": True, "temperature": self.temperature}
        failure: list[BaseException] = []
        until_stop = _UntilStop(streamer, frozenset(self.stop_ids))

        def generate() -> None:
            try:
                self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    streamer=until_stop,
                    max_new_tokens=self.max_new_tokens,
                    eos_token_id=self.stop_ids or None,
                    pad_token_id=self.stop_ids[0] if self.stop_ids else 0,
                    **sampling,
                )
            except BaseException as error:
                failure.append(error)
                streamer.end()

        thread = Thread(target=generate, daemon=True)
        thread.start()
        answer = ""
        try:
            for piece in streamer:
                answer += piece
                yield piece
        finally:  # whoever reads may leave, by Ctrl-C: a thread that computes would outlive Python
            until_stop.is_left = True
            thread.join()
        if failure:
            raise failure[0]
        self.messages = [*turns, Message("assistant", answer)]

    def _as_row(self, text: str, instruction: str) -> Message:
        """The user turn of a training row with this text."""
        example = convert(Row("the text", {"text": text, "label": "?"}), "classification")
        if not isinstance(example, Example):
            raise DataError(str(example))
        cue = LABEL_CUE if self.renderer.template_in_use == "plain" else ""
        return add_instruction(example, instruction, cue).messages[0]


def find_instruction(data: DataSection) -> str | None:
    """What stood before each training text; None where the rows were no classification.

    Only rows can tell that where the format was left to them: without the file, it is taken for
    none.
    """
    if data.instruction or data.labels:
        return data.instruction or default_instruction(data.labels or ())
    if data.format != "classification" and not (data.format == "auto" and _looks_labelled(data)):
        return None
    try:
        rows = ingest(data.train, data, "classification")
    except DataError as error:
        raise DataError(
            "data.instruction: is not set, so that each training text followed a list of the "
            f"labels in data.train, which cannot be read again: {error}; set data.labels in the "
            "run's recipe.yaml"
        ) from error
    return default_instruction(sorted({example.label or "" for example in rows.examples}))


def _looks_labelled(data: DataSection) -> bool:
    """Whether the training file, if it is still there, begins with rows that have labels."""
    if not Path(data.train).is_file():
        return False
    try:
        first = list(islice(read_rows(data.train), _PEEK))
    except DataError:
        return False
    rows = [rename(row, data.columns) for row in first if isinstance(row, Row)]
    return any(detect(row.fields) == "classification" for row in rows)


@dataclass(slots=True)
class _UntilStop:
    """Passes tokens on to `streamer`, but not `stops`: one that is not special would be shown."""

    streamer: TextIteratorStreamer
    stops: frozenset[int]
    is_left: bool = False
    """Nobody reads on: the next token ends the answer."""

    def put(self, ids: Tensor) -> None:
        """The prompt, (1, L), and then each token, (1,)."""
        if self.is_left:
            raise InterruptedError("the answer is not read on")
        if ids.dim() > 1 or int(ids[0]) not in self.stops:
            self.streamer.put(ids)

    def end(self) -> None:
        """The answer is complete."""
        self.streamer.end()
