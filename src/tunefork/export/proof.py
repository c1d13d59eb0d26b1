"""The proof gate: does what leaves the house still answer as what was trained?

The reference is the adapter on its base, quantised as it was in training. It and the export read
the same real prompts, and at each position the export's distribution q over the next token is
held against the reference's p: KL(p || q) in nats, and whether both have the same likeliest token.
Both compute in fp32, so that a difference is the export's own and not that of bf16 arithmetic.

Why the thresholds are where they are: measured on SmolLM2-135M (benchmarks/export_clients.py), a
merge that only rounds to bf16 costs 0.0015 nats a token, 0.05 at the worst, and 1.3 % of the
likeliest tokens; Q8_0 on top of it 0.0037, 0.06 and 4.4 %; a QLoRA adapter merged into the original
base, which it was not trained on, 0.60, 5.9 and 34 %. An adapter of three steps, rounded to bf16 by
the same merge, cost 0.0061, 0.08 and 8.0 %: within a user's turn many tokens are about equally
likely. The limits lie between; KL is the sharp one. A mean of 0.02 nats moves perplexity by about
2 %.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from tunefork.data.loader import load_data
from tunefork.evaluate.evaluate import evaluate
from tunefork.evaluate.metrics import METRICS
from tunefork.evaluate.statistics import estimate
from tunefork.export.prompts import Prompts
from tunefork.recipe import Recipe, Section
from tunefork.registry.run import write_atomically

PROOF = "proof.json"
_BROKEN = 1e6
"""Nats that a position counts whose logits are not finite."""


class Gate(Section):
    """How far an export may be from what was trained."""

    max_mean_kl: Annotated[float, Field(ge=0.0)] = 0.02
    """Nats a token, mean over all positions."""
    max_kl: Annotated[float, Field(ge=0.0)] = 2.0
    """Nats at the worst position. Wide: one rare token may move far where nothing is wrong; a
    broken token or position goes far beyond."""
    min_top1: Annotated[float, Field(ge=0.0, le=1.0)] = 0.85
    """Share of positions with the same likeliest token. Ties within rounding flip some."""
    num_tokens: Annotated[int, Field(ge=1)] = 2048
    """Tokens read. The reference's logits are kept meanwhile: 4 bytes times the vocabulary each."""


class Agreement(Section):
    """The export's next-token distributions beside the reference's."""

    mean_kl: float
    max_kl: float
    top1: float
    num_tokens: int


class TaskMetric(Section):
    """One metric of the recipe, on the same evaluation examples."""

    name: str
    reference: float
    exported: float
    margin: float
    """The recipe's `compare.margin`: a loss of less does not matter."""

    @property
    def is_worse(self) -> bool:
        """Whether the export lost more than the margin."""
        lost = self.reference - self.exported
        return (lost if METRICS[self.name].higher_is_better else -lost) > self.margin


class Proof(Section):
    """What proof.json holds."""

    passed: bool
    reasons: tuple[str, ...]
    """Why it did not pass."""
    reference: str
    exported: str
    prompts: str
    agreement: Agreement
    alternatives: dict[str, Agreement] = Field(default_factory=dict)
    """Other ways of making this artefact, which were measured too and lost more."""
    task: tuple[TaskMetric, ...] = ()
    gate: Gate


@torch.inference_mode()
def read_logits(model: Any, sequences: list[list[int]]) -> list[Tensor]:
    """Each sequence's logits, (T, V) fp32 on the CPU."""
    device = model.get_input_embeddings().weight.device
    return [
        model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0].float().cpu()
        for ids in sequences
    ]


def agreement(reference: list[Tensor], exported: list[Tensor]) -> Agreement:
    """KL(reference || exported) and top-1 agreement over all positions of (T, V) logits."""
    kls, same = [], []
    for p_tv, q_tv in zip(reference, exported, strict=True):
        width = min(p_tv.shape[1], q_tv.shape[1])  # a vocabulary may be padded in an export
        log_p = torch.log_softmax(p_tv[:, :width], dim=-1)
        log_q = torch.log_softmax(q_tv[:, :width], dim=-1)
        kls.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0.0))
        same.append(p_tv.argmax(-1) == q_tv.argmax(-1))
    kl = torch.cat(kls).nan_to_num(nan=_BROKEN, posinf=_BROKEN)
    top1 = torch.cat(same)
    return Agreement(
        mean_kl=float(kl.mean()),
        max_kl=float(kl.max()),
        top1=float(top1.double().mean()),
        num_tokens=len(kl),
    )


def measure_task(model: Any, tokenizer: Any, recipe: Recipe) -> dict[str, float]:
    """Each metric of `recipe` on its evaluation examples; general forgetting is left out."""
    section = recipe.evaluate.model_copy(update={"forgetting": None})
    recipe = recipe.model_copy(update={"evaluate": section})
    evaluation = evaluate(model, tokenizer, load_data(recipe, tokenizer), recipe)
    return {m: estimate(m, [evaluation.columns], samples=200).value for m in evaluation.metrics}


class Reference:
    """What an export is held against: the reference's logits and metrics, not its weights."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Prompts,
        gate: Gate,
        *,
        name: str,
        recipe: Recipe | None = None,
    ) -> None:
        self.gate, self.name, self.prompts = gate, name, prompts
        self._tokenizer, self._recipe = tokenizer, recipe
        self._logits = read_logits(model, prompts.sequences)
        self._task = {} if recipe is None else measure_task(model, tokenizer, recipe)

    def compare(self, model: Any) -> Agreement:
        """How near `model` is."""
        return agreement(self._logits, read_logits(model, self.prompts.sequences))

    def prove(
        self, model: Any, *, name: str, alternatives: dict[str, Agreement] | None = None
    ) -> Proof:
        """The verdict on `model`, which was read back from the artefact `name`."""
        found, gate = self.compare(model), self.gate
        task = self._task_of(model)
        checks: list[tuple[bool, str]] = [
            (
                found.mean_kl > gate.max_mean_kl,
                f"mean KL {found.mean_kl:.3g} nats a token is above {gate.max_mean_kl:g}",
            ),
            (found.max_kl > gate.max_kl, f"largest KL {found.max_kl:.3g} is above {gate.max_kl:g}"),
            (
                found.top1 < gate.min_top1,
                f"top-1 agreement {found.top1:.4f} is below {gate.min_top1:g}",
            ),
            *(
                (
                    t.is_worse,
                    f"{t.name} went from {t.reference:.4g} to {t.exported:.4g}, more than "
                    f"the margin of {t.margin:g}",
                )
                for t in task
            ),
        ]
        reasons = tuple(reason for failed, reason in checks if failed)
        return Proof(
            passed=not reasons,
            reasons=reasons,
            reference=self.name,
            exported=name,
            prompts=self.prompts.source,
            agreement=found,
            alternatives=alternatives or {},
            task=task,
            gate=gate,
        )

    def _task_of(self, model: Any) -> tuple[TaskMetric, ...]:
        if self._recipe is None:
            return ()
        margin = self._recipe.compare.margin
        exported = measure_task(model, self._tokenizer, self._recipe)
        return tuple(
            TaskMetric(name=name, reference=value, exported=exported[name], margin=margin)
            for name, value in self._task.items()
        )


def write_proof(folder: Path, proof: Proof) -> None:
    """Write proof.json into the artefact's folder."""
    write_atomically(folder / PROOF, proof.model_dump_json(indent=2) + "\n")
