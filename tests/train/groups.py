"""Groups of eight unlike adapters over one tiny base, and each of them trained alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from tests.tiny import VOCABULARY
from tests.train.test_loss import examples
from tunefork.data.split import steps
from tunefork.model.add_bank import add_bank
from tunefork.model.bank import BankAdapter
from tunefork.model.build import build
from tunefork.recipe import LoraSection, Method
from tunefork.train.adamw_lora import LoraAdamW
from tunefork.train.loop import StepRecord, train
from tunefork.train.member import Member, MemberEvent, MemberStep
from tunefork.train.optim import learning_rate_at
from tunefork.train.state import Progress, State, capture
from tunefork.train.together import Group, GroupSettings

LORAS = (
    LoraSection(rank=1),
    LoraSection(rank=2, targets="attention", alpha=4.0),
    LoraSection(rank=4, scaling="rslora"),
    LoraSection(rank=8, targets=("q_proj", "up_proj")),
    LoraSection(rank=16, targets="mlp"),
    LoraSection(rank=24),
    LoraSection(rank=32, alpha=64.0),
    LoraSection(rank=64, targets=("k_proj", "down_proj")),
)
RATES = (3e-3, 1e-2, 1e-3, 2e-3, 3e-3, 1e-3, 5e-4, 2e-3)
DECAYS = (0.0, 0.1)
SCHEDULES = ("cosine", "linear", "constant")


def base() -> PreTrainedModel:
    """Wide enough for rank 64, fp32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def member(at: int, num_steps: int, **changes: Any) -> Member:
    """The member number `at`: its own data, order, length, rate, decay and schedule."""
    own = examples(tuple(5 + (7 * i + 3 * at) % 20 for i in range(12)), seed=at)
    count = num_steps - (at % 3) * (num_steps // 10)
    fields: dict[str, Any] = {
        "name": f"member-{at}",
        "lora": LORAS[at],
        "seed": 10 + at,
        "examples": own,
        "steps": steps(len(own), batch_size=2 + at % 3, epochs=1000, max_steps=count, seed=at),
        "learning_rates": [
            learning_rate_at(
                step,
                num_steps=count,
                peak=RATES[at],
                schedule=SCHEDULES[at % 3],
                warmup_share=0.1,
            )
            for step in range(count)
        ],
        "betas": (0.9, 0.999 if at % 2 else 0.95),
        "weight_decay": DECAYS[at % 2],
        "max_grad_norm": {3: 0.05, 2: None}.get(at, 1.0),
    }
    return Member(**(fields | changes))


def members(num_steps: int, which: Sequence[int] = range(8)) -> list[Member]:
    """Some of the eight."""
    return [member(at, num_steps) for at in which]


SETTINGS = GroupSettings(micro_batch_tokens=256)


def group_of(
    chosen: Sequence[Member],
    settings: GroupSettings = SETTINGS,
    *,
    starts: dict[str, State] | None = None,
    announced: Sequence[LoraSection] = (),
) -> Group:
    """A group of them over a new base."""
    bank = add_bank(base(), [BankAdapter(m.lora, m.seed) for m in chosen], announced=announced)
    return Group(bank, chosen, settings, starts=starts)


def run(group: Group, num_steps: int = 10**6) -> list[MemberEvent]:
    """So many steps, or to the end."""
    events: list[MemberEvent] = []
    while group.is_at_work and num_steps:
        events += group.step()
        num_steps -= 1
    return events


def records(events: Sequence[MemberEvent], name: str) -> list[StepRecord]:
    """Those of one member."""
    return [e.record for e in events if isinstance(e, MemberStep) and e.name == name]


def weights(state: State) -> dict[str, Tensor]:
    """A and B by name."""
    return {name: t for name, t in state.tensors.items() if name.startswith("weights/")}


@dataclass(frozen=True, slots=True)
class Alone:
    """What a run alone left."""

    state: State
    records: list[StepRecord]


def alone(one: Member, stop_after: int | None = None) -> Alone:
    """`one` trained by the ordinary loop over a base of its own."""
    model = base()
    build(model, Method.LORA, one.lora, seed=one.seed)
    optimizer = LoraAdamW(
        [p for p in model.parameters() if p.requires_grad],
        betas=one.betas,
        weight_decay=one.weight_decay,
    )
    told: list[StepRecord] = []
    train(
        model,
        one.examples,
        one.steps,
        optimizer,
        learning_rates=one.learning_rates,
        micro_batch_tokens=256,
        packing=True,
        pad_id=0,
        max_grad_norm=one.max_grad_norm,
        seed=one.seed,
        on_step=told.append,
        stop_after=stop_after,
    )
    return Alone(capture(model, optimizer, Progress(step=told[-1].step)), told)


def distance(actual: State, expected: State) -> float:
    """The largest relative difference of a weight."""
    ours, theirs = weights(actual), weights(expected)
    assert list(ours) == list(theirs)
    return max(float((ours[n] - theirs[n]).norm() / theirs[n].norm()) for n in theirs)
