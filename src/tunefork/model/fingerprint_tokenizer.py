"""SHA-256 of a tokenizer and of its chat template, the same after saving and loading again.

The tables (vocabulary, merges, scores, added tokens) are hashed as they are; what the tokenizer
does by code, as the ids that it makes of fixed texts (`golden.py`). Neither the name of a class nor
the layout of a file is in it, which releases of transformers change.
"""

import hashlib
import json
from typing import Any

from tunefork.model.golden import conversation_ids, text_ids

_SETTINGS = (
    "type",
    "unk_token",
    "unk_id",
    "fuse_unk",
    "byte_fallback",
    "ignore_merges",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "max_input_chars_per_word",
)
"""Fields of the tokenizers library's models that change ids; one that is false or empty is none."""
_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")

_KNOWN: dict[Any, str] = {}
"""Digests of tokenizers that this process met: a run's base and its artefact have the same one."""


def tokenizer_sha256(tokenizer: Any) -> str:
    """Digest of the vocabulary, merges, added tokens, end of sequence and of what texts become.

    Padding, truncation and the decoder are left out: they change no id of a text.
    """
    if not type(tokenizer).__module__.startswith("transformers."):
        return _digest(tokenizer)  # whose code may depend on anything
    whole = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).digest()
    key = (type(tokenizer), tokenizer.split_special_tokens, tokenizer.eos_token, whole)
    if key not in _KNOWN:
        _KNOWN[key] = _digest(tokenizer)
    return _KNOWN[key]


def _digest(tokenizer: Any) -> str:
    backend = tokenizer.backend_tokenizer
    model: dict[str, Any] = json.loads(backend.to_str())["model"]
    added = backend.get_added_tokens_decoder()
    return _sha256(
        sorted((number, token) for token, number in backend.get_vocab().items()),
        [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges", ())],
        model["vocab"] if isinstance(model["vocab"], list) else [],  # Unigram: with scores
        {name: model[name] for name in _SETTINGS if model.get(name)},
        [
            (number, token.content, *(bool(getattr(token, flag)) for flag in _FLAGS))
            for number, token in sorted(added.items())
        ],
        tokenizer.eos_token,
        text_ids(tokenizer),
    )


def template_sha256(tokenizer: Any) -> str | None:
    """Digest of the chat template's text and the golden conversations' ids; None without one."""
    if tokenizer.chat_template is None:
        return None
    return _sha256(tokenizer.chat_template, conversation_ids(tokenizer))


def rendering_sha256(tokenizer: Any) -> str:
    """Digest of the golden conversations' ids alone; of fixed texts' where there is no template."""
    if tokenizer.chat_template is None:
        return _sha256(text_ids(tokenizer))
    return _sha256(conversation_ids(tokenizer))


def _sha256(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        text = json.dumps(part, sort_keys=True, separators=(",", ":"))
        digest.update(f"{len(text)}:{text}".encode())
    return digest.hexdigest()
