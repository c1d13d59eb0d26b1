"""A load on an OpenAI server: a mix of models, lengths and arrivals, drawn from a seed.

What is sent is drawn before the first request, so that two servers get the same. Prompts are token
ids, to /v1/completions, and answers go on to their full length: what is compared is then the same
work. Arrivals are a Poisson process (`rate`, an open loop: a slow server meets a growing queue, as
from users) or follow each other (`concurrency`, a closed loop). Times are taken where the bytes
arrive. The generator tells its own cost, the share of one core that it used and how late its event
loop was: a figure of a generator that was busy is one of the generator.
"""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tunefork.errors import BadInputError
from tunefork.serve.event_stream import Address, StreamBrokenError, post
from tunefork.serve.remote import reason

_TICK_S = 0.02
"""How often the event loop's lateness is taken."""
_CONNECT_S = 10.0
_FIRST_ID = 100
"""Ids below it are often special tokens."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent."""

    models: tuple[str, ...]
    """Names; requests are spread over them."""
    requests: int = 64
    concurrency: int = 16
    """Requests at the same time; with `rate`, no bound."""
    rate: float | None = None
    """Requests a second. None: the next is sent when one ends."""
    prompt_tokens: tuple[int, int] = (128, 128)
    """Shortest and longest, drawn evenly between."""
    answer_tokens: tuple[int, int] = (128, 128)
    skew: float = 0.0
    """The n-th model gets 1/n**skew as many requests as the first (Zipf); 0: all the same."""
    vocab_size: int = 4096
    """Prompts are drawn from the ids between 100 and this."""
    ignore_eos: bool = True
    """Sent along, a field that vLLM and tunefork know: answers have the length that was drawn."""
    seed: int = 0
    timeout_s: float = 600.0
    """Of one request."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request."""

    at_s: float
    """After the start; only with `rate`."""
    model: str
    prompt: tuple[int, ...]
    max_tokens: int


@dataclass(slots=True)
class Sample:
    """What came of one request. Times are of `time.perf_counter`."""

    model: str
    sent: float
    first: float = 0.0
    """When the first token was there."""
    last: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    error: str | None = None
    """A status or what broke; None: it was answered."""


@dataclass(slots=True)
class Outcome:
    """Of a whole run."""

    samples: list[Sample] = field(default_factory=list)
    wall_s: float = 0.0
    own_cpu_s: float = 0.0
    """Processor time of the generator."""
    lateness_s: list[float] = field(default_factory=list)
    """By how much its event loop overslept, every 20 ms."""


def draw(load: Load) -> list[Ask]:
    """The requests of `load`; the same for the same load."""
    source = random.Random(load.seed)
    weights = [1 / (n + 1) ** load.skew for n in range(len(load.models))]
    at_s, asks = 0.0, []
    for _ in range(load.requests):
        if load.rate is not None:
            at_s += source.expovariate(load.rate)
        length = source.randint(*load.prompt_tokens)
        asks.append(
            Ask(
                at_s=at_s,
                model=source.choices(load.models, weights)[0],
                prompt=tuple(source.choices(range(_FIRST_ID, load.vocab_size), k=length)),
                max_tokens=source.randint(*load.answer_tokens),
            )
        )
    return asks


async def run(server: str, key: str | None, load: Load) -> Outcome:
    """Send `load` to the server at `server` (…/v1 or not), and wait for every answer.

    Raises BadInputError where nobody listens.
    """
    address = Address.parse(server.rstrip("/").removesuffix("/v1"))
    await _check_listens(address)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    asks, outcome = draw(load), Outcome()
    gate = asyncio.Semaphore(load.concurrency if load.rate is None else load.requests)
    async with _own_cost(outcome):
        began = time.perf_counter()

        async def one(ask: Ask) -> None:
            if load.rate is not None:
                await asyncio.sleep(max(0.0, began + ask.at_s - time.perf_counter()))
            async with gate:
                outcome.samples.append(await _ask(address, headers, ask, load))

        async with asyncio.TaskGroup() as group:
            for ask in asks:
                group.create_task(one(ask))
        outcome.wall_s = time.perf_counter() - began
    return outcome


async def _check_listens(address: Address) -> None:
    try:
        async with asyncio.timeout(_CONNECT_S):
            _, writer = await asyncio.open_connection(address.host, address.port)
    except (OSError, TimeoutError) as error:
        raise BadInputError(
            f"--server: nobody listens at {address}; start the server (tunefork serve), or give "
            "its address"
        ) from error
    writer.transport.abort()


async def _ask(address: Address, headers: dict[str, str], ask: Ask, load: Load) -> Sample:
    fields = {
        "model": ask.model,
        "prompt": list(ask.prompt),
        "max_tokens": ask.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    body = json.dumps(fields | ({"ignore_eos": True} if load.ignore_eos else {})).encode()
    sample = Sample(ask.model, time.perf_counter())
    try:
        async with asyncio.timeout(load.timeout_s):
            async with post(address, "/v1/completions", body, headers) as answer:
                if answer.status != 200:
                    sample.error = f"HTTP {answer.status}: {await reason(answer)}"
                    return sample
                async for event in answer.events():
                    _take(event, sample)
    except TimeoutError:
        sample.error = "timed out"
    except (StreamBrokenError, ValueError, KeyError):
        sample.error = "broken answer"
    if sample.error is None and not sample.tokens:
        sample.error = "no usage told"
    return sample


def _take(event: bytes, sample: Sample) -> None:
    if event == b"[DONE]":
        return
    now, fields = time.perf_counter(), json.loads(event)
    if "error" in fields:
        sample.error = "failed while it answered"
    if fields.get("choices"):
        sample.last = now
        sample.first = sample.first or now
    if fields.get("usage"):
        sample.tokens = int(fields["usage"]["completion_tokens"])
        sample.prompt_tokens = int(fields["usage"]["prompt_tokens"])


@asynccontextmanager
async def _own_cost(outcome: Outcome) -> AsyncIterator[None]:
    async def tick() -> None:
        while True:
            due = time.perf_counter() + _TICK_S
            await asyncio.sleep(_TICK_S)
            outcome.lateness_s.append(time.perf_counter() - due)

    task, before = asyncio.create_task(tick()), time.process_time()
    try:
        yield
    finally:
        task.cancel()
        outcome.own_cpu_s = time.process_time() - before
