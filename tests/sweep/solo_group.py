"""A group that is none: each member has a model of its own and takes its steps as `train` does.

It is what the fleet is tested over, and what a real group must come to.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from tunefork.errors import DivergedError
from tunefork.model.head import find_head
from tunefork.sweep.group import Member, Stepped
from tunefork.train.accumulate import Accumulator
from tunefork.train.clip import clip_factor
from tunefork.train.kernels import attention_kernels
from tunefork.train.loop import StepRecord
from tunefork.train.method import load_for_training, make_optimizer, plan_steps
from tunefork.train.optim import learning_rate_at
from tunefork.train.runner import Runner
from tunefork.train.state import Optimizer, Progress, State, capture, restore


@dataclass(slots=True)
class _Alone:
    member: Member
    model: PreTrainedModel
    optimizer: Optimizer
    cut: Accumulator
    done: Progress


class SoloGroup:
    """Takes one step of each member a pass."""

    def __init__(self, fails_at: dict[str, int] | None = None) -> None:
        self.alone: dict[str, _Alone] = {}
        self.fails_at = fails_at or {}
        self.together: list[tuple[str, ...]] = []
        """Who took part in each pass."""

    def add(self, member: Member, start: State | None) -> None:
        recipe, seed = member.recipe, member.recipe.train.seed
        model = load_for_training(
            recipe, recipe.method, dtype=torch.float32, device=torch.device("cpu"), seed=seed
        )
        model.train()
        optimizer = make_optimizer(model, recipe, recipe.method, seed=seed)
        limit = recipe.train.micro_batch_tokens
        cut = Accumulator(Runner(model, find_head(model)), limit, recipe.train.packing, 0)
        torch.manual_seed(seed)
        done = Progress() if start is None else restore(start, model, optimizer)
        self.alone[member.name] = _Alone(member, model, optimizer, cut, done)

    def remove(self, name: str) -> None:
        self.alone.pop(name, None)

    def step(self) -> Sequence[Stepped]:
        self.together.append(tuple(self.alone))
        with attention_kernels():
            return [self._step(name, alone) for name, alone in list(self.alone.items())]

    def _step(self, name: str, alone: _Alone) -> Stepped:
        member, number = alone.member, alone.done.step + 1
        train = member.recipe.train
        if self.fails_at.get(name) == number:
            del self.alone[name]
            return Stepped(name, None, DivergedError(f"step {number}: the loss is nan"))
        steps = plan_steps(member.recipe, len(member.examples), seed=train.seed)
        chosen = [member.examples[i] for i in steps[number - 1]]
        total, supervised = alone.cut.gradient(chosen, number, [])
        norm, loss = alone.optimizer.gradient_norm(), float(total)
        rate = learning_rate_at(
            number - 1,
            num_steps=len(steps),
            peak=member.learning_rate,
            schedule=train.schedule,
            warmup_share=train.warmup_share,
        )
        alone.optimizer.step(rate, clip_factor(norm, train.max_grad_norm))
        alone.done = replace(
            alone.done,
            step=number,
            tokens=alone.done.tokens + sum(len(example.input_ids) for example in chosen),
            supervised_tokens=alone.done.supervised_tokens + supervised,
            losses=(*alone.done.losses, loss),
        )
        return Stepped(name, StepRecord(number, alone.done.tokens, loss, rate, norm))

    def sync(self) -> Sequence[Stepped]:
        return ()

    def order(self) -> list[str]:
        return list(self.alone)

    def state(self, name: str) -> State:
        alone = self.alone[name]
        return capture(alone.model, alone.optimizer, alone.done)

    @contextmanager
    def only(self, name: str) -> Iterator[PreTrainedModel]:
        model = self.alone[name].model
        was_training = model.training
        model.eval()
        yield model
        model.train(was_training)
