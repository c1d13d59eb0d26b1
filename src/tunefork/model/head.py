"""The way from token ids to logits, only where they are wanted.

transformers computes logits for every position (or a suffix). Training and evaluation want them at
the supervised positions: 4 of 90 tokens when the answer is a label. Most architectures end in
`logits = W h`; those that do more (Gemma 2 soft-caps, Cohere and Granite scale) keep their own
forward pass, in which the hidden states are gathered just before the head. Which kind a model is
is not read from a list of names but measured once, on a few tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunefork.data.pack import Segments
from tunefork.errors import ModelError
from tunefork.model.packed_attention import in_place_of_mask
from tunefork.model.packed_probe import takes_segments
from tunefork.model.tokens import TokenHead


@dataclass(frozen=True, slots=True)
class Head:
    """A model's output head: D features in, V logits out."""

    linear: nn.Linear | TokenHead
    is_plain: bool
    """The model's logits are exactly `linear(hidden)`, and the head has no bias."""
    takes_segments: bool = False
    """Training passes may give `segments` in place of a mask: on a GPU, where it was measured
    (`packed_probe.py`)."""

    @property
    def weight(self) -> Tensor:
        """(V, D)"""
        return self.linear.weight

    def hidden(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Any = None,
        segments: Segments | None = None,
    ) -> Tensor:
        """Hidden states before the head for (R, T) ids: (R, T, D).

        The default mask is causal within each run of ascending positions. `segments` say the same
        without any mask; only where `takes_segments`.
        """
        output = model.base_model(
            input_ids=input_ids,
            position_ids=position_ids,
            **_mask(attention_mask, segments, input_ids.shape[1]),
            use_cache=False,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def logits(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        position_ids: Tensor,
        at: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        segments: Segments | None = None,
    ) -> Tensor:
        """Logits at the S positions (rows, columns) of (R, T) ids: (S, V)."""

        def gather(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            return (inputs[0][at][None],)

        handle = self.linear.register_forward_pre_hook(gather)
        try:
            logits: Tensor = model(
                input_ids=input_ids,
                position_ids=position_ids,
                **_mask(attention_mask, segments, input_ids.shape[1]),
                use_cache=False,
            ).logits
        finally:
            handle.remove()
        return logits[0]


def _mask(attention_mask: Any, segments: Segments | None, length: int) -> dict[str, Any]:
    if segments is None:
        return {"attention_mask": attention_mask}
    return in_place_of_mask(segments, length)


@torch.no_grad()
def find_head(model: PreTrainedModel) -> Head:
    """The head of a transformers causal LM; raises ModelError where it has no linear one."""
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear | TokenHead):
        raise ModelError(
            f"{type(model).__name__}: its output head is {type(linear).__name__}; tunefork trains "
            "causal language models whose head is a linear layer"
        )
    ids = torch.arange(4, device=linear.weight.device)[None]
    head = Head(linear, is_plain=False)
    was_training = model.training
    model.eval()
    # Layers that are compiled would be compiled for these few tokens too.
    with torch.compiler.set_stance("force_eager"):
        own = model(input_ids=ids, position_ids=ids, use_cache=False).logits
        plain = linear(head.hidden(model, ids, ids))
    model.train(was_training)
    return Head(
        linear,
        is_plain=linear.bias is None and torch.equal(own, plain),
        takes_segments=ids.is_cuda and takes_segments(model),
    )
