"""A row of any of six formats becomes a conversation or a text.

The formats are those that practitioners' files come in: OpenAI's `messages`, `prompt` +
`completion`, `text` + `label`, plain `text`, Alpaca (https://github.com/tatsu-lab/stanford_alpaca)
and ShareGPT (`conversations` of `from` + `value`). A row that cannot be used becomes a `RowProblem`
that names the field and never its text. What would change the meaning of a conversation and cannot
be honoured (tool calls, images, per-turn weights, Alpaca's `history`) is a problem too, not a
silent loss.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tunefork.data.example import Example, Message, Row, RowProblem

Fields = Mapping[str, Any]

REQUIRED: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "classification": ("text", "label"),
    "text": ("text",),
}
"""The fields that a row of each format must have, in the order in which `detect` tries them."""

OPTIONAL: dict[str, tuple[str, ...]] = {
    "messages": ("system",),
    "sharegpt": ("system",),
    "alpaca": ("input", "system"),
    "prompt_completion": ("system",),
}
"""The fields that a row may have besides. In classification `system` is any column's name."""

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}
_UNSUPPORTED = ("tool_calls", "function_call", "reasoning_content", "thinking")


_EMPTY, _ROLE, _UNICODE = "empty answer", "wrong roles", "broken unicode"
_ANSWERS = ("completion", "output", "label")


class _Unusable(Exception):
    """The row cannot be used; the message says why, `kind` is `RowProblem.kind`."""

    def __init__(self, what: str, kind: str | None = None) -> None:
        super().__init__(what)
        self.kind = kind


def rename(row: Row, columns: Mapping[str, str]) -> Row:
    """Apply `columns` (field that a format expects -> column that the file has)."""
    if not columns:
        return row
    kept = {name: value for name, value in row.fields.items() if name not in columns}
    found = {field: row.fields[name] for field, name in columns.items() if name in row.fields}
    return Row(row.source, kept | found)


def detect(fields: Collection[str]) -> str | None:
    """The first format whose required fields are all among the names `fields`, or None."""
    for name, required in REQUIRED.items():
        if all(field in fields for field in required):
            return name
    return None


def convert(row: Row, format: str, system: str | None = None) -> Example | RowProblem:
    """Make an Example of a row whose columns bear their format's names.

    `system` is the system turn of a conversation that brings none. A classification row comes out
    without its instruction, which needs every row's label first: see `add_instruction`.
    """
    try:
        for field in REQUIRED[format]:
            if row.fields.get(field) is None:
                raise _Unusable(f"the field {field!r} is missing")
        if format == "text":
            return Example(row.source, text=_text(row.fields, "text"))
        turns = _TURNS[format](row.fields)
        if system is not None and turns[0].role != "system":
            turns = [Message("system", system), *turns]
        label = turns[-1].content if format == "classification" else None
        return Example(row.source, messages=tuple(turns), label=label)
    except _Unusable as problem:
        kind = {"kind": problem.kind} if problem.kind else {}
        return RowProblem(row.source, str(problem), **kind)


def add_instruction(example: Example, instruction: str, cue: str = "") -> Example:
    """Put `instruction` and a blank line before a classification example's text, `cue` after it."""
    *before, user, answer = example.messages
    user = replace(user, content=f"{instruction}\n\n{user.content}{cue}")
    return replace(example, messages=(*before, user, answer))


def default_instruction(labels: Sequence[str]) -> str:
    """The request put before every text where the recipe gives none."""
    return f"Classify the text. Answer with one of: {', '.join(labels)}."


def _text(fields: Fields, field: str) -> str:
    value = fields.get(field)
    if value is None:
        raise _Unusable(f"the field {field!r} is missing")
    if not isinstance(value, str):
        raise _Unusable(f"the field {field!r} must be a string, found {type(value).__name__}")
    if not value.strip():
        raise _Unusable(f"the field {field!r} is empty", _EMPTY if field in _ANSWERS else None)
    return _valid(value, f"the field {field!r}")


def _valid(text: str, where: str) -> str:
    """Half a surrogate pair is legal in JSON's escapes, but no tokenizer takes it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _Unusable(
            f"{where} holds half a surrogate pair, which is not text", _UNICODE
        ) from error
    return text


def _system(fields: Fields) -> list[Message]:
    return [Message("system", _text(fields, "system"))] if fields.get("system") else []


def _label(fields: Fields) -> str:
    """A string or an integer; true and false are spelt as JSON spells them."""
    value = fields["label"]
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    return _text(fields, "label").strip()


def _classification(fields: Fields) -> list[Message]:
    return [Message("user", _text(fields, "text")), Message("assistant", _label(fields))]


def _prompt_completion(fields: Fields) -> list[Message]:
    prompt = Message("user", _text(fields, "prompt"))
    return [*_system(fields), prompt, Message("assistant", _text(fields, "completion"))]


def _alpaca(fields: Fields) -> list[Message]:
    if fields.get("history"):
        raise _Unusable("history is not supported; give its turns as 'messages', or remove it")
    request = _text(fields, "instruction")
    if str(fields.get("input") or "").strip():
        request += "\n\n" + _text(fields, "input")
    answer = Message("assistant", _text(fields, "output"))
    return [*_system(fields), Message("user", request), answer]


def _messages(fields: Fields) -> list[Message]:
    return _with_system(fields, _conversation(fields, "messages"))


def _sharegpt(fields: Fields) -> list[Message]:
    return _with_system(fields, _conversation(fields, "conversations"))


def _with_system(fields: Fields, turns: list[Message]) -> list[Message]:
    own = _system(fields)
    if turns[0].role != "system":
        return [*own, *turns]
    if own and own[0].content.strip() != turns[0].content.strip():
        raise _Unusable("the field 'system' says otherwise than the first turn; keep one of them")
    return turns


_TURNS: dict[str, Callable[[Fields], list[Message]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "classification": _classification,
}


def _conversation(fields: Fields, field: str) -> list[Message]:
    turns = fields[field]
    if not isinstance(turns, list) or not turns:
        raise _Unusable(f"the field {field!r} must be a list of turns with at least one")
    for name in ("tools", "functions"):
        if fields.get(name):
            raise _Unusable(f"{name} are not supported; remove the field or the row")
    messages = [_turn(turn, f"{field}[{index}]") for index, turn in enumerate(turns)]
    if messages[-1].role != "assistant":
        raise _Unusable(
            f"the last turn of {field!r} must be the assistant's, the answer to learn", _ROLE
        )
    if next(turn.role for turn in messages if turn.role != "system") == "assistant":
        raise _Unusable(f"{field!r} begins with an answer; a user turn must come first", _ROLE)
    return messages


def _turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise _Unusable(f"{where} must be an object with 'role' and 'content'")
    for name in _UNSUPPORTED:
        if turn.get(name):
            raise _Unusable(f"{where}.{name} is not supported; remove it or the row")
    if turn.get("weight") not in (None, 1):
        raise _Unusable(f"{where}.weight other than 1 is not supported; see data.supervise")
    if turn.get("train") not in (None, True):
        raise _Unusable(f"{where}.train other than true is not supported; see data.supervise")
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str) or role not in _ROLES:
        raise _Unusable(f"{where} has no known role; allowed: {', '.join(_ROLES)}", _ROLE)
    content = _content(turn.get("content", turn.get("value")), where)
    if _ROLES[role] == "assistant" and not content.strip():
        raise _Unusable(f"{where}, an assistant turn, is empty", _EMPTY)
    return Message(_ROLES[role], _valid(content, where))


def _content(content: Any, where: str) -> str:
    """A string, or OpenAI's list of parts, where every part is text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _Unusable(f"{where} has no content that is text")
    parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
    texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
    if len(texts) < len(content):
        raise _Unusable(f"{where} has a content part that is not text; only text can be learnt")
    return "".join(texts)
