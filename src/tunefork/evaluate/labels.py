"""Classification by likelihood: the label whose answer is likeliest, so every answer is a label.

The definition is `score_apart`: each prompt with each label's answer, a sequence of its own. The
way taken is `score_together`: one row a prompt, with all answers behind it as a tree
(`answers.py`), so the prompt is computed once. It depends on how an architecture treats a hand-made
mask, so it is compared with the definition on a few examples first, and left where it differs or
fails.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from tunefork.data.example import Encoded
from tunefork.errors import DataError
from tunefork.evaluate.answers import ROOT, AnswerTree, grow
from tunefork.evaluate.loss import loss_columns
from tunefork.evaluate.statistics import Columns
from tunefork.kernels.cross_entropy import linear_cross_entropy
from tunefork.model.head import Head, find_head

_PROBES = 2
_AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 0.25}
"""Most nats by which the two ways may differ, in the mean over labels and probes, for rounding in
each dtype. An ignored mask moves every label by nats; rounding moves an unlikely one of a single
probe by 0.5, as bf16 itself does (SmolLM2, labels of 3 tokens, 32 nats), and the mean by 0.06."""

Answers = Sequence[Sequence[int]]
"""Token ids of each label's answer: all that is supervised, the end of turn included."""


def check_answers(
    examples: Sequence[Encoded], labels: Sequence[str], answers: Answers
) -> NDArray[np.int64]:
    """Each example's label, an id into `labels`.

    Raises DataError where an example's own answer is not, token for token, what `answers` has for
    its label.
    """
    gold = np.array([labels.index(example.label or "") for example in examples])
    for example, label in zip(examples, gold, strict=True):
        own = example.input_ids[example.supervised].tolist()
        if own != list(answers[label]):
            raise DataError(
                f"{example.source}: its answer is cut by data.max_length, or tokenised otherwise "
                "than the same label in other rows, so labels cannot be scored alike; raise "
                "data.max_length, or use data.template: plain"
            )
    return gold


@torch.inference_mode()
def label_columns(
    model: PreTrainedModel,
    examples: Sequence[Encoded],
    labels: Sequence[str],
    answers: Answers,
    *,
    max_tokens: int,
    by_token: bool,
    pad_id: int,
) -> Columns:
    """Columns `predicted` and `gold`, ids into `labels`, and those of `loss_columns`.

    The right answer is one of those scored, so the loss costs no pass of its own. `by_token` ranks
    by the mean over an answer's tokens instead of their sum. Raises DataError as `check_answers`
    does.
    """
    was_training = model.training
    model.eval()
    gold = check_answers(examples, labels, answers)
    probes = list(examples[:_PROBES])
    agree = _agree(model, probes, answers, max_tokens=max_tokens, pad_id=pad_id)
    score = score_together if agree else score_apart
    scores = score(model, examples, answers, max_tokens=max_tokens, pad_id=pad_id)
    model.train(was_training)
    lengths = np.array([len(answer) for answer in answers])
    ranked = scores / lengths if by_token else scores
    return {
        "predicted": ranked.argmax(-1),
        "gold": gold,
        "loss_sum": -scores[np.arange(len(examples)), gold],
        "tokens": lengths[gold],
    }


def _agree(
    model: PreTrainedModel,
    probes: Sequence[Encoded],
    answers: Answers,
    *,
    max_tokens: int,
    pad_id: int,
) -> bool:
    """Whether this architecture takes the hand-made mask, and heeds it."""
    apart = score_apart(model, probes, answers, max_tokens=max_tokens, pad_id=pad_id)
    try:
        together = score_together(model, probes, answers, max_tokens=max_tokens, pad_id=pad_id)
    except torch.OutOfMemoryError:  # a RuntimeError, but no word on the mask
        raise
    except (AttributeError, RuntimeError, TypeError, ValueError):
        # Such is the refusal of a mask that is not (R, T): ALiBi (BLOOM, Falcon) unpacks its shape
        # to count positions. What is really broken has failed above.
        return False
    return float(np.abs(together - apart).mean()) < _AGREEMENT.get(model.dtype, 0.25)


def score_apart(
    model: PreTrainedModel,
    examples: Sequence[Encoded],
    answers: Answers,
    *,
    max_tokens: int,
    pad_id: int,
) -> NDArray[np.float64]:
    """Log-likelihood of each label's answer, (examples, labels): the definition."""
    sequences = [
        replace(
            example,
            input_ids=np.concatenate(
                [example.input_ids[: example.prompt_length], np.array(answer, dtype=np.int32)]
            ),
            supervised=np.arange(example.prompt_length + len(answer)) >= example.prompt_length,
        )
        for example in examples
        for answer in answers
    ]
    longest = max(len(sequence.input_ids) for sequence in sequences)
    columns = loss_columns(
        model, sequences, max_tokens=max(max_tokens, longest), packing=False, pad_id=pad_id
    )
    scores: NDArray[np.float64] = -columns["loss_sum"].reshape(len(examples), len(answers))
    return scores


def score_together(
    model: PreTrainedModel,
    examples: Sequence[Encoded],
    answers: Answers,
    *,
    max_tokens: int,
    pad_id: int,
) -> NDArray[np.float64]:
    """The same from one row a prompt."""
    head, tree = find_head(model), grow(answers)
    by_length = sorted(range(len(examples)), key=lambda at: -examples[at].prompt_length)
    scores = np.zeros((len(examples), len(answers)))
    while by_length:
        width = examples[by_length[0]].prompt_length + len(tree.tokens)
        batch = by_length[: max(1, max_tokens // width)]
        by_length = by_length[len(batch) :]
        prompts = [examples[at].input_ids[: examples[at].prompt_length] for at in batch]
        edges = -_edge_losses(model, head, prompts, tree, pad_id)
        for label, path in enumerate(tree.paths):
            scores[batch, label] = edges[:, list(path)].sum(-1)
    return scores


def _edge_losses(
    model: PreTrainedModel,
    head: Head,
    prompts: Sequence[NDArray[np.int32]],
    tree: AnswerTree,
    pad_id: int,
) -> NDArray[np.float64]:
    """-log p of each edge after each prompt: (prompts, E). Prompts lie to the right, nodes last."""
    num_nodes = len(tree.tokens)
    longest = max(len(prompt) for prompt in prompts)
    width = longest + num_nodes
    input_ids = torch.full((len(prompts), width), pad_id)
    position_ids = torch.zeros((len(prompts), width), dtype=torch.int64)
    sees = torch.ones(width, width, dtype=torch.bool).tril().repeat(len(prompts), 1, 1)
    sees[:, longest:, longest:] = torch.from_numpy(tree.sees)
    input_ids[:, longest:] = torch.tensor(tree.tokens, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        start = longest - len(prompt)
        input_ids[row, start:longest] = torch.from_numpy(prompt).long()
        position_ids[row, start:longest] = torch.arange(len(prompt))
        position_ids[row, longest:] = len(prompt) - 1 + torch.from_numpy(tree.depths)
        sees[row, start:, :start] = False  # padding is seen by padding only
    columns = torch.tensor([longest - 1 if n == ROOT else longest + n for n, _ in tree.edges])
    targets = torch.tensor([token for _, token in tree.edges]).repeat(len(prompts))
    at = (
        torch.arange(len(prompts)).repeat_interleave(len(columns)).to(model.device),
        columns.repeat(len(prompts)).to(model.device),
    )
    inputs = (input_ids.to(model.device), position_ids.to(model.device))
    mask = _as_attention_mask(model, sees, position_ids)
    losses = _losses(model, head, inputs, mask, at, targets.to(model.device))
    return losses.view(len(prompts), -1).cpu().double().numpy()


def _losses(
    model: PreTrainedModel,
    head: Head,
    inputs: tuple[Tensor, Tensor],
    mask: Any,
    at: tuple[Tensor, Tensor],
    targets: Tensor,
) -> Tensor:
    if head.is_plain:
        hidden = head.hidden(model, *inputs, attention_mask=mask)
        return linear_cross_entropy(hidden[at], head.weight, targets)
    logits = head.logits(model, *inputs, at, attention_mask=mask).float()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def _as_attention_mask(model: PreTrainedModel, sees: Tensor, position_ids: Tensor) -> Any:
    """What transformers takes for a hand-made mask: (R, 1, T, T), one for each kind of layer."""
    config = model.config
    window = getattr(config, "sliding_window", None)
    whole = _in_dtype(model, sees)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return whole
    near = position_ids[:, :, None] - position_ids[:, None, :] < window
    windowed = _in_dtype(model, sees & near)
    kinds = set(getattr(config, "layer_types", None) or ())
    if len(kinds) > 1:
        return {"full_attention": whole, "sliding_attention": windowed}
    return whole if kinds == {"full_attention"} else windowed


def _in_dtype(model: PreTrainedModel, sees: Tensor) -> Tensor:
    """Boolean, or additive for the one attention that knows no other."""
    mask = sees[:, None].to(model.device)
    if model.config._attn_implementation != "eager":
        return mask
    additive = torch.zeros_like(mask, dtype=model.dtype)
    return additive.masked_fill(~mask, torch.finfo(model.dtype).min)
