"""A tiny byte-level tokenizer, the chat templates of the field, and files of rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tunefork.recipe import Recipe
from tunefork.recipe_file import parse

SPECIAL = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|user|>"]
SPECIAL += ["<|assistant|>", "<|end|>", "<start_of_turn>", "<end_of_turn>", "<|eot|>", "<|head|>"]

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nBe helpful<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    lines = ["the quick brown fox jumps over the lazy dog", "system user assistant model hello"]
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines * 20, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """A function of a chat template (or None) and the names of special tokens."""
    trained = train_tokenizer().to_str()

    def make(template: str | None = CHATML, *, eos: str = "<|im_end|>", **special: str) -> Any:
        names = {"eos_token": eos, "pad_token": eos} | special
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(trained), **names)
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture
def tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    """ChatML, and pad = eos = end of turn, as SmolLM2 has it."""
    return make_tokenizer()


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """Write rows (or raw lines) as JSONL; returns the path."""

    def write(rows: list[Any], name: str = "train.jsonl") -> str:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path = tmp_path / name
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def make_recipe() -> Callable[..., Recipe]:
    """A recipe with the given `data` section; `train` fields as a dict under `train_section`."""

    def make(train_section: dict[str, Any] | None = None, **data: Any) -> Recipe:
        return parse({"model": "none", "data": data, "train": train_section or {}})

    return make
