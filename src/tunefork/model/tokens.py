"""Tokens added to a model: new rows of its embedding and head, and training those rows alone.

New rows start as the mean of the old ones, around which transformers draws them too (Hewitt 2021,
https://nlp.stanford.edu/~johnhew/vocab-expansion.html); without the draw no seed is needed, and
what `model.add_tokens` makes of a base is always the same.

`TokenEmbedding` and `TokenHead` train some rows of a frozen weight, as the PEFT library's
`trainable_token_indices`: their rows (N, D) in fp32 stand in for the base's. Legend: V vocabulary,
D features, N trained rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunefork.errors import ModelError
from tunefork.model.whole import is_tied, path_of


def added_ids(tokenizer: Any, tokens: Sequence[str]) -> tuple[int, ...]:
    """Ids of `tokens` in the tokenizer that they were added to."""
    return tuple(tokenizer.convert_tokens_to_ids(list(tokens)))


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Add `tokens` to `tokenizer`; raises ModelError for one that it has."""
    known = tokenizer.get_vocab()
    for token in tokens:
        if token in known:
            raise ModelError(
                f"model.add_tokens: {token!r} is in the model's vocabulary already; leave it out"
            )
    tokenizer.add_tokens(list(tokens))


@torch.no_grad()
def grow(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Make room for the new tokens `ids`, whose rows become the mean of the rows before them."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, nn.Embedding)
    was_tied, old = is_tied(model), min(min(ids), embedding.num_embeddings)
    if max(ids) >= embedding.num_embeddings:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding.weight.is_meta:
        return
    at = torch.tensor(ids, device=embedding.weight.device)
    for module in [embedding] if was_tied else [embedding, head]:
        weight = module.weight
        weight[at] = weight[:old].float().mean(0).to(weight.dtype)
        if getattr(module, "bias", None) is not None:
            module.bias[at] = module.bias[:old].float().mean().to(weight.dtype)


class TokenEmbedding(nn.Module):
    """A frozen embedding, some of whose rows are trained: ids (...) -> (..., D)."""

    def __init__(self, base: nn.Embedding, ids: Sequence[int]) -> None:
        super().__init__()
        self.base = base
        ids_n = torch.tensor(ids, device=base.weight.device)
        self.rows = nn.Parameter(base.weight.detach()[ids_n].float())
        self.ids = list(ids)
        self.register_buffer("at", ids_n, persistent=False)
        self.at: Tensor
        slots_v = torch.full((base.num_embeddings,), -1, device=ids_n.device)
        slots_v[ids_n] = torch.arange(len(ids), device=ids_n.device)
        self.register_buffer("slots", slots_v, persistent=False)
        self.slots: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        """As the base's, trained rows in place of its own."""
        slots = self.slots[ids]
        base: Tensor = self.base(ids)
        new = F.embedding(slots.clamp_min(0), self.rows.to(base.dtype))
        factor = getattr(self.base, "embed_scale", None)  # Gemma's embeddings have one
        if factor is not None:
            new = new * factor.to(new.dtype) if isinstance(factor, Tensor) else new * factor
        return torch.where((slots >= 0)[..., None], new, base)

    @property
    def weight(self) -> Tensor:
        """(V, D) in the base's dtype, with a gradient to the trained rows."""
        return _with_rows(self.base.weight, self.at, self.rows)


class TokenHead(nn.Module):
    """A frozen output head, some of whose rows are trained: (..., D) -> (..., V).

    Its whole weight is put together for each pass, and gets a gradient that is thrown away but for
    the trained rows: 2 V D elements for the time of the loss, as in the PEFT library.
    """

    def __init__(self, base: nn.Linear, ids: Sequence[int], rows: nn.Parameter | None) -> None:
        super().__init__()
        self.base, self.ids, self.is_shared = base, list(ids), rows is not None
        self.register_buffer("at", torch.tensor(ids, device=base.weight.device), persistent=False)
        self.at: Tensor
        own = base.weight.detach()[self.at].float()
        self.rows = nn.Parameter(own) if rows is None else rows

    @property
    def weight(self) -> Tensor:
        """(V, D) in the base's dtype, with a gradient to the trained rows."""
        return _with_rows(self.base.weight, self.at, self.rows)

    @property
    def bias(self) -> Tensor | None:
        """(V,) or none."""
        return self.base.bias

    def forward(self, hidden_d: Tensor) -> Tensor:
        """Logits."""
        return F.linear(hidden_d, self.weight, self.bias)


def _with_rows(weight_vd: Tensor, at_n: Tensor, rows_nd: Tensor) -> Tensor:
    return weight_vd.detach().index_copy(0, at_n, rows_nd.to(weight_vd.dtype))


def train_rows(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Train the rows `ids` of the embedding and the head alone; tied, they stay one row each."""
    was_tied = is_tied(model)
    embedding = token_embedding(model, ids)
    token_head(model, ids, embedding.rows if was_tied else None)


def token_embedding(model: PreTrainedModel, ids: Sequence[int]) -> TokenEmbedding:
    """Put a `TokenEmbedding` in the place of `model`'s embedding."""
    base = model.get_input_embeddings()
    if type(base) is not nn.Embedding and not hasattr(base, "embed_scale"):
        raise ModelError(
            f"{type(model).__name__}: its embedding is a {type(base).__name__}, of which single "
            "rows cannot be trained; name it in lora.modules_to_save"
        )
    assert isinstance(base, nn.Embedding)
    module = TokenEmbedding(base, ids)
    _put(model, base, module)
    return module


def token_head(
    model: PreTrainedModel, ids: Sequence[int], rows: nn.Parameter | None = None
) -> TokenHead:
    """Put a `TokenHead` in the place of `model`'s head; `rows` are those it shares."""
    base = model.get_output_embeddings()
    assert isinstance(base, nn.Linear)
    module = TokenHead(base, ids, rows)
    _put(model, base, module)
    return module


def _put(model: PreTrainedModel, old: nn.Module, new: nn.Module) -> None:
    parent, _, name = path_of(model, old).rpartition(".")
    setattr(model.get_submodule(parent), name, new)
