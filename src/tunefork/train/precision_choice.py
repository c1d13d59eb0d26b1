"""What `train.precision: auto` came to in a run, and the figures that it was decided by.

Part of a run's record, so nothing heavy is imported here. `precision.py` decides, `agreement.py`
measures.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class BatchAgreement(_Part):
    """int8's pass over one batch beside bf16's, over the same A and B."""

    num_examples: int
    loss_bf16: float
    loss_int8: float
    cosines: dict[str, dict[str, float]]
    """Layer kind (`q_proj`; `all` for all of them as one vector) -> `lora_a`, `lora_b` -> cosine of
    the two gradients. A has none in the first batch, where B is zero."""

    @property
    def loss_difference(self) -> float:
        """Of int8's loss from bf16's, in units of bf16's."""
        return self.loss_int8 / self.loss_bf16 - 1


class Agreement(_Part):
    """Two batches through both forms of the base: with B = 0, and with a random B."""

    batches: tuple[BatchAgreement, ...]
    agrees: bool
    why: str
    """What agrees, or which figure is beyond which bound."""
    seconds: float


class PrecisionChoice(_Part):
    """What `auto` came to."""

    precision: Literal["bf16", "int8"]
    why: str
    agreement: Agreement | None = None
    """None: nothing was measured, for the reason that `why` gives."""
