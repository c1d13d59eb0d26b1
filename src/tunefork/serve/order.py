"""What is wanted of an engine, and what a client is told where that comes to nothing."""

import logging
from dataclasses import dataclass
from typing import Literal

from tunefork.errors import (
    AdapterError,
    BadInputError,
    EngineBusyError,
    NoAdapterMemoryError,
    NoMemoryError,
    TuneforkError,
)
from tunefork.serve.adapters import Lease
from tunefork.serve.api.errors import ApiError, bad, is_of_now, unavailable
from tunefork.serve.engine import Engine, Sampling, ServedAdapter
from tunefork.serve.tenants import Tenant

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Order:
    """What is wanted, checked and rendered."""

    id: str
    endpoint: Literal["chat.completions", "completions"]
    tenant: Tenant
    key_id: str | None
    model: str
    """The base's name, or the exact version."""
    engine: Engine
    adapter: ServedAdapter | None
    prompts: tuple[tuple[int, ...], ...]
    choices: int
    """Answers to each prompt."""
    sampling: Sampling
    deadline: float
    """`time.monotonic()` by which it is complete."""
    end_user: str | None = None
    lease: Lease | None = None

    @property
    def most_tokens(self) -> int:
        """That it can use, prompts included."""
        answers = len(self.prompts) * self.choices * self.sampling.max_tokens
        return sum(map(len, self.prompts)) + answers


def too_late() -> ApiError:
    """The deadline has passed."""
    return unavailable("deadline_exceeded", "The answer took too long; try again later", 5.0)


def told_of(error: Exception, sampling: Sampling) -> ApiError:
    """What the client is told of an engine's failure; the log has the whole of it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, AdapterError):
        logger.warning("the engine refuses an adapter: %s", error)
        if is_of_now(error):
            return unavailable("adapter_unreadable", "The adapter cannot be read now", 5.0)
        return bad(
            "The engine of this server cannot apply this adapter", "model", "adapter_unusable"
        )
    if isinstance(error, BadInputError):
        logger.warning("the engine refuses a request: %s", error)
        if sampling.grammar is None:
            return bad("The engine of this server cannot honour this request", None)
        return bad(
            "response_format: the engine can make no grammar of this schema", "response_format"
        )
    if isinstance(error, EngineBusyError):
        return unavailable("overloaded", "The engine is full; try again later", error.retry_after)
    if isinstance(error, NoMemoryError):
        logger.error("%s", error)
        if isinstance(error, NoAdapterMemoryError):
            what, instead = "to load this adapter", "or tell its operator, whose log says more"
        else:
            what, instead = "for a request like this one", "or ask for fewer tokens"
        return unavailable(
            "no_memory", f"The server has no memory {what} now; try again later, {instead}", 5.0
        )
    is_explained = isinstance(error, TuneforkError) and error.__cause__ is None
    logger.error("an answer failed: %s", error, exc_info=None if is_explained else error)
    return unavailable("engine_failed", "The engine failed; try again", 1.0)
