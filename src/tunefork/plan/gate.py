"""Before a run: what it will take on this machine, and a refusal of what cannot fit.

After it: what it took goes to the measurements that correct the next plan.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from tunefork.data.example import Encoded
from tunefork.errors import BadInputError
from tunefork.plan.catalogue import load_catalogue
from tunefork.plan.device import here
from tunefork.plan.measured import Measurement, remember
from tunefork.plan.plan import plan_examples
from tunefork.plan.schema import Plan
from tunefork.plan.shape import PlanError
from tunefork.recipe import Method, Recipe

_TELLING_STEPS = 10
"""A shorter run's time is mostly warming up, and says nothing of the next one's."""


class DoesNotFitError(BadInputError):
    """A run would take more memory than the machine has."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What one run was predicted to take."""

    tensor_bytes: float
    process_bytes: float
    step_s: float
    raw_process_bytes: float
    """Without corrections by earlier runs. This is remembered, or they would feed themselves."""
    raw_step_s: float
    fit: str
    """Id of the packaged fit behind it."""


def plan_here(
    recipe: Recipe,
    methods: Sequence[Method],
    examples: Sequence[Encoded],
    *,
    has_details: bool = True,
) -> Plan:
    """The recipe on this machine, with the prepared training examples."""
    catalogue = load_catalogue()
    return plan_examples(
        recipe,
        examples,
        target=here(catalogue, recipe.compare.usd_per_hour),
        methods=methods,
        catalogue=catalogue,
        has_details=has_details,
    )


def refuse_what_cannot_fit(
    recipe: Recipe,
    methods: Sequence[Method],
    examples: Sequence[Encoded],
    say: Callable[[str], None],
) -> None:
    """Raise DoesNotFitError where even the low end of a prediction is over this machine's memory.

    Where only its high end is, `say` gets a warning.
    """
    try:
        plan = plan_here(recipe, methods, examples, has_details=False)
        if not all(method.fits for method in plan.methods.values()):
            plan = plan_here(recipe, methods, examples)  # what would fit, too
    except PlanError as error:
        say(f"warning: {error}; whether it fits in memory will show")
        return
    for name, method in plan.methods.items():
        if method.fits:
            continue
        peak, memory = method.peak_process_bytes, plan.machine.memory_bytes
        low, mid, high, has = (n / 2**30 for n in (peak.low, peak.mid, peak.high, memory))
        found = (
            f"method {name}: is predicted to take {mid:.1f} GiB ({low:.1f} to {high:.1f}); this "
            f"machine has {has:.1f} GiB. It would fit with {method.next_option}"
        )
        if method.may_fit:
            say(f"warning: {found}")
            continue
        others = f", leave {name} out of compare.methods," if len(methods) > 1 else ""
        raise DoesNotFitError(f"{found}{others} or run it all the same with --ignore-plan")


def predict(recipe: Recipe, method: Method, examples: Sequence[Encoded]) -> Prediction | None:
    """What a run of one method is predicted to take on this machine; None where nothing can be.

    Whatever stands in the way of a plan was said when the recipe was checked; a run needs none.
    """
    try:
        catalogue = load_catalogue()
        target = here(catalogue, recipe.compare.usd_per_hour)
        plan = plan_examples(
            recipe,
            examples,
            target=target,
            methods=(method,),
            catalogue=catalogue,
            has_details=False,
        )
    except BadInputError:
        return None
    planned, trust = plan.methods[method.value], target.trust
    return Prediction(
        tensor_bytes=planned.peak_tensor_bytes.mid,
        process_bytes=planned.peak_process_bytes.mid,
        step_s=planned.step_s,
        raw_process_bytes=trust.process_factor.undone(planned.peak_process_bytes.mid),
        raw_step_s=trust.time_factor.undone(planned.step_s),
        fit=target.fit.id,
    )


def learn(
    prediction: Prediction,
    *,
    device: str,
    case: str,
    num_steps: int,
    train_s: float,
    process_bytes: int,
    say: Callable[[str], None],
) -> None:
    """Remember a finished run; where that cannot be written, `say` it and go on."""
    if num_steps < _TELLING_STEPS:
        return
    measurement = Measurement(
        device=device,
        case=case,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        predicted_step_s=prediction.raw_step_s,
        measured_step_s=train_s / num_steps,
        predicted_process_bytes=prediction.raw_process_bytes,
        measured_process_bytes=process_bytes,
        fit=prediction.fit,
    )
    try:
        remember(measurement)
    except OSError as error:
        say(f"warning: predicted against measured could not be kept ({error})")
