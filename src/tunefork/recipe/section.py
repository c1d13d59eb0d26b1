"""What every section of a recipe is made of: the closed base class, and the words of its fields."""

from enum import StrEnum
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator


class Method(StrEnum):
    """The three branches of the fork."""

    LORA = "lora"
    QLORA = "qlora"
    FULL = "full"


Format = Literal[
    "auto", "messages", "prompt_completion", "classification", "text", "alpaca", "sharegpt"
]
Metric = Literal["loss", "perplexity", "accuracy", "macro_f1", "exact_match", "rouge_l"]
Scaling = Literal["standard", "rslora"]
Targets = Literal["all-linear", "attention", "mlp"] | tuple[str, ...]
Schedule = Literal["cosine", "linear", "constant"]

Checkpointing = Literal["none", "selective", "full", "offload"]
"""How activations are kept for the backward pass (`train.activation_checkpointing`)."""
CheckpointingChoice = Literal["auto", "none", "selective", "full", "offload"]
"""The same, or left to the plan."""
Compile = Literal["auto", "always", "never"]
"""Whether layers are compiled (`train.compile`)."""

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Section(BaseModel):
    """Frozen, closed, and documented by the docstrings of its fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic would read YAML's `yes` as 1."""
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, bool) and field.annotation is not bool:
            words = [repr(one) for one in get_args(field.annotation) if isinstance(one, str)]
            instead = f"; should be {', '.join(words[:-1])} or {words[-1]}" if words else ""
            raise ValueError(
                f"must not be {value} (which is also what YAML reads yes, no, on, off as){instead}"
            )
        return value
