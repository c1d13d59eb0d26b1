"""An engine without a model: what it answers tells who was asked, and how long the prompt was."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from tests.data.conftest import train_tokenizer
from tunefork.errors import EngineDeadError
from tunefork.serve.detokenize import Detokenizer
from tunefork.serve.engine import (
    Capabilities,
    EngineRequest,
    EngineState,
    FinishReason,
    Piece,
    Sampling,
    ServedAdapter,
    TokenLogprob,
)

ALL = Capabilities(
    max_model_len=512,
    max_logprobs=20,
    grammars=frozenset({"json_object", "json_schema"}),
    max_rank=64,
    sampling=frozenset(Sampling.__slots__),
    max_requests=8,
)


class Tokens:
    """The tests' tokenizer, as far as a Detokenizer needs it."""

    def __init__(self) -> None:
        self.backend_tokenizer = train_tokenizer()


def nothing(request: EngineRequest, number: int) -> bool:
    """Is held."""
    return False


def everything(request: EngineRequest, number: int) -> bool:
    """Is held."""
    return True


def begun(request: EngineRequest, number: int) -> bool:
    """Is held, once it has a token."""
    return number > 0


class FakeEngine:
    """Says `NAME was asked 12 tokens`, a token at a time, with `delay_s` before each."""

    def __init__(self, *, capabilities: Capabilities = ALL, delay_s: float = 0.0) -> None:
        self.capabilities, self.delay_s = capabilities, delay_s
        self.tokens = Tokens()
        self.open: dict[str, EngineRequest] = {}
        self.seen: list[EngineRequest] = []
        self.starts = self.stops = self.computed = 0
        self.loaded: dict[str, ServedAdapter] = {}
        self.forgotten: list[str] = []
        self.pinned: set[str] = set()
        self.is_alive = False
        self.holds: Callable[[EngineRequest, int], bool] = nothing
        """Whether a request that has so many tokens waits, rather than gets the next; until the
        engine dies."""
        self.fails: Exception | None = None
        """Raised by every request from its second token on."""
        self.start_fails: Exception | None = None

    async def start(self) -> None:
        self.starts += 1
        if self.start_fails is not None:
            raise self.start_fails
        self.is_alive = True

    async def stop(self) -> None:
        self.stops += 1
        self.is_alive = False

    def die(self) -> None:
        """As a crashed process."""
        self.is_alive = False

    async def generate(self, request: EngineRequest) -> AsyncIterator[Piece]:
        self.open[request.id] = request
        self.seen.append(request)
        try:
            if request.adapter is not None:
                self.loaded[request.adapter.id] = request.adapter
            async for piece in self._pieces(request):
                yield piece
        finally:
            del self.open[request.id]

    async def _pieces(self, request: EngineRequest) -> AsyncIterator[Piece]:
        sampling = request.sampling
        name = request.adapter.id if request.adapter else "base"
        text = f"{name} was asked {len(request.prompt_ids)} tokens"
        if sampling.grammar is not None:
            text = '{"answer": "' + name + '"}'
        elif sampling.temperature > 0:
            text += f" seed {sampling.seed}"
        ids = self.tokens.backend_tokenizer.encode(text).ids
        if sampling.ignore_eos:
            ids = (ids * sampling.max_tokens)[: sampling.max_tokens]
        detokenizer = Detokenizer(self.tokens, request.prompt_ids, sampling.stop)
        reason: FinishReason
        for number, token in enumerate(ids):
            await asyncio.sleep(self.delay_s)
            while self.holds(request, number) and self.is_alive:
                await asyncio.sleep(0.005)
            if not self.is_alive:
                raise EngineDeadError("the engine was killed in /secret/path")
            if number and self.fails is not None:
                raise self.fails
            self.computed += 1
            is_last = number + 1 == min(len(ids), sampling.max_tokens)
            piece = detokenizer.push([token])
            is_last = is_last or detokenizer.stopped
            if is_last:
                piece += detokenizer.flush()
                was_cut = not detokenizer.stopped and (sampling.ignore_eos or number + 1 < len(ids))
                reason = "length" if was_cut else "stop"
                yield Piece(piece, (token,), self._logprobs(token, sampling.logprobs), reason)
                return
            yield Piece(piece, (token,), self._logprobs(token, sampling.logprobs))

    def _logprobs(self, token: int, count: int | None) -> tuple[TokenLogprob, ...]:
        if count is None:
            return ()
        text = self.tokens.backend_tokenizer.decode([token])
        top = tuple((token + i, text, -0.5 - i) for i in range(count))
        return (TokenLogprob(token, text, -0.5, top),)

    async def prefetch(self, adapter: ServedAdapter) -> None:
        self.loaded[adapter.id] = adapter

    async def forget(self, adapter_id: str) -> None:
        self.loaded.pop(adapter_id, None)
        self.forgotten.append(adapter_id)

    async def pin(self, adapter: ServedAdapter, pinned: bool) -> None:
        (self.pinned.add if pinned else self.pinned.discard)(adapter.id)

    def state(self) -> EngineState:
        return EngineState(
            healthy=self.is_alive,
            running=len(self.open),
            resident=tuple(self.loaded),
            loads=len(self.loaded),
            load_seconds={"read": 0.5},
        )

    def info(self) -> Mapping[str, Any]:
        return {"name": "fake", "dtype": "float32"}
