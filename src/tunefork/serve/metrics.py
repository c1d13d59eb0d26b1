"""Prometheus metrics by adapter and tenant; names and units as Prometheus recommends.

Labels are names of the store and of tenants, never what a client sent, and of adapters only so many
are told apart: each label value is a time series for good.
"""

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from tunefork.serve.engine import EngineState
from tunefork.serve.heat import SHARE, Heat

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)
OTHER = "other"


class Metrics:
    """Of one server."""

    def __init__(self, base: str, most_adapters: int, places: int) -> None:
        self.registry = CollectorRegistry()
        self._base, self._most_adapters = base, most_adapters
        self.heat = Heat()
        self.places = places
        """Answers that the engine computes at the same time."""
        self._adapters: set[str] = set()
        both = ("tenant", "model")
        self._requests = Counter(
            "tunefork_requests", "Requests that ended.", (*both, "status"), registry=self.registry
        )
        self._prompt_tokens = Counter(
            "tunefork_prompt_tokens", "Tokens of prompts.", both, registry=self.registry
        )
        self._completion_tokens = Counter(
            "tunefork_completion_tokens", "Tokens of answers.", both, registry=self.registry
        )
        self._refused = Counter(
            "tunefork_refused",
            "Requests refused for the queue or a quota.",
            ("tenant", "reason"),
            registry=self.registry,
        )
        self._first_token = Histogram(
            "tunefork_time_to_first_token_seconds",
            "From the rendered request to its first token, waiting included.",
            ("model",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._per_token = Histogram(
            "tunefork_time_per_token_seconds",
            "Mean over an answer's tokens after the first.",
            ("model",),
            buckets=_TOKEN_SECONDS,
            registry=self.registry,
        )
        self._total = Histogram(
            "tunefork_request_seconds",
            "From the rendered request to its end.",
            ("model",),
            buckets=(*_SECONDS, 120.0, 300.0, 600.0),
            registry=self.registry,
        )

    def ended(
        self,
        tenant: str,
        model: str,
        status: str,
        *,
        prompt_tokens: int,
        completion_tokens: int,
        choices: int,
        first_token_s: float | None,
        total_s: float,
    ) -> None:
        """A request is over."""
        model = self._label(model)
        self._requests.labels(tenant, model, status).inc()
        self._prompt_tokens.labels(tenant, model).inc(prompt_tokens)
        self._completion_tokens.labels(tenant, model).inc(completion_tokens)
        self._total.labels(model).observe(total_s)
        if first_token_s is not None:
            self._first_token.labels(model).observe(first_token_s)
            decoding_s, tokens = total_s - first_token_s, completion_tokens / choices
            if tokens > 1:
                self._per_token.labels(model).observe(decoding_s / (tokens - 1))
            if model not in (self._base, OTHER):
                self.heat.add(model, choices * decoding_s, time.monotonic())

    def refused(self, tenant: str, reason: str) -> None:
        """A request got 429."""
        self._refused.labels(tenant, reason).inc()

    def watch(self, now: "Callable[[], Snapshot]") -> None:
        """Tell the gauges of `now()` too, whenever metrics are read."""
        self.registry.register(_Gauges(now, self))

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)

    def _label(self, model: str) -> str:
        """An adapter's name, whose versions count together, or the base's."""
        name = model.partition(":")[0]
        if name != self._base and name not in self._adapters:
            if len(self._adapters) >= self._most_adapters:
                return OTHER
            self._adapters.add(name)
        return name


Snapshot = tuple[EngineState, dict[str, int], int, int, dict[str, bool]]
"""The engine's state, answers that wait by tenant, those that run, versions that are held, and
whether each merged version's replica answers."""


class _Gauges:
    """Reads what is true now."""

    def __init__(self, now: Callable[[], Snapshot], metrics: Metrics) -> None:
        self._now, self._metrics = now, metrics

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        state, waiting, running, held, replicas = self._now()
        queue = GaugeMetricFamily(
            "tunefork_queue_answers", "Answers waiting in the gateway.", labels=["tenant"]
        )
        for tenant, count in waiting.items():
            queue.add_metric([tenant], count)
        yield queue
        up = GaugeMetricFamily(
            "tunefork_replica_up", "Whether a merged version's replica answers.", labels=["model"]
        )
        for version, is_up in replicas.items():
            up.add_metric([version], int(is_up))
        yield up
        yield from self._hot()
        for name, help_text, value in (
            ("running_answers", "Answers handed to the engine.", running),
            ("adapters_held", "Versions kept from removal.", held),
            ("engine_up", "Whether the engine answers.", int(state.healthy)),
            ("engine_running", "Answers computed by the engine.", state.running),
            ("engine_waiting", "Answers waiting in the engine.", state.waiting),
            ("engine_slots", "Adapters that fit on the device.", state.slots),
            ("engine_resident_adapters", "Adapters on the device.", len(state.resident)),
            ("engine_host_adapters", "Adapters in host memory.", len(state.in_host_memory)),
            ("engine_free_cache_tokens", "Cache left, in tokens.", state.free_cache_tokens),
            ("engine_total_cache_tokens", "Cache, in tokens.", state.total_cache_tokens),
        ):
            yield GaugeMetricFamily(f"tunefork_{name}", help_text, value=value)
        for name, help_text, total in (
            ("adapter_loads", "Adapters loaded onto the device.", state.loads),
            ("adapter_evictions", "Adapters that made room for others.", state.evictions),
        ):
            yield CounterMetricFamily(f"tunefork_{name}", help_text, value=total)
        loading = CounterMetricFamily(
            "tunefork_adapter_load_seconds", "Spent on loading adapters.", labels=["stage"]
        )
        for stage, seconds in state.load_seconds.items():
            loading.add_metric([stage], seconds)
        yield loading

    def _hot(self) -> Iterator[Metric]:
        mean = GaugeMetricFamily(
            "tunefork_adapter_mean_running",
            "Answers of the adapter running at any time of the last minutes.",
            labels=["model"],
        )
        pays = GaugeMetricFamily(
            "tunefork_merge_would_pay",
            "1: a merged replica of the adapter (--merge) would be busy enough to pay.",
            labels=["model"],
        )
        for model, running in self._metrics.heat.mean_running(time.monotonic()).items():
            mean.add_metric([model], running)
            pays.add_metric([model], int(running >= SHARE * self._metrics.places))
        yield mean
        yield pays
