"""A tokenizer whose ids fit the tiny models' vocabulary, one word or sign a token."""

from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny import VOCABULARY

_SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Words `w4` to `w95` have those ids, pad, bos and eos the ids 0, 1 and 2. No chat template."""
    words = [*_SPECIAL, *(f"w{at}" for at in range(len(_SPECIAL), VOCABULARY))]
    vocabulary = {word: at for at, word in enumerate(words)}
    trained = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=trained,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
