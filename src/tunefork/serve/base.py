"""The base as the gateway knows it: name, identity, tokenizer and layers, without its weights."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import GenerationConfig

from tunefork.data.chat import Renderer, answer_ends
from tunefork.model.fingerprint import identify
from tunefork.model.fingerprint_tokenizer import rendering_sha256
from tunefork.model.identity import Identity
from tunefork.model.load import find, load_config, load_skeleton, load_tokenizer
from tunefork.recipe import DataSection, ModelSection
from tunefork.serve.prompts import Prompts


@dataclass(frozen=True)
class ServedBase:
    """Read once, then only looked at, from any thread."""

    name: str
    section: ModelSection
    identity: Identity
    tokenizer: Any
    rendering: str
    """Fingerprint of what conversations become."""
    skeleton: Any
    """The model on the meta device."""
    eos_ids: tuple[int, ...]
    """Tokens that end any text, by the model's own configuration."""

    @property
    def fingerprint(self) -> str:
        """What answers name as `system_fingerprint`."""
        return f"fp_{self.identity.weights_sha256[:12]}"

    @cached_property
    def vocab_size(self) -> int:
        """Ids below it are tokens."""
        return int(self.skeleton.get_input_embeddings().num_embeddings)

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token: no text has fewer tokens than its length by this."""
        added = self.tokenizer.added_tokens_decoder.values()
        tokens = [*self.tokenizer.get_vocab(), *(token.content for token in added)]
        return max(map(len, tokens))

    @cached_property
    def prompts(self) -> Prompts:
        """How the base itself, which no recipe trained, is asked."""
        return self.prompts_of(DataSection(train="-"))

    def prompts_of(self, data: DataSection) -> Prompts:
        """How a model trained with the recipe section `data` is asked. Raises DataError."""
        renderer = Renderer(self.tokenizer, data)
        sample = renderer.sample
        ends = answer_ends(self.tokenizer, [sample] if sample else [])
        return Prompts(renderer, tuple(dict.fromkeys([*self.eos_ids, *ends])))


def load_base(section: ModelSection, name: str) -> ServedBase:
    """Read all of it; the weights too, once, for their fingerprint. Raises ModelError."""
    tokenizer = load_tokenizer(section)
    tokenizer(["a", "b"])  # settles padding and truncation, which threads would else race to set
    return ServedBase(
        name=name,
        section=section,
        identity=identify(section),
        tokenizer=tokenizer,
        rendering=rendering_sha256(tokenizer),
        skeleton=load_skeleton(section),
        eos_ids=_eos_ids(section, tokenizer),
    )


def _eos_ids(section: ModelSection, tokenizer: Any) -> tuple[int, ...]:
    source = find(section)
    try:
        config = GenerationConfig.from_pretrained(
            source.location, revision=source.revision or "main"
        )
    except OSError:  # it has none of its own
        config = load_config(section)
    configured = getattr(config, "eos_token_id", None)
    ids = list(configured) if isinstance(configured, list | tuple) else [configured]
    return tuple(dict.fromkeys(i for i in [*ids, tokenizer.eos_token_id] if i is not None))
