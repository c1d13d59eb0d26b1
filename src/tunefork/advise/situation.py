"""What the advice is asked about: a few facts, all optional, from a file, flags or questions.

`MISSING` says what the advice does without each of them, so that an answer names what it rests on.
`CONTRADICTIONS` are the combinations that no advice could serve.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from tunefork.errors import BadInputError
from tunefork.plan.reading import read_fields, validate

Task = Literal[
    "classification",
    "extraction",
    "summarization",
    "translation",
    "question_answering",
    "chat",
    "style",
    "code",
    "reasoning",
    "tool_use",
    "facts",
    "domain_language",
    "distillation",
    "other",
]
Change = Literal["style", "skill", "behaviour", "domain_language", "facts"]
TASKS: tuple[Task, ...] = get_args(Task)
CHANGES: tuple[Change, ...] = get_args(Change)


class SituationError(BadInputError):
    """A situation is wrong or contradicts itself."""


_SCALES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_COUNT = re.compile(r"^\s*(\d+(?:[._]\d+)*(?:e\d+)?)\s*([kmbt]?)\s*$", re.IGNORECASE)


def _count(value: Any) -> Any:
    """`50k`, `8B`, `1e6` as a number; everything else is left to the schema to refuse."""
    if isinstance(value, bool):
        raise ValueError(f"must be a number, not {value}")
    if isinstance(value, str) and (found := _COUNT.match(value)):
        value = float(found[1].replace("_", "")) * _SCALES[found[2].lower()]
    is_whole = isinstance(value, float) and value.is_integer()
    return int(value) if is_whole else value


_SIZE = re.compile(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)([bm])(?![A-Za-z0-9])", re.IGNORECASE)
Count = Annotated[int, Field(ge=0), BeforeValidator(_count)]
Amount = Annotated[float, Field(ge=0), BeforeValidator(_count)]


class Situation(BaseModel):
    """What is known. Numbers may be written `50000`, `50k`, `8B` or `1e6`."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    model: Annotated[str, Field(min_length=1)] | None = None
    """A hub id, a model folder, a packaged model's name, a size (`8B`), or a recipe file (`.yaml`),
    whose model and data then go into the recipe that comes out."""

    model_params: Annotated[float, Field(gt=0), BeforeValidator(_count)] | None = None
    """Parameters of the model, for example 8e9."""

    task: Task | None = None
    """What the model is to do. `facts`: know things; `domain_language`: read and write a
    specialised field's language, learnt from plain text; `distillation`: imitate a larger model."""

    examples: Count | None = None
    """Training examples at hand; of one customer where there are several."""

    tokens: Count | None = None
    """Tokens of those examples, prompts included."""

    tenants: Annotated[int, Field(ge=1), BeforeValidator(_count)] | None = None
    """Customers, products or other parties that each need a behaviour of their own: adapters."""

    change: Change | None = None
    """What must change about the model: how it says things, what it can do, how it behaves at
    heart, which language it is at home in, or which facts it knows."""

    quality_point_value_usd: Amount | None = None
    """What one more percentage point of quality is worth, US dollars."""

    distribute: bool | None = None
    """Whether the resulting weights are handed to others."""

    gpus: tuple[str, ...] | None = None
    """GPUs at hand, by the catalogue's ids; an id given n times is n of them."""

    budget_usd: Amount | None = None
    """What the training may cost, US dollars."""

    deadline_hours: Annotated[float, Field(gt=0)] | None = None
    """How long the training may take."""

    data_may_leave: bool | None = None
    """Whether the training data may be given to a managed service or a rented machine."""

    @field_validator("gpus", mode="before")
    @classmethod
    def _gpus_may_be_a_string(cls, value: Any) -> Any:
        names = re.split(r"[,\s]+", value.strip()) if isinstance(value, str) else value
        return names or None


MISSING: dict[str, str] = {
    "model": "the recipe names a placeholder; the shape is that of a Llama of the same size",
    "model_params": "a model of 8B parameters is assumed; memory, time and cost follow from it",
    "task": "lengths and the supervised share of each example are those of a chat",
    "examples": "the amount of data is guessed; rank, time and cost follow from it",
    "tokens": "tokens are guessed from the number of examples and the task's usual length",
    "tenants": "one adapter or model is assumed; several customers would speak for LoRA",
    "change": "a skill is assumed; deeper changes want a higher rank or full fine-tuning",
    "quality_point_value_usd": "a last point of quality is taken to be worth little; a high value "
    "would speak for full fine-tuning",
    "distribute": "the result is taken to stay in the house, so an adapter need not be merged",
    "gpus": "memory is not a limit: the cheapest machine of the catalogue that fits is named",
    "budget_usd": "no answer is refused for its cost",
    "deadline_hours": "no answer is refused for its time; machines that end within two weeks are "
    "preferred",
    "data_may_leave": "managed services are priced but not recommended",
}
"""Key -> what the advice does without it."""

CONTRADICTIONS: tuple[tuple[Callable[[Situation], bool], str], ...] = (
    (
        lambda s: s.budget_usd == 0 and s.deadline_hours is not None and not s.gpus,
        "budget_usd: 0 with deadline_hours: {deadline_hours:g}: nothing can be trained by then for "
        "nothing; give a budget, or name GPUs of your own in gpus",
    ),
    (
        lambda s: s.tokens is not None and s.examples is not None and s.tokens < s.examples,
        "tokens: {tokens} is less than examples: {examples}; every example has at least one token: "
        "give the tokens of all examples together",
    ),
    (
        lambda s: s.model_params is not None and s.model_params < 1e5,
        "model_params: {model_params:g} is no language model's size; write 8e9 or 8B for 8 billion",
    ),
)
"""When, and what is said; fields of the situation stand in braces."""


def load_situation(file: Path | None, given: dict[str, Any]) -> Situation:
    """The situation of `file` with the keys of `given` over it; those that are None do not count.

    Raises SituationError naming file or flag, field, what was found and what is allowed.
    """
    fields: Any = {}
    where = "situation"
    if file is not None:
        where = str(file)
        try:
            fields = read_fields(file, "a situation file (YAML or JSON)")
        except BadInputError as error:
            raise SituationError(str(error)) from error
    if isinstance(fields, dict):
        fields = fields | {key: value for key, value in given.items() if value is not None}
    try:
        situation = validate(Situation, {} if fields is None else fields, where)
    except BadInputError as error:
        raise SituationError(str(error)) from error
    check(situation, where)
    return situation


def check(situation: Situation, where: str = "situation") -> None:
    """Raise SituationError where the situation contradicts itself."""
    said = [
        message.format(**situation.model_dump())
        for applies, message in CONTRADICTIONS
        if applies(situation)
    ]
    named = None if situation.model is None else size_in(situation.model)
    params = situation.model_params
    if named and params and not 1 / 1.5 < named / params < 1.5:
        said.append(
            f"model_params: {params:g} is not the size in model: {situation.model} ({named:g}); "
            "give one of them"
        )
    if said:
        raise SituationError("\n".join(f"{where}: {line}" for line in said))


def size_in(name: str) -> float | None:
    """The number of parameters that a model's name states: 8e9 of `Llama-3.1-8B`, or None."""
    sizes = [float(number) * _SCALES[scale.lower()] for number, scale in _SIZE.findall(name)]
    return max(sizes, default=None)  # of Qwen2.5-7B-Instruct-1M, whose 1M are tokens of context


def missing(situation: Situation) -> dict[str, str]:
    """Keys that are not given -> what the advice does without them."""
    absent = [key for key in MISSING if getattr(situation, key) is None]
    if situation.model is not None and "model_params" in absent:
        absent.remove("model_params")
    return {key: MISSING[key] for key in absent}
