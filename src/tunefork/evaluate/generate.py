"""Greedy answers, and how near they come to the reference: exact match and ROUGE-L."""

from collections.abc import Collection, Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from tunefork.data.chat import answer_ends
from tunefork.data.example import Encoded
from tunefork.evaluate.statistics import Columns


@torch.inference_mode()
def generation_columns(
    model: PreTrainedModel,
    tokenizer: Any,
    examples: Sequence[Encoded],
    *,
    max_new_tokens: int,
    max_tokens: int,
    pad_id: int,
) -> Columns:
    """Columns `exact_match` (0 or 1, outer white space aside) and `rouge_l` (F1, 0 to 1).

    ROUGE-L as in Lin 2004, by the package rouge-score, without stemming. The last answer of each
    example is the reference.
    """
    answers = greedy_answers(
        model,
        tokenizer,
        examples,
        max_new_tokens=max_new_tokens,
        max_tokens=max_tokens,
        pad_id=pad_id,
    )
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    references = [(example.answer or "").strip() for example in examples]
    pairs = list(zip(references, answers, strict=True))
    return {
        "exact_match": np.array([float(reference == answer) for reference, answer in pairs]),
        "rouge_l": np.array([scorer.score(r, a)["rougeL"].fmeasure for r, a in pairs]),
    }


def greedy_answers(
    model: PreTrainedModel,
    tokenizer: Any,
    examples: Sequence[Encoded],
    *,
    max_new_tokens: int,
    max_tokens: int,
    pad_id: int,
) -> list[str]:
    """What the model answers to each example's prompt, stripped."""
    was_training = model.training
    model.eval()
    stops = stop_ids(model, tokenizer, examples)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stops,
        pad_token_id=pad_id,
    )
    answers = [""] * len(examples)
    by_length = sorted(range(len(examples)), key=lambda at: -examples[at].prompt_length)
    while by_length:
        longest = examples[by_length[0]].prompt_length
        batch = by_length[: max(1, max_tokens // (longest + max_new_tokens))]
        by_length = by_length[len(batch) :]
        input_ids = torch.full((len(batch), longest), pad_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, at in enumerate(batch):
            prompt = examples[at].input_ids[: examples[at].prompt_length]
            input_ids[row, longest - len(prompt) :] = torch.from_numpy(prompt).long()
            attention_mask[row, longest - len(prompt) :] = 1
        output = _generate(model, config, input_ids, attention_mask)
        said = [until_stop(row, stops) for row in output[:, longest:].tolist()]
        texts = tokenizer.batch_decode(said, skip_special_tokens=True)
        for at, text in zip(batch, texts, strict=True):
            answers[at] = text.strip()
    model.train(was_training)
    return answers


def _generate(
    model: PreTrainedModel, config: GenerationConfig, input_ids: Tensor, attention_mask: Tensor
) -> Tensor:
    """`model.generate` by `config` alone.

    transformers fills what a given config leaves open from the model's own (a repetition penalty,
    beams), and then the answers are no longer greedy.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        output: Tensor = model.generate(
            input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            generation_config=config,
        )
    finally:
        model.generation_config = own
    return output


def stop_ids(model: PreTrainedModel, tokenizer: Any, examples: Sequence[Encoded]) -> list[int]:
    """Ids that end an answer: the model's and tokenizer's, and what closes those of `examples`."""
    configured = model.generation_config.eos_token_id
    ids = list(configured) if isinstance(configured, list | tuple) else [configured]
    ids += [tokenizer.eos_token_id, *answer_ends(tokenizer, examples[:8])]
    return [token for token in dict.fromkeys(ids) if token is not None]


def until_stop(ids: Sequence[int], stops: Collection[int]) -> list[int]:
    """`ids` before the first of `stops`: a closing token that is not special would be decoded."""
    return list(takewhile(lambda token: token not in stops, ids))
