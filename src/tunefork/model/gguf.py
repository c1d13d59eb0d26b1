"""A GGUF file as a Hugging Face folder, dequantised once and kept in the cache under its hash.

transformers can train and save it only so, and reading SmolLM2's GGUF takes 18 s here, its folder
0.3 s.
"""

import contextlib
import io
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunefork.errors import ModelError
from tunefork.home import cache_folder
from tunefork.model.damage import check_filled, unreadable
from tunefork.model.packaged import sha256_of


def converted(file: Path, expected: str | None = None) -> Path:
    """The safetensors folder of a GGUF file, converted on first use, visible by one rename.

    Raises ModelError if the file cannot be read, or if its sha256 is not the one `expected`.
    """
    digest = sha256_of(file)
    if expected is not None and digest != expected:
        raise ModelError(f"model.id: {file.name} has sha256 {digest}, but {expected} is expected")
    folder = cache_folder() / "converted" / digest
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"{file.name}: converted once, into {folder.parent} ...", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="converting-") as scratch:
        written = Path(scratch) / "model"
        _convert(file, written)
        try:
            written.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was first
                raise
    return folder


def _convert(file: Path, folder: Path) -> None:
    """Dequantise a GGUF file to a bf16 Hugging Face folder."""
    options: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    if hasattr(transformers, "GgufConfig"):
        # Newer releases keep GGUF blocks quantised unless told otherwise; a quantised model can
        # neither be trained nor saved.
        dense = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    else:
        dense = {}
    # Its progress bars heed no setting; in a log they would be hundreds of lines.
    with contextlib.redirect_stderr(io.StringIO()):
        with unreadable(f"model.id: {file}: transformers cannot read this GGUF"):
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
            model, loaded = AutoModelForCausalLM.from_pretrained(
                file.parent,
                dtype=torch.bfloat16,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **dense,
                **options,
            )
        check_filled(model, loaded, f"model.id: {file}")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
