"""A figure with its interval, and the closed, documented models that reports' files are made of."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0)]
Quantity = Annotated[float, Field(ge=0.0)]
Proportion = Annotated[float, Field(ge=0.0, le=1.0)]


class Part(BaseModel):
    """Frozen, closed, and documented by the docstrings of its fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class Estimate(Part):
    """A figure with its 95 % interval: over evaluation examples (by the bootstrap, wide enough for
    few; by Wilson for accuracy and exact match), and from three seeds on over seeds too."""

    value: float
    """The figure on all evaluation examples."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
