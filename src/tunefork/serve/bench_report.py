"""The figures of a load: throughput, and times at p50, p95 and p99."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from tunefork.serve.bench import Load, Outcome

_BUSY_SHARE = 0.7
"""Of one core; from here on the generator may have slowed what it measured."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Seconds that half, 95 % and 99 % of the requests did not exceed."""

    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """None where there are none."""
        if not values:
            return None
        return cls(*(quantile(values, share) for share in (0.50, 0.95, 0.99)))


@dataclass(frozen=True, slots=True)
class BenchReport:
    """Of one run of `tunefork bench-serve`; `--json` prints it."""

    server: str
    load: Load
    answered: int
    errors: dict[str, int]
    """Kind -> requests."""
    requests_by_model: dict[str, int]
    """Of those that were answered."""
    wall_s: float
    output_tokens: int
    output_tokens_per_s: float
    """Of answered requests, over the whole run with its beginning and end."""
    total_tokens_per_s: float
    """Prompts too."""
    requests_per_s: float
    first_token_s: Spread | None
    """From the sending of a request, connecting included, to the first token."""
    token_s: Spread | None
    """Time per token of a request after its first."""
    request_s: Spread | None
    generator_cpu: float
    """Share of one core that the generator used."""
    generator_late_s: Spread | None
    """By how much its event loop was late."""

    @property
    def generator_was_busy(self) -> bool:
        """Whether the figures may be the generator's own."""
        return self.generator_cpu > _BUSY_SHARE

    def fields(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def report(server: str, load: Load, outcome: Outcome) -> BenchReport:
    """The figures of `outcome`."""
    good = [sample for sample in outcome.samples if sample.error is None]
    tokens = sum(sample.tokens for sample in good)
    prompts = sum(sample.prompt_tokens for sample in good)
    errors = Counter[str]()
    first: dict[str, str] = {}
    """Of each kind; the server's words may name numbers of the request's own."""
    for sample in outcome.samples:
        if sample.error is not None:
            kind = sample.error.partition(":")[0]
            errors[first.setdefault(kind, sample.error)] += 1
    several = [sample for sample in good if sample.tokens > 1]
    return BenchReport(
        server=server,
        load=load,
        answered=len(good),
        errors=dict(errors),
        requests_by_model=dict(Counter(sample.model for sample in good)),
        wall_s=outcome.wall_s,
        output_tokens=tokens,
        output_tokens_per_s=tokens / outcome.wall_s,
        total_tokens_per_s=(tokens + prompts) / outcome.wall_s,
        requests_per_s=len(good) / outcome.wall_s,
        first_token_s=Spread.of([sample.first - sample.sent for sample in good]),
        token_s=Spread.of([(s.last - s.first) / (s.tokens - 1) for s in several]),
        request_s=Spread.of([sample.last - sample.sent for sample in good]),
        generator_cpu=outcome.own_cpu_s / outcome.wall_s,
        generator_late_s=Spread.of(outcome.lateness_s),
    )


def quantile(values: Sequence[float], share: float) -> float:
    """The value that `share` of `values` do not exceed, between neighbours by their distance."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)
