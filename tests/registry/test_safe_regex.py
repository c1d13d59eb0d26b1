"""The bounded matcher agrees with Python's own engine on the expressions that adapters hold."""

import random
import re

import pytest

from tunefork.registry.safe_regex import UnsafeRegexError, matches_fully

PATHS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.down_proj",
    "transformer.h.3.attn.c_attn",
    "lm_head",
    "",
]
IN_USE = [
    r".*\.(q_proj|v_proj)",
    r"^model\.layers\.\d+\.self_attn\.[qkv]_proj$",
    r"model\.layers\.(?:1[01]|[0-9])\.mlp\..*",
    r"(?:.*?(?:language|text|model).*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.(?:up_proj))",
    r"[^.]*",
    r"(?P<name>lm)_\w{4}",
    r".*\B_proj",
    r"\w+(\.\w+)*",
    r".{3,7}|.+?\S\D\W?.*",
]


@pytest.mark.parametrize("expression", IN_USE)
def test_agrees_on_what_is_in_use(expression: str) -> None:
    for path in PATHS:
        assert matches_fully(expression, path) == bool(re.fullmatch(expression, path)), path


def test_agrees_on_random_expressions() -> None:
    draw = random.Random(0)

    def expression(depth: int) -> str:
        if depth == 0:
            return draw.choice(["a", "b", ".", "[ab]", "[^a]", r"\w", "^", "$", r"\b"])
        one, two = expression(depth - 1), expression(depth - 1)
        return draw.choice(
            [one + two, f"({one}|{two})", f"({one})*", f"({one})?", f"({one}){{1,2}}"]
        )

    for _ in range(300):
        pattern = expression(draw.randrange(1, 4))
        for text in ("", "a", "ab", "ba", "aab", "b.a"):
            assert matches_fully(pattern, text) == bool(re.fullmatch(pattern, text)), pattern


@pytest.mark.parametrize(
    "expression", ["(?i)a", "(?i:a)", "(?=a)a", r"(a)\1", "a{2000}", "a" * 5000, "(", "(" * 3000]
)
def test_what_is_not_followed_is_refused(expression: str) -> None:
    with pytest.raises(UnsafeRegexError):
        matches_fully(expression, "a")
