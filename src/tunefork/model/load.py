"""A model and its tokenizer from a hub id, a local folder, a GGUF file or a packaged model's name.

transformers defines the architectures; nothing here knows one by name. Remote code stays off. A
GGUF file is dequantised and written as a safetensors folder once, in the cache, under its hash
(reading SmolLM2's GGUF takes 18 s here, its folder 0.3 s).
"""

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from tunefork.errors import ModelError, nearest
from tunefork.model import attention
from tunefork.model.packaged import PACKAGED, locate, sha256_of
from tunefork.recipe import ModelSection


@dataclass(frozen=True, slots=True)
class Source:
    """What transformers' `from_pretrained` takes: a hub id or a folder, and a revision."""

    location: str
    revision: str | None = None


def find(section: ModelSection) -> Source:
    """Where the recipe's model is; converts a GGUF file on first use. Raises ModelError."""
    model_id = section.id
    path = Path(model_id).expanduser()
    is_local = model_id in PACKAGED or path.exists() or path.suffix == ".gguf"
    if is_local and section.revision is not None:
        raise ModelError(
            f"model.revision: {section.revision!r} is given, but {model_id} is no hub id; only hub "
            "models have revisions"
        )
    if model_id in PACKAGED:
        return Source(str(_converted(locate(model_id), expected=PACKAGED[model_id].sha256)))
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"model.id: {path}: no such file")
        return Source(str(_converted(path)))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"model.id: {path} holds no config.json; give a folder written by save_pretrained"
            )
        return Source(str(path))
    if path.exists() or model_id.startswith((".", "/", "~")) or model_id.count("/") > 1:
        raise ModelError(
            f"model.id: {model_id} is no model: give a Hugging Face folder, a .gguf file, a hub id "
            f"(owner/name) or one of {', '.join(PACKAGED)}"
        )
    return Source(model_id, section.revision)


def load_tokenizer(section: ModelSection) -> Any:
    """The model's tokenizer (a `PreTrainedTokenizerFast`)."""
    source = find(section)
    tokenizer = _from_pretrained(AutoTokenizer, section, source)
    if not tokenizer.is_fast:
        raise ModelError(
            f"model.id: {section.id} has no fast tokenizer; tunefork needs one to find which "
            "tokens are an answer's"
        )
    return tokenizer


def load_model(section: ModelSection, *, dtype: torch.dtype, device: torch.device) -> Any:
    """The model (a `PreTrainedModel` with a causal-LM head) in `dtype` on `device`.

    Dropout in the base is off in training too: the recipe's `lora.dropout` is the only one.
    """
    source = find(section)
    config, model_class = _architecture(section, source)
    implementation = "sdpa" if model_class._supports_sdpa else "eager"
    if (
        implementation == "sdpa"
        and device.type == "cpu"
        and model_class._supports_attention_backend
    ):
        attention.register()
        implementation = attention.NAME
    model = _from_pretrained(
        AutoModelForCausalLM,
        section,
        source,
        config=config,
        dtype=dtype,
        attn_implementation=implementation,
    )
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return model.to(device)


def load_skeleton(section: ModelSection) -> Any:
    """The model on the meta device: its layers and shapes, without its weights."""
    config, _ = _architecture(section, find(section))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _architecture(section: ModelSection, source: Source) -> tuple[Any, Any]:
    """The model's config and causal-LM class; raises ModelError for what cannot be trained."""
    config = _from_pretrained(AutoConfig, section, source)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"model.id: {section.id} is already quantised; give the unquantised weights (qlora "
            "quantises them itself)"
        )
    model_class = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if model_class is None:
        raise ModelError(
            f"model.id: {section.id} is a {config.model_type} model, which transformers knows no "
            "causal language model for; tunefork trains decoder-only language models"
        )
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    return config, model_class


def _from_pretrained(loader: Any, section: ModelSection, source: Source, **options: Any) -> Any:
    """Call transformers' loader quietly; what it cannot find becomes a ModelError."""
    try:
        with without_progress_bars():
            return loader.from_pretrained(
                source.location,
                revision=source.revision or "main",
                trust_remote_code=False,
                **options,
            )
    except (OSError, HFValidationError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ModelError(
            f"model.id: {section.id} cannot be loaded{nearest(section.id, list(PACKAGED))}: "
            f"{reason} (a hub id needs the network or its files in the cache)"
        ) from error


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep transformers' loading and saving from drawing bars over a run's own progress."""
    was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()


def cache_folder() -> Path:
    """Where converted models are kept: TUNEFORK_CACHE, else ~/.cache/tunefork."""
    return Path(os.environ.get("TUNEFORK_CACHE", "~/.cache/tunefork")).expanduser()


def _converted(file: Path, expected: str | None = None) -> Path:
    """The safetensors folder of a GGUF file, converted on first use, visible by one rename."""
    digest = sha256_of(file)
    if expected is not None and digest != expected:
        raise ModelError(f"model.id: {file.name} has sha256 {digest}, but {expected} is expected")
    folder = cache_folder() / "converted" / digest
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
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
    try:
        # Its progress bar heeds no setting; in a log it would be hundreds of lines.
        with contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, dtype=torch.bfloat16, **dense, **options
            )
            model.save_pretrained(folder)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise ModelError(
            f"model.id: {file}: transformers cannot read this GGUF: {error}"
        ) from error
    tokenizer.save_pretrained(folder)
