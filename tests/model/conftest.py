"""What the tests of loading share."""

import pytest

from tests.data.conftest import make_tokenizer

__all__ = ["make_tokenizer", "offline"]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub: its client reads the environment when it is imported, so its constant is set."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
