"""GPUs, their rates and prices, and what managed services ask: catalogue.yaml, and the user's own.

Every row names its source and its date. A file given by the user (`--catalogue FILE`, or
`catalogue.yaml` in TUNEFORK_HOME) adds rows, or replaces fields of rows with the same id. The files
are written in the units of data sheets; `Gpu` has bytes, seconds and operations.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date as Date
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tunefork.errors import BadInputError, nearest
from tunefork.home import home
from tunefork.plan.reading import read_fields, validate


class CatalogueError(BadInputError):
    """A catalogue file is wrong, or a GPU is not in it."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One kind of GPU."""

    id: str
    name: str
    memory_bytes: int
    """What a program can allocate, not what the box says, is a little less; see `usable_bytes`."""
    bf16_flops: float
    """Dense, a second."""
    int8_ops: float | None
    """Likewise; None where tunefork's int8 products were never timed."""
    bandwidth: float
    """Bytes a second of device memory."""
    link_bandwidth: float
    """Bytes a second between two of them, one direction."""
    usd_per_hour: float
    source: str
    """Of the rates."""
    date: str
    usable_bytes: int
    """What torch reports as the device's total memory, approximate."""
    price_source: str
    price_date: str


@dataclass(frozen=True, slots=True)
class Machine:
    """Some GPUs of one kind."""

    gpu: Gpu
    count: int


class _Row(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class GpuRow(_Row):
    """A GPU as a catalogue file writes it."""

    id: str = Field(min_length=1)
    name: str
    memory_gib: float = Field(gt=0)
    usable_gib: float = Field(gt=0)
    bf16_tflops: float = Field(gt=0)
    int8_tops: float | None = Field(gt=0)
    bandwidth_gb_s: float = Field(gt=0)
    link_gb_s: float = Field(gt=0)
    usd_per_hour: float = Field(ge=0)
    source: str = Field(min_length=1)
    date: Date
    price_source: str = Field(min_length=1)
    price_date: Date

    @model_validator(mode="after")
    def _usable_is_less(self) -> Self:
        if self.usable_gib > self.memory_gib:
            raise ValueError(
                f"usable_gib: {self.usable_gib:g} is more than memory_gib ({self.memory_gib:g})"
            )
        return self

    def gpu(self) -> Gpu:
        """The row in bytes, seconds and operations."""
        return Gpu(
            id=self.id,
            name=self.name,
            memory_bytes=round(self.memory_gib * 2**30),
            bf16_flops=self.bf16_tflops * 1e12,
            int8_ops=None if self.int8_tops is None else self.int8_tops * 1e12,
            bandwidth=self.bandwidth_gb_s * 1e9,
            link_bandwidth=self.link_gb_s * 1e9,
            usd_per_hour=self.usd_per_hour,
            source=self.source,
            date=self.date.isoformat(),
            usable_bytes=round(self.usable_gib * 2**30),
            price_source=self.price_source,
            price_date=self.price_date.isoformat(),
        )


class ManagedService(_Row):
    """A service that fine-tunes for a price per training token."""

    id: str = Field(min_length=1)
    name: str
    closed: bool
    """The service's own model, in place of yours; its weights cannot be had."""
    least_params: float | None = Field(ge=0)
    """Smallest model at this price; null where the service does not say."""
    most_params: float | None = Field(gt=0)
    methods: tuple[Literal["lora", "full", "undisclosed"], ...] = Field(min_length=1)
    usd_per_million_tokens: float = Field(ge=0)
    """Of each training token, prompts included, times the epochs."""
    self_serve_until: Date | None
    """No new jobs from this day on; null where no end is announced."""
    source: str = Field(min_length=1)
    date: Date

    def takes(self, params: float) -> bool:
        """Whether a model of `params` parameters is sold at this price."""
        if self.closed:  # it takes the place of yours, whatever its size
            return True
        return (self.least_params or 0) <= params <= (self.most_params or float("inf"))


class _File(_Row):
    """A catalogue file, its rows not yet merged."""

    gpus: list[dict[str, Any]] = []
    managed: list[dict[str, Any]] = []


class _Rows(_Row):
    """The merged rows."""

    gpus: list[GpuRow]
    managed: list[ManagedService]


@dataclass(frozen=True, slots=True)
class Offer:
    """What a managed service would ask for a piece of work."""

    service: ManagedService
    cost_usd: float
    is_open: bool
    """Whether it still takes new jobs on the day asked about."""


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Every GPU and service known, in the order of the files."""

    gpus: tuple[Gpu, ...]
    services: tuple[ManagedService, ...]

    def gpu(self, id: str) -> Gpu:
        """The GPU called `id`; raises CatalogueError naming the nearest and all there are."""
        for gpu in self.gpus:
            if gpu.id == id:
                return gpu
        ids = [gpu.id for gpu in self.gpus]
        raise CatalogueError(
            f"GPU {id!r} is not in the catalogue{nearest(id.lower(), ids)}; "
            f"there are {', '.join(ids)}; add others by --catalogue FILE"
        )

    def machine(self, ids: Sequence[str]) -> Machine:
        """The GPUs `ids` as one machine: an id given n times is n of them.

        Raises CatalogueError for an unknown GPU, none at all, or different kinds.
        """
        if not ids:
            raise CatalogueError("no GPU is named; give at least one, for example l40s")
        gpus = [self.gpu(id) for id in ids]
        kinds = list(dict.fromkeys(gpu.id for gpu in gpus))
        if len(kinds) > 1:
            raise CatalogueError(
                f"GPUs of different kinds ({', '.join(kinds)}) do not make one machine: all of a "
                f"run's GPUs are of one kind; name one of them, n times for n of it"
            )
        return Machine(gpus[0], len(gpus))

    def managed(self, params: float, tokens: float, today: Date | None = None) -> list[Offer]:
        """What each service that takes a model of `params` parameters asks, the cheapest first.

        `tokens` are all tokens trained on, epochs counted, prompts included.
        """
        day = today or Date.today()
        offers = [
            Offer(
                service,
                service.usd_per_million_tokens * tokens / 1e6,
                service.self_serve_until is None or day < service.self_serve_until,
            )
            for service in self.services
            if service.takes(params)
        ]
        return sorted(offers, key=lambda offer: offer.cost_usd)


def load_catalogue(extra: Path | None = None) -> Catalogue:
    """The packaged catalogue, then the one in the user's home if there is one, then `extra`.

    Raises CatalogueError naming file, row and field.
    """
    own = home() / "catalogue.yaml"
    files = [*([own] if own.is_file() else []), *([extra] if extra else [])]
    packaged = _packaged()
    rows = {"gpus": packaged.gpus, "managed": packaged.managed}
    try:
        for file in files:
            rows = _merged(rows, file)
    except BadInputError as error:
        raise CatalogueError(str(error)) from error
    known = validate(_Rows, rows, "catalogue.yaml")
    return Catalogue(tuple(row.gpu() for row in known.gpus), tuple(known.managed))


@cache
def _packaged() -> _File:
    """The rows of the packaged file, read once."""
    file = Path(__file__).with_name("catalogue.yaml")
    return validate(_File, read_fields(file, "a catalogue file"), str(file))


def _merged(rows: dict[str, list[dict[str, Any]]], file: Path) -> dict[str, list[dict[str, Any]]]:
    """`rows` with those of `file` added, or put over those of the same id."""
    given = validate(_File, read_fields(file, "a catalogue file"), str(file))
    for row in given.gpus:
        if "usd_per_hour" in row:
            row.setdefault("price_source", str(file))
            row.setdefault("price_date", Date.fromtimestamp(file.stat().st_mtime))
    return {
        "gpus": _by_id(rows["gpus"], given.gpus, GpuRow, f"{file}: gpus"),
        "managed": _by_id(rows["managed"], given.managed, ManagedService, f"{file}: managed"),
    }


def _by_id(
    rows: Iterable[dict[str, Any]],
    given: Iterable[dict[str, Any]],
    schema: type[GpuRow] | type[ManagedService],
    where: str,
) -> list[dict[str, Any]]:
    """`rows` and `given` merged; each row of `given` is checked here, where its file is known."""
    merged = {str(row["id"]): row for row in rows}
    for number, row in enumerate(given, start=1):
        if not isinstance(row.get("id"), str):
            raise CatalogueError(f"{where}, row {number}: id: is missing; every row needs one")
        whole = merged.get(row["id"], {}) | row
        validate(schema, whole, f"{where}, row {number} ({row['id']})")
        merged[row["id"]] = whole
    return list(merged.values())
