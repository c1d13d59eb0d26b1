"""What stands between a sick step and the weights: not finite, or far above what came before.

A loss or gradient that is not finite stops the run before its update, so the weights are those of
the last good step. Which rows did it is looked for by running the step's rows one by one: most
often it is one row, or all of them because the weights have gone bad.

A gradient that is zero everywhere, at a loss that is not, comes of code that loses it; a run would
go through all of its steps and learn nothing. So it would where other modules are trained beside
the adapter and have theirs, which is looked at once.

A loss spike is finite, and ordinary training has outliers: a hard row, a small batch. The watch is
robust, so that neither the outliers nor the fall of the loss hide the next one: how far the loss is
above the median of the last `_WINDOW`, in units of their spread (median absolute deviation, made a
standard deviation by 1.4826; Iglewicz and Hoaglin 1993, "How to Detect and Handle Outliers"). Their
3.5 suits a table looked at once; over 10,000 steps it would cry wolf. At `_THRESHOLD` = 10, noise
with exponential tails (Laplace) crosses in 2 steps of 100,000, Gaussian noise never; a spike worth
stopping for (a loss that doubles, while steps differ by a twentieth) is at 20.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from transformers import PreTrainedModel

from tunefork.data.example import Encoded
from tunefork.data.pack import pack
from tunefork.errors import ModelError
from tunefork.model.head import find_head
from tunefork.train.loss import loss_sum

_WINDOW = 64
_FEWEST = 16
"""Losses before a spike can be told from the start of training."""
_THRESHOLD = 10.0
_LEAST_SPREAD = 0.02
"""Of the median: where losses hardly differ (one repeated batch), a hair is no spike."""
LEAST_LOSS = 2.0**-10
"""From which on some gradient is left of it: the probability is 1 to fp32's last digit at 1e-7. The
same number to a GPU, in fp32."""
_MOST_ROWS = 64
"""Rows that are looked at one by one after a step that is not finite."""
_MOST_NAMED = 16


class SpikeWatch:
    """Tells a loss spike from noise. Its memory is the last losses, the state of a checkpoint."""

    def __init__(self, losses: Sequence[float] = ()) -> None:
        self.losses: deque[float] = deque(losses, maxlen=_WINDOW)

    def found(self, loss: float) -> str | None:
        """In words, where `loss` is a spike; remembers `loss`."""
        known = list(self.losses)
        self.losses.append(loss)
        if len(known) < _FEWEST:
            return None
        middle = median(known)
        spread = 1.4826 * median(abs(value - middle) for value in known)
        score = (loss - middle) / max(spread, _LEAST_SPREAD * abs(middle), 1e-12)
        if score <= _THRESHOLD:
            return None
        return (
            f"the loss is {loss:.4g}, {score:.0f} robust standard deviations above the "
            f"{middle:.4g} of the {len(known)} steps before"
        )


def lost_gradient(loss: float, norm: float) -> str | None:
    """In words, where nothing of a step's loss has reached what is trained."""
    if norm != 0.0 or not loss > LEAST_LOSS:
        return None
    return (
        f"the loss is {loss:.4g} and the gradient of everything that is trained is zero, so that "
        "nothing is learnt"
    )


def lost_by_adapter(model: PreTrainedModel, loss: float) -> str | None:
    """In words, where nothing of it has reached A and B, whatever else is trained."""
    gradients = [
        parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name.endswith((".lora_a", ".lora_b"))
    ]
    has_some = any(g is not None and bool(g.any()) for g in gradients)
    if has_some or not gradients or not loss > LEAST_LOSS:
        return None
    return (
        f"the loss is {loss:.4g} and the gradient of the adapter's matrices is zero, so that they "
        "learn nothing"
    )


LOST_GRADIENT_ADVICE = (
    "Where the loss has jumped to that, lower train.learning_rate. Else it is a fault of "
    "tunefork's or of torch.compile's, not of the data: set train.compile: never, and report it "
    "with the run's run.json"
)


@torch.no_grad()
def check_weights(model: PreTrainedModel, name: str) -> None:
    """Raise ModelError for a weight that is not finite: every loss would be NaN."""
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        # An infinite buffer is a mask or a bound; a weight has no business with either.
        sick = tensor.isnan() if not isinstance(tensor, torch.nn.Parameter) else ~tensor.isfinite()
        if tensor.is_floating_point() and bool(sick.any()):
            raise ModelError(
                f"model.id: {name}: {key} has {int(sick.sum())} of {tensor.numel()} values that "
                "are not finite; the file is damaged, or was saved after training diverged. Give "
                "another model or revision"
            )


@dataclass(frozen=True, slots=True)
class Blame:
    """What a step that is not finite comes from."""

    said: str
    """In words, rows by file:line."""
    is_weights: bool
    """Every row of several is sick: such weights are worth no checkpoint."""


def blame(
    model: PreTrainedModel, examples: Sequence[Encoded], *, pad_id: int, backward: bool = True
) -> Blame:
    """Which of a step's rows are not finite by themselves.

    Forward passes of one row each, of at most `_MOST_ROWS`; where all are finite, backward passes
    too if `backward`. Gradients are dropped. Call it with the weights of before the step.
    """
    chosen = examples[:_MOST_ROWS]
    sick = [e for e in chosen if not _is_finite(model, e, pad_id, backward=False)]
    what = "loss"
    if not sick and backward:
        sick = [e for e in chosen if not _is_finite(model, e, pad_id, backward=True)]
        what = "gradient"
    if len(sick) == len(chosen) > 1:
        said = (
            f"every row of the step has a {what} that is not finite, so the weights are bad "
            f"rather than the data. The step's rows: {_names(examples)}"
        )
        return Blame(said, is_weights=True)
    if sick:
        return Blame(f"rows whose own {what} is not finite: {_names(sick)}", is_weights=False)
    said = f"no row by itself is not finite. The step's rows: {_names(examples)}"
    return Blame(said, is_weights=False)


def _is_finite(model: PreTrainedModel, example: Encoded, pad_id: int, *, backward: bool) -> bool:
    """Of `example` alone: whether its loss is, and with `backward` its gradients too."""
    [batch] = pack([example], max_tokens=len(example.input_ids), packing=False, pad_id=pad_id)
    if not len(batch.supervised[0]):
        return True
    model.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(backward):
        loss = loss_sum(model, find_head(model), batch.to(model.device))
    if not backward:
        return math.isfinite(float(loss))
    loss.backward()  # type: ignore[no-untyped-call]
    finite = all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    model.zero_grad(set_to_none=True)
    return finite


def _names(examples: Sequence[Encoded]) -> str:
    named = ", ".join(example.source for example in examples[:_MOST_NAMED])
    more = len(examples) - _MOST_NAMED
    return f"{named} and {more} more" if more > 0 else named
