"""How each of many adapters ended: the schema of `many.json`, written anew whenever one ends."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field

from tunefork.page.estimate import Count, Estimate, Part, Quantity
from tunefork.recipe import Metric
from tunefork.registry.run import read_json

RESULT = "many.json"


class EntryResult(Part):
    """How one adapter ended."""

    name: str
    where: str
    """file:line of its entry."""
    status: Literal["ok", "failed", "interrupted"]
    folder: str
    """Its run folder, within that of all."""
    num_steps: Count = 0
    tokens: Count = 0
    train_s: Quantity = 0.0
    """Its share, by tokens, of the time of the passes it took part in."""
    metrics: dict[Metric, Estimate] = Field(default_factory=dict)
    published: str | None = None
    """NAME:vN in the store."""
    error: str | None = None
    """Why it failed, or why it could not be published."""


class ManyResult(Part):
    """`many.json`: written anew whenever an adapter ends."""

    schema_version: Literal[1] = 1
    tunefork_version: str
    created: str
    """ISO 8601, UTC."""
    entries: tuple[EntryResult, ...]
    """In the order of the file; those that have not ended yet are missing."""

    @property
    def has_failed(self) -> bool:
        """Whether an adapter failed, or could not be published."""
        return any(entry.error is not None for entry in self.entries)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read `path`. Raises RunFolderError."""
        return read_json(cls, path, "is not of this version of tunefork's train-many; remove it")
