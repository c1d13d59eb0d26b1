"""The tokenizers of the data's tests."""

from tests.data.conftest import make_tokenizer

__all__ = ["make_tokenizer"]
