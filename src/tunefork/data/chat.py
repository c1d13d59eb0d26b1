"""Conversations and texts become token ids, the same in training as in serving.

`Renderer` is the one place that turns messages into ids. A chat template writes its own beginning
of sequence; where there is none (`plain`), and before a plain text, goes what the tokenizer by
itself puts first. A plain text is closed by the end-of-sequence token and supervised whole, but
for its first token, which nothing precedes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from tunefork.data.example import Encoded, Example, Message, RowProblem
from tunefork.data.mask import Marked, Span, mark, turn_end
from tunefork.data.template import (
    PLAIN_REMEDY,
    Refused,
    has_marks,
    marked_ends,
    render_chat,
    render_plain,
)
from tunefork.errors import DataError
from tunefork.recipe import DataSection


@dataclass(frozen=True)
class Renderer:
    """Renders and tokenises by one tokenizer and the `data` section of one recipe."""

    tokenizer: Any
    section: DataSection

    def __post_init__(self) -> None:
        if self.section.template == "chat" and self.tokenizer.chat_template is None:
            raise DataError(
                "data.template: is chat, but the model's tokenizer has no chat template; use plain"
            )
        if self.template_in_use == "plain" and self.tokenizer.eos_token is None:
            raise DataError(
                "data.template: is plain, but the model's tokenizer has no end-of-sequence token, "
                "so that no answer could end; choose a model whose tokenizer has one"
            )

    @cached_property
    def template_in_use(self) -> Literal["chat", "plain"]:
        """What `data.template: auto` came to."""
        if self.section.template == "auto":
            return "plain" if self.tokenizer.chat_template is None else "chat"
        return self.section.template

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids of what a server sends to the model to have the next assistant turn generated.

        Raises DataError where the chat template refuses the messages.
        """
        try:
            ids = self._tokenize([self._render(messages, is_prompt=True)])[0]
        except Refused as refusal:
            raise DataError(f"messages: {refusal}") from refusal
        return self._rendered_bos + ids

    def text_ids(self, text: str) -> list[int]:
        """Ids of a plain text that is to be written on: as one is trained, but not closed."""
        return [*self._bos_ids, *self._tokenize([text])[0]]

    def encode(self, example: Example) -> Encoded:
        """Ids of the example up to its last supervised token; raises DataError naming its row."""
        encoded = self.attempt(example)
        if isinstance(encoded, RowProblem):
            raise DataError(str(encoded))
        return encoded

    def encode_answer(self, example: Example, answer: str) -> Encoded:
        """`encode` with `answer` in place of the last turn's content."""
        *before, last = example.messages
        messages = (*before, replace(last, content=answer))
        return self.encode(replace(example, messages=messages, label=example.label and answer))

    def attempt(self, example: Example) -> Encoded | RowProblem:
        """`encode`, with a RowProblem in place of the error."""
        if example.text is not None:
            return self._encode_text(example, example.text)
        try:
            marked = self._mark(example.messages)
        except Refused as refusal:
            return RowProblem(example.source, str(refusal))
        return Encoded(
            source=example.source,
            input_ids=marked.input_ids,
            supervised=marked.supervised,
            prompt_length=marked.prompt_length,
            answer=example.messages[-1].content,
            label=example.label,
        )

    def is_closed(self, encoded: Encoded) -> bool:
        """Whether the last token is one that can end a turn."""
        return int(encoded.input_ids[-1]) in self._end_of_turn_ids

    @cached_property
    def sample(self) -> Encoded | None:
        """A made-up conversation of two rounds or, where the template refuses that, of one."""
        turns = (Message("user", "a"), Message("assistant", "b"))
        for messages in (turns + turns, turns):
            encoded = self.attempt(Example("sample", messages=messages))
            if isinstance(encoded, Encoded):
                return encoded
        return None

    def _encode_text(self, example: Example, text: str) -> Encoded:
        ids = self._tokenize([text])[0]
        eos = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        input_ids = np.array([*self._bos_ids, *ids, *eos], dtype=np.int32)
        return Encoded(example.source, input_ids, np.arange(len(input_ids)) > 0)

    def _mark(self, messages: Sequence[Message]) -> Marked:
        text = self._render(messages, is_prompt=False)
        turns = [index for index, turn in enumerate(messages) if turn.role == "assistant"]
        ends = {}
        if self._has_marks:
            ends = marked_ends(self.tokenizer, messages, text, self._end_of_turn)
        supervised = turns if self.section.supervise == "all" else turns[-1:]
        spans = [self._span(messages, text, turn, ends) for turn in supervised]
        marked = mark(self._tokenize, text, spans)
        if marked is None:
            raise Refused(
                "the tokens of the conversation do not break where an earlier answer begins, as "
                "they do when serving; use data.supervise: last"
            )
        return marked.after(self._rendered_bos)

    def _span(
        self, messages: Sequence[Message], text: str, turn: int, ends: dict[int, int]
    ) -> Span:
        """Characters of `text` that the model has to produce for the assistant turn `turn`."""
        is_last = turn == len(messages) - 1
        start = len(prompt := self._render(messages[:turn], is_prompt=True))
        if turn in ends:
            upto = text[: ends[turn]]
        elif is_last:
            upto = text
        else:
            upto = self._render(messages[: turn + 1], is_prompt=False)
            if not text.startswith(upto):
                # Phi-3 closes a conversation, but not each of its turns, with <|endoftext|>.
                upto = upto.rstrip().removesuffix(self.tokenizer.eos_token or "")
        if not (text.startswith(prompt) and text.startswith(upto) and start < len(upto)):
            remedy = PLAIN_REMEDY if is_last else "use data.supervise: last"
            raise Refused(
                f"the chat template renders messages[{turn}] otherwise in the whole conversation "
                f"than after the prompt that a server would send; {remedy}"
            )
        return start, turn_end(upto, self._end_of_turn)

    def _render(self, messages: Sequence[Message], *, is_prompt: bool) -> str:
        if self.template_in_use == "plain":
            return render_plain(messages, self.tokenizer.eos_token)
        return render_chat(self.tokenizer, messages, is_prompt=is_prompt)

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        return ids

    @cached_property
    def _bos_ids(self) -> list[int]:
        """What the tokenizer by itself puts before a text."""
        bare: list[int] = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        full: list[int] = self.tokenizer("a")["input_ids"]
        starts = range(len(full) - len(bare) + 1)
        return full[: next(at for at in starts if full[at : at + len(bare)] == bare)]

    @cached_property
    def _rendered_bos(self) -> list[int]:
        """What goes before a rendered conversation: a chat template writes its own bos."""
        return self._bos_ids if self.template_in_use == "plain" else []

    @cached_property
    def _end_of_turn(self) -> tuple[str, ...]:
        return end_of_turn_tokens(self.tokenizer)

    @cached_property
    def _end_of_turn_ids(self) -> frozenset[int]:
        return frozenset(self.tokenizer.convert_tokens_to_ids(list(self._end_of_turn)))

    @cached_property
    def _has_marks(self) -> bool:
        return self.template_in_use == "chat" and has_marks(self.tokenizer)


def end_of_turn_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Tokens that may end a turn: every added one that is special or in the chat template's text.

    White space ends none, nor does a token of `model.add_tokens`, which an answer may hold.
    transformers 5 counts only those as special that the tokenizer has a name for (`eos_token`).
    """
    template = str(tokenizer.chat_template or "")
    added = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or token.content in template
    ]
    return tuple(token for token in {*added, *tokenizer.all_special_tokens} if token.strip())


def answer_ends(tokenizer: Any, examples: Sequence[Encoded]) -> list[int]:
    """Ids of the end-of-turn tokens with which the answers of `examples` are closed."""
    may_end = set(tokenizer.convert_tokens_to_ids(list(end_of_turn_tokens(tokenizer))))
    found: dict[int, None] = {}
    for example in examples:
        is_last = example.supervised & ~np.append(example.supervised[1:], False)
        found |= dict.fromkeys(example.input_ids[is_last].tolist())
    return [token for token in found if token in may_end]
