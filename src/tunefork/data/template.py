"""Conversations become text: by the tokenizer's chat template, or plainly.

The plain way is the turns joined by blank lines, each answer one space after what precedes it and
closed by the end-of-sequence token:

    {system}\\n\\n{user} {answer}<eos>\\n\\n{user} {answer}<eos>

No space is added where either side brings white space of its own.
"""

import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from tunefork.data.example import Message
from tunefork.data.mask import extend_to_end_of_turn

LABEL_CUE = "\n\nLabel:"
"""What a classification text ends with in the plain way, where no turn asks for the answer."""

PLAIN_REMEDY = "use data.template: plain, or a tokenizer with another chat template"

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\b")


class Refused(Exception):
    """The conversation cannot be rendered as a server would render it; the message says why."""


def render_plain(messages: Sequence[Message], eos: str) -> str:
    """The plain text of `messages`; without a last answer it is the prompt for one."""
    text = ""
    for message in messages:
        if message.role == "assistant":
            is_apart = text[-1:].isspace() or message.content[:1].isspace()
            text += ("" if is_apart else " ") + message.content + eos
        else:
            text += ("\n\n" if text else "") + message.content
    return text


def render_chat(tokenizer: Any, messages: Sequence[Message], *, is_prompt: bool) -> str:
    """The chat template's text; raises Refused where the template raises."""
    try:
        text: str = tokenizer.apply_chat_template(
            _as_dicts(messages), tokenize=False, add_generation_prompt=is_prompt
        )
    except (TemplateError, TypeError) as error:
        # A template may put a row's text into its message; what stands in the template may not.
        reason = f": {error}" if str(error) in str(tokenizer.chat_template) else ""
        roles = ", ".join(message.role for message in messages)
        raise Refused(
            f"the chat template refuses the conversation{reason} (its roles: {roles})"
        ) from error
    return text


def has_marks(tokenizer: Any) -> bool:
    """Whether the chat template marks its answers with `{% generation %}`, and can be asked to."""
    template = tokenizer.get_chat_template()
    return bool(tokenizer.is_fast) and _GENERATION_MARK.search(template) is not None


def marked_ends(
    tokenizer: Any, messages: Sequence[Message], text: str, end_of_turn: tuple[str, ...]
) -> dict[int, int]:
    """Where in `text`, the rendered conversation, each assistant turn ends by the template's marks.

    Keys are indices of `messages`. Raises Refused where marks and assistant turns do not match.
    """
    output = tokenizer.apply_chat_template(
        _as_dicts(messages),
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
    )
    mask = [*output["assistant_masks"], 0]
    lasts = [at for at, here in enumerate(mask[:-1]) if here and not mask[at + 1]]
    turns = [index for index, turn in enumerate(messages) if turn.role == "assistant"]
    if len(lasts) != len(turns):
        raise Refused(
            f"the chat template marks {len(lasts)} answers of a conversation with {len(turns)}; "
            f"{PLAIN_REMEDY}"
        )
    ends = (output["offset_mapping"][last][1] for last in lasts)
    return {
        turn: extend_to_end_of_turn(text, end, end_of_turn)
        for turn, end in zip(turns, ends, strict=True)
    }


def _as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]
