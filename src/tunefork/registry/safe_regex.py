"""Whether a regular expression from a stranger's file matches a module's path, in bounded time.

Python's engine backtracks: `(a+)+b` takes 2^n steps on n letters. Here the expression, as Python's
own parser reads it, is followed by sets of positions instead (Thompson 1968): each part maps the
positions where it may begin to those where it may end, all at once, and the parts are counted.
Groups, alternatives, repeats, classes and anchors are all that module names take; what is left
(look-around, back references, flags) is refused by name.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

_parser: Any = import_module("re._parser")  # without stubs, as is the next
c: Any = import_module("re._constants")

LONGEST = 4096
"""Characters of an expression: Unsloth's, the longest in use, have some 500."""
_MOST_REPEATS = 1000
"""Of a written-out count: {1000} is the expression a thousand times over."""


class UnsafeRegexError(ValueError):
    """The expression is too long, is none, or has a part that is not followed here."""


def matches_fully(expression: str, text: str) -> bool:
    """`re.fullmatch(expression, text) is not None`. Raises UnsafeRegexError."""
    try:
        return len(text) in _ends(_parsed(expression), {0}, _Walk(text))
    except RecursionError as error:
        raise UnsafeRegexError("is nested too deeply") from error


@dataclass(slots=True)
class _Walk:
    """One text, and how many more parts may be followed through it."""

    text: str
    left: int = 100_000

    def step(self) -> None:
        """Count one part; groups in groups in groups could double the work at each level."""
        self.left -= 1
        if self.left < 0:
            raise UnsafeRegexError("takes too many steps to match")


@lru_cache(maxsize=64)
def _parsed(expression: str) -> Any:
    if len(expression) > LONGEST:
        raise UnsafeRegexError(f"is longer than {LONGEST} characters")
    try:
        parsed = _parser.parse(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise UnsafeRegexError(f"is no regular expression ({str(error)[:100]})") from error
    if parsed.state.flags & ~re.UNICODE.value:
        raise UnsafeRegexError("has flags, which are not supported")
    return list(parsed)


def _ends(parts: Any, starts: set[int], walk: _Walk) -> set[int]:
    """Where a match of all `parts`, one after another, may end if it begins at one of `starts`."""
    for kind, value in parts:
        if not starts:
            break
        walk.step()
        starts = _end_of_one(kind, value, starts, walk)
    return starts


def _end_of_one(kind: Any, value: Any, starts: set[int], walk: _Walk) -> set[int]:
    if kind is c.BRANCH:
        return set().union(*(_ends(option, starts, walk) for option in value[1]))
    if kind is c.SUBPATTERN:
        _, add, remove, parts = value
        if add or remove:
            raise UnsafeRegexError("has flags, which are not supported")
        return _ends(parts, starts, walk)
    if kind in (c.MAX_REPEAT, c.MIN_REPEAT):  # greedy or not is the same to a full match
        least, most, repeated = value
        return _repeated(least, most, repeated, starts, walk)
    text = walk.text
    if kind not in (c.AT, c.ANY, c.LITERAL, c.NOT_LITERAL, c.IN):
        raise UnsafeRegexError(f"has {str(kind).lower()}, which is not supported")
    if kind is c.AT:
        return {at for at in starts if _is_at(value, at, text)}
    return {at + 1 for at in starts if at < len(text) and _is_one(kind, value, text[at])}


def _repeated(least: Any, most: Any, parts: Any, starts: set[int], walk: _Walk) -> set[int]:
    least, most = int(least), None if most is c.MAXREPEAT else int(most)
    if least > _MOST_REPEATS or (most or 0) > _MOST_REPEATS:
        raise UnsafeRegexError(f"repeats more than {_MOST_REPEATS} times")
    for _ in range(least):
        ends = _ends(parts, starts, walk)
        if ends == starts:
            break
        starts = ends
    reached, new = set(starts), set(starts)
    for _ in range(len(walk.text) + 1 if most is None else most - least):
        new = _ends(parts, new, walk) - reached
        if not new:
            break
        reached |= new
    return reached


def _is_at(where: Any, at: int, text: str) -> bool:
    if where in (c.AT_BEGINNING, c.AT_BEGINNING_STRING):
        return at == 0
    if where is c.AT_END_STRING:
        return at == len(text)
    if where is c.AT_END:
        return at == len(text) or text[at:] == "\n"
    before = at > 0 and _is_word(text[at - 1])
    after = at < len(text) and _is_word(text[at])
    if where is c.AT_BOUNDARY:
        return before != after
    if where is c.AT_NON_BOUNDARY:
        return before == after
    raise UnsafeRegexError(f"has {where}, which is not supported")


def _is_one(kind: Any, value: Any, letter: str) -> bool:
    """Whether the part, which takes exactly one character, takes `letter`."""
    if kind is c.ANY:
        return letter != "\n"
    if kind is c.LITERAL:
        return ord(letter) == int(value)
    if kind is c.NOT_LITERAL:
        return ord(letter) != int(value)
    if kind is c.RANGE:
        return bool(value[0] <= ord(letter) <= value[1])
    if kind is c.CATEGORY:
        return _is_category(value, letter)
    if kind is c.IN:
        is_negated = value[0][0] is c.NEGATE
        members = value[1:] if is_negated else value
        return is_negated != any(_is_one(k, v, letter) for k, v in members)
    raise UnsafeRegexError(f"has {str(kind).lower()} in a class, which is not supported")


def _is_category(category: Any, letter: str) -> bool:
    tests = {
        c.CATEGORY_DIGIT: letter.isdecimal(),
        c.CATEGORY_SPACE: letter.isspace(),
        c.CATEGORY_WORD: _is_word(letter),
    }
    opposites = {
        c.CATEGORY_NOT_DIGIT: c.CATEGORY_DIGIT,
        c.CATEGORY_NOT_SPACE: c.CATEGORY_SPACE,
        c.CATEGORY_NOT_WORD: c.CATEGORY_WORD,
    }
    return not tests[opposites[category]] if category in opposites else tests[category]


def _is_word(letter: str) -> bool:
    return letter.isalnum() or letter == "_"
