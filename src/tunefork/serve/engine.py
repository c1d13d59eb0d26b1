"""What answers requests: the embedded engine, or a vLLM server, behind one interface.

The gateway owns names, keys, tenants, quotas and the rendering of conversations; an engine gets
token ids and the adapter's folder in the store, and gives pieces of an answer. It knows nothing of
HTTP, and a client's text never reaches it as a name or a path.
"""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

FinishReason = Literal["stop", "length", "cancelled", "deadline"]


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """An adapter of the registry, as an engine loads it."""

    id: str
    """`name:vN` of the store: one id is one content, forever."""
    folder: Path
    """The version's folder in the store, PEFT's files."""
    rank: int
    """The largest among its layers."""
    bytes: int
    """Of its weights in the engine's dtype, for the tiers' accounts."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must match: any JSON object, a JSON schema, or a regular expression."""

    kind: Literal["json_object", "json_schema", "regex"]
    value: str = ""
    """The schema as JSON text, or the expression."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen, and when an answer ends. Already checked by the gateway."""

    max_tokens: int
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit."""
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    """Texts that end the answer and are no part of it."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the answer and are no part of its text."""
    ignore_eos: bool = False
    logprobs: int | None = None
    """How many likeliest tokens are told beside each chosen one; None: not even its own."""
    grammar: Grammar | None = None


@dataclass(slots=True)
class Meter:
    """What one answer came to, for the bill."""

    tokens: int = 0
    """That were computed, whether or not anybody has taken them. Event loop only. An engine that
    gives a piece for whatever it computes, as soon as it is asked for one, may leave it at 0."""


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One answer that is wanted. n answers to one prompt are n requests."""

    id: str
    """Unique within the server's life."""
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    adapter: ServedAdapter | None = None
    """None: the base as it is."""
    tenant: str = ""
    """Caches of prefixes are shared within a tenant and an adapter id only."""
    deadline: float | None = None
    """`time.monotonic()` after which nobody waits for it."""
    meter: Meter = field(default_factory=Meter)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """ln p of one token, and of the likeliest ones in its place."""

    token_id: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()
    """(token id, text, logprob), likeliest first."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The next part of an answer. Text is whole characters: what ends inside one waits."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    """Of the last piece only."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What the gateway may pass on; it refuses the rest before it is asked of an engine."""

    max_model_len: int
    """Most tokens of prompt and answer together."""
    max_logprobs: int
    grammars: frozenset[str] = frozenset()
    """Kinds of `Grammar`."""
    max_rank: int | None = None
    """Largest rank of an adapter; None: any."""
    sampling: frozenset[str] = frozenset()
    """Names of `Sampling`'s fields that are honoured."""
    max_requests: int = 64
    """Answers computed at the same time; the gateway's queue hands over no more."""
    most_pins: int | None = None
    """Adapters that may be pinned so that others still get in; None: any number."""
    adapter_kinds: frozenset[str] = frozenset()
    """Beyond plain LoRA on linear layers: `dora`, `modules_to_save`, `token_rows`."""


@dataclass(frozen=True, slots=True)
class EngineState:
    """Counters and gauges, for /metrics and /ready; the names are the metrics'."""

    healthy: bool
    why: str = ""
    """Where it is not: what is known of its end, for the log."""
    running: int = 0
    waiting: int = 0
    slots: int = 0
    """Adapters that can be computed with at the same time."""
    resident: tuple[str, ...] = ()
    """Ids in slots that take answers."""
    in_host_memory: tuple[str, ...] = ()
    loads: int = 0
    evictions: int = 0
    load_seconds: Mapping[str, float] = field(default_factory=dict)
    """Of all loads together, by stage."""
    free_cache_tokens: int = 0
    total_cache_tokens: int = 0


class Engine(Protocol):
    """Answers requests. All methods are called from one event loop, and none may block it."""

    capabilities: Capabilities

    async def start(self) -> None:
        """Load the base and get ready. Raises TuneforkError."""

    async def stop(self) -> None:
        """Cancel what runs and give back all memory; idempotent."""

    def generate(self, request: EngineRequest) -> AsyncIterator[Piece]:
        """The answer, piece by piece, ending with one that has a finish reason.

        Closing the iterator (`aclose`, a cancelled task) cancels the request and frees what it
        held, at the latest before the engine's next step. Raises EngineBusyError where no more
        fits into the queue, BadInputError where the request cannot be honoured (a schema that no
        grammar can be made of), EngineError where it failed (others go on), and EngineDeadError
        where the engine as a whole did.
        """

    async def prefetch(self, adapter: ServedAdapter) -> None:
        """Bring `adapter` nearer while its request waits in the gateway's queue."""

    async def forget(self, adapter_id: str) -> None:
        """Drop it from every tier once no request uses it."""

    async def pin(self, adapter: ServedAdapter, pinned: bool) -> None:
        """Keep it in a slot, or no longer."""

    def state(self) -> EngineState:
        """As of now."""

    def info(self) -> Mapping[str, Any]:
        """Name, version, device, dtype, attention: shown by /health and in the logs."""
