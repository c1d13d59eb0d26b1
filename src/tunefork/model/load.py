"""A model and its tokenizer from a hub id, a local folder, a GGUF file or a packaged model's name.

transformers defines the architectures; nothing here knows one by name. Remote code stays off, and
a checkpoint that does not fill every weight of its architecture is refused: transformers would
start the rest at random.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from tunefork.errors import ModelError, nearest
from tunefork.model import attention
from tunefork.model.damage import check_filled, unreadable
from tunefork.model.gguf import converted
from tunefork.model.hub import can_ask_hub
from tunefork.model.onednn import bound_shapes
from tunefork.model.packaged import PACKAGED, locate
from tunefork.model.tokens import add_tokens, added_ids, grow
from tunefork.recipe import ModelSection


@dataclass(frozen=True, slots=True)
class Source:
    """What transformers' `from_pretrained` takes: a hub id or a folder, and a revision."""

    location: str
    revision: str | None = None


def find(section: ModelSection) -> Source:
    """Where the recipe's model is; converts a GGUF file on first use. Raises ModelError."""
    model_id = section.id
    try:
        path = Path(model_id).expanduser()
        is_local = model_id in PACKAGED or path.exists() or path.suffix == ".gguf"
    except (OSError, RuntimeError) as error:  # a name too long, the home of nobody
        raise ModelError(f"model.id: {model_id} is no model: {error}") from error
    if is_local and section.revision is not None:
        raise ModelError(
            f"model.revision: {section.revision!r} is given, but {model_id} is no hub id; only hub "
            "models have revisions"
        )
    if model_id in PACKAGED:
        return Source(str(converted(locate(model_id), expected=PACKAGED[model_id].sha256)))
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"model.id: {path}: no such file")
        return Source(str(converted(path)))
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


def load_tokenizer(section: ModelSection, saved_in: Path | None = None) -> Any:
    """The model's tokenizer (a `PreTrainedTokenizerFast`), with the recipe's added tokens.

    `saved_in`: an adapter's folder, whose own tokenizer is taken instead.
    """
    source = find(section) if saved_in is None else Source(str(saved_in))
    tokenizer = _from_pretrained(AutoTokenizer, section, source)
    if not tokenizer.is_fast:
        raise ModelError(
            f"model.id: {section.id} has no fast tokenizer; tunefork needs one to find which "
            "tokens are an answer's"
        )
    add_tokens(tokenizer, section.add_tokens)
    return tokenizer


def new_ids(section: ModelSection) -> tuple[int, ...]:
    """Ids of the tokens that the recipe adds to the model."""
    if not section.add_tokens:
        return ()
    return added_ids(load_tokenizer(section), section.add_tokens)


def load_model(
    section: ModelSection, *, dtype: torch.dtype, device: torch.device, in_host_memory: bool = False
) -> Any:
    """The model (a `PreTrainedModel` with a causal-LM head) in `dtype` on `device`.

    `in_host_memory` leaves it on the CPU, ready to be moved to `device` in parts.
    The recipe's added tokens have rows. Dropout in the base is off in training too: the recipe's
    `lora.dropout` is the only one.
    """
    bound_shapes()  # before the first product
    source = find(section)
    config, model_class = _architecture(section, source)
    # transformers 5.17 has SDPA for Gemma 2, and leaves its soft-capping out without a word.
    is_capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    implementation = "sdpa" if model_class._supports_sdpa and not is_capped else "eager"
    if implementation == "sdpa" and model_class._supports_attention_backend:
        attention.register()
        implementation = attention.NAME
    model, loaded = _from_pretrained(
        AutoModelForCausalLM,
        section,
        source,
        config=config,
        dtype=dtype,
        attn_implementation=implementation,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    check_filled(model, loaded, f"model.id: {section.id}")
    if section.add_tokens:
        grow(model, new_ids(section))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return model if in_host_memory else model.to(device)


def load_config(section: ModelSection) -> Any:
    """The model's configuration alone; raises ModelError for what cannot be trained."""
    config = _architecture(section, find(section))[0]
    if section.add_tokens:
        text = config.get_text_config()
        text.vocab_size = max(text.vocab_size, max(new_ids(section)) + 1)
    return config


def load_skeleton(section: ModelSection) -> Any:
    """The model on the meta device: its layers and shapes, without its weights."""
    config = load_config(section)
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
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    if model_class is None or not _is_decoder_only(config, model_class):
        raise ModelError(
            f"model.id: {section.id} is a {config.model_type} model "
            f"({', '.join(config.architectures or ['no architecture named'])}), not a "
            "decoder-only language model, which is what tunefork trains"
        )
    return config, model_class


def _is_decoder_only(config: Any, model_class: Any) -> bool:
    """Whether each token sees only those before it.

    transformers has causal classes for encoders too (BertLMHeadModel, BartForCausalLM). They see
    both ways where `is_decoder` is false, but GPT-NeoX has that field and heeds it not: what it
    was saved as decides.
    """
    if getattr(config, "is_encoder_decoder", False):
        return False
    return getattr(config, "is_decoder", True) or model_class.__name__ in (
        config.architectures or []
    )


def _from_pretrained(loader: Any, section: ModelSection, source: Source, **options: Any) -> Any:
    """Call transformers' loader quietly; what it cannot find or read becomes a ModelError."""
    is_folder = Path(source.location).is_dir()
    guess = "" if is_folder else nearest(section.id, list(PACKAGED))
    parent, _, name = section.id.rpartition("/")
    if parent and not is_folder and Path(parent).is_dir():
        guess = f"; the folder {parent} has no {name}, and as a hub id"
    hint = "" if is_folder else " (a hub id needs the network, or its files in the cache)"
    with (
        without_progress_bars(),
        unreadable(f"model.id: {section.id} cannot be loaded{guess}", hint),
    ):
        return loader.from_pretrained(
            source.location,
            revision=source.revision or "main",
            trust_remote_code=False,
            local_files_only=not is_folder and not can_ask_hub(),
            **options,
        )


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
