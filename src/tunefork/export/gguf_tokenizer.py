"""A byte-level BPE tokenizer in GGUF's metadata.

Written from the tokenizer that the run used, not copied from the GGUF that a base may have come
from: the two may split text differently, and the model was trained on what this one makes.
llama.cpp does not read the splitting rule; it has a list of rules by name (`tokenizer.ggml.pre`,
llama-vocab.cpp). So the rule in tokenizer.json must be one of those known here, compared part by
part, and every other is refused: a wrong name would give other tokens in silence.
"""

import json
from typing import Any

import gguf

from tunefork.errors import ModelError
from tunefork.export.gguf_layout import ELSEWHERE

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_BYTES = ("ByteLevel", False)
"""ByteLevel that only maps bytes to letters; with True, it splits by GPT-2's rule first."""
_PRE: dict[tuple[tuple[str, Any], ...], str] = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", _LLAMA3), _BYTES): "llama-bpe",
    (("Split", _QWEN2), _BYTES): "qwen2",
}
"""The steps of a pre-tokenizer -> llama.cpp's name."""
_IGNORES_MERGES = {"llama-bpe"}
_NORMALIZERS: dict[str, tuple[Any, ...]] = {"qwen2": (None, {"type": "NFC"})}
"""llama.cpp normalises nothing: text that is in NFC already, as nearly all is, is the same."""


def write_tokenizer(writer: Any, tokenizer: Any, *, vocabulary: int) -> None:
    """Write `tokenizer`, filled up to `vocabulary` ids, its special ids and its chat template.

    Raises ModelError for a tokenizer that llama.cpp would read otherwise.
    """
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    pre = pre_tokenizer(stored)
    ids = tokenizer.get_vocab()
    if len(ids) > vocabulary or max(ids.values()) >= vocabulary:
        raise ModelError(
            f"gguf: the tokenizer has {max(ids.values()) + 1} ids, but the model {vocabulary} rows"
        )
    by_id = {index: token for token, index in ids.items()}
    kinds = {
        token["id"]: gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        for token in stored["added_tokens"]
    }
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(vocabulary)]
    missing = gguf.TokenType.UNUSED
    types = [
        kinds.get(index, gguf.TokenType.NORMAL) if index in by_id else missing
        for index in range(vocabulary)
    ]
    merges = [m if isinstance(m, str) else " ".join(m) for m in stored["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    for name in ("bos", "eos", "unk", "pad"):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    first = tokenizer("a")["input_ids"][:1]
    writer.add_add_bos_token(bool(first) and first[0] == tokenizer.bos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def pre_tokenizer(stored: dict[str, Any]) -> str:
    """llama.cpp's name for the splitting rule of a tokenizer.json; raises ModelError."""
    model = stored["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        kind = "SentencePiece BPE" if model["type"] == "BPE" else model["type"]
        raise ModelError(
            f"gguf: a {kind} tokenizer is not converted here, only byte-level BPE; {ELSEWHERE}"
        )
    pre = _PRE.get(_steps(stored["pre_tokenizer"]))
    if pre is None or stored["normalizer"] not in _NORMALIZERS.get(pre, (None,)):
        raise ModelError(
            "gguf: llama.cpp's name for this tokenizer's splitting rule is not known here (known: "
            f"{', '.join(_PRE.values())}), and a wrong one would give other tokens in silence; "
            f"{ELSEWHERE}"
        )
    if bool(model.get("ignore_merges")) != (pre in _IGNORES_MERGES):
        raise ModelError(
            f"gguf: ignore_merges={model.get('ignore_merges')} is not what {pre} means"
        )
    return pre


def _steps(stored: dict[str, Any] | None) -> tuple[tuple[str, Any], ...]:
    """Each step of a pre-tokenizer with the setting that decides what it does."""
    if stored is None:
        return ()
    if stored["type"] == "Sequence":
        return tuple(step for part in stored["pretokenizers"] for step in _steps(part))
    match stored:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(splits)}:
            return (("ByteLevel", splits),)
        case {"type": "Digits", "individual_digits": True}:
            return (("Digits", True),)
        case {"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False}:
            return (("Split", rule),)
    return ((stored["type"], None),)
