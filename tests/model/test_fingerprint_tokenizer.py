"""A tokenizer is known by what it makes of texts; how it was saved does not count."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoTokenizer

from tests.data.conftest import CHATML
from tunefork.model.fingerprint_tokenizer import (
    rendering_sha256,
    template_sha256,
    tokenizer_sha256,
)

Make = Callable[..., Any]


@pytest.mark.parametrize("digest", [tokenizer_sha256, template_sha256, rendering_sha256])
def test_saving_and_loading_changes_nothing(
    digest: Callable[[Any], str], make_tokenizer: Make, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(bos_token="<s>")
    tokenizer.add_tokens(["<tool>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<call>"]})
    before = digest(tokenizer)
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=1)  # leaves settings behind
    assert digest(tokenizer) == before
    for _ in range(2):
        tokenizer.save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        assert digest(tokenizer) == before


def _change_vocabulary(tokenizer: Any) -> None:
    _edit(tokenizer, lambda model: model["vocab"].update(the=model["vocab"].pop("he"), he=400))


def _change_merges(tokenizer: Any) -> None:
    _edit(tokenizer, lambda model: model["merges"].reverse())


def _edit(tokenizer: Any, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    change(content["model"])
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(content))


def _add_special(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})


def _lower(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def _map_one_character(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u0416", "x")


def _split_at_o(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("o", "isolated"), pre_tokenizers.ByteLevel(False)]
    )


def _prefix_space(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def _other_end(tokenizer: Any) -> None:
    tokenizer.eos_token = "</s>"


@pytest.mark.parametrize(
    "change",
    [
        _change_vocabulary,
        _change_merges,
        _add_special,
        _lower,
        _map_one_character,
        _split_at_o,
        _prefix_space,
        _other_end,
    ],
)
def test_what_changes_ids_shows(change: Callable[[Any], None], make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    before = tokenizer_sha256(tokenizer)
    change(tokenizer)
    assert tokenizer_sha256(tokenizer) != before


def test_an_added_token_is_known_by_its_flags(make_tokenizer: Make) -> None:
    plain, special = make_tokenizer(), make_tokenizer()
    plain.add_tokens(["<tool>"])
    _add_special(special)
    assert tokenizer_sha256(plain) != tokenizer_sha256(special)


def test_a_template_that_writes_the_date_is_the_same_tomorrow(make_tokenizer: Make) -> None:
    dated = make_tokenizer("{{ strftime_now('%f %c') }} " + CHATML)
    assert template_sha256(dated) == template_sha256(dated)
    assert template_sha256(dated) != template_sha256(make_tokenizer())


def test_the_text_of_a_template_counts_and_its_rendering_by_itself(make_tokenizer: Make) -> None:
    plain, commented = make_tokenizer(), make_tokenizer("{# the same #}" + CHATML)
    assert template_sha256(plain) != template_sha256(commented)
    assert rendering_sha256(plain) == rendering_sha256(commented)
