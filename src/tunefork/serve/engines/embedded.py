"""The embedded engine: transformers' model with many adapters, continuous batching, one thread.

The event loop only hands requests over and takes pieces back; everything that computes is in the
engine's own thread (`core.py`), and adapters are read by others (`tiers.py`).

Why not transformers' own continuous batching (5.17 to 5.24): its sampling parameters, seeds, logit
changes and log probabilities are one for all requests, its prefix blocks are shared by tokens alone
(so between adapters), its batches carry nothing more for a token, such as an adapter's index, and
its interfaces are private and differ between these versions. What is used of it is what is stable:
the models, with the attention interface through which they compute.
"""

import asyncio
import logging
import sys
import traceback
from collections.abc import AsyncGenerator, Mapping
from dataclasses import fields
from threading import Thread
from typing import Any

from tunefork.errors import BadInputError, EngineBusyError, EngineDeadError, TuneforkError
from tunefork.model.device import release_unused, use_device
from tunefork.serve.engine import (
    Capabilities,
    EngineRequest,
    EngineState,
    Meter,
    Piece,
    Sampling,
    ServedAdapter,
)
from tunefork.serve.engines.assemble import Assembled, assemble
from tunefork.serve.engines.core import Parcel
from tunefork.serve.engines.cores import in_a_thread
from tunefork.serve.engines.grammar import KINDS, Matcher, is_available
from tunefork.serve.engines.sequence import open_sequence
from tunefork.serve.settings import ServeSettings

logger = logging.getLogger(__name__)
_SWITCH_S = 5e-4
"""Seconds for which another thread may keep the interpreter while the engine's waits for it. By
Python's 5 ms, a launch that gives it up at each operation took 14 ms longer beside a thread that
looks through an adapter's header for as long (H200, 8B; `benchmarks/serving_cold.py` has what is
left of it)."""
_SAMPLING = frozenset(one.name for one in fields(Sampling))


class _Stream:
    """Pieces of one answer on their way to whoever reads them. Event loop only."""

    def __init__(self, meter: Meter) -> None:
        self.pieces: list[Piece] = []
        self.error: TuneforkError | None = None
        self.meter = meter
        self.something = asyncio.Event()

    def put(self, item: Piece | TuneforkError) -> None:
        if isinstance(item, Piece):
            self.meter.tokens += len(item.token_ids)
            self.pieces.append(item)
        else:
            self.error = item
        self.something.set()

    async def take(self) -> Piece:
        """All that has come since, as one piece. Raises what the request ended with."""
        await self.something.wait()
        if not self.pieces:
            assert self.error is not None
            raise self.error
        pieces, self.pieces = self.pieces, []
        if self.error is None:
            self.something.clear()
        return pieces[0] if len(pieces) == 1 else _joined(pieces)


def _joined(pieces: list[Piece]) -> Piece:
    return Piece(
        "".join(piece.text for piece in pieces),
        tuple(token for piece in pieces for token in piece.token_ids),
        tuple(logprob for piece in pieces for logprob in piece.logprobs),
        pieces[-1].finish_reason,
    )


class EmbeddedEngine:
    """An `Engine` in this process. `merged`: a replica with this adapter in its base's weights."""

    def __init__(self, settings: ServeSettings, merged: ServedAdapter | None = None) -> None:
        self.settings, self.merged = settings, merged
        self.capabilities = self._capabilities(settings.embedded.max_model_len or 0)
        self._parts: Assembled | None = None
        self._thread: Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._death: str | None = None
        """Why it computes no more."""
        self._has_loaded = False
        """Something was loaded since the last stop, or was tried to be."""
        self._num_open = 0

    async def start(self) -> None:
        """Load the base and get ready. Raises TuneforkError.

        From then on every thread of this process hands the interpreter to one that waits for it
        after 0.5 ms of Python, for good: another engine may run when this one is stopped.
        """
        await self.stop()
        self._loop, self._death = asyncio.get_running_loop(), None
        self._has_loaded = True
        self._parts = await in_a_thread(lambda: assemble(self.settings, self._post, self.merged))
        self.capabilities = self._capabilities(self._parts.max_model_len)
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_S))
        self._thread = Thread(target=self._run, args=(self._parts,), name="tunefork-engine")
        self._thread.daemon = True
        self._thread.start()

    async def stop(self) -> None:
        """Cancel what runs and give back all memory; idempotent."""
        if not self._has_loaded:
            return
        parts, self._parts = self._parts, None
        if parts is not None and self._thread is not None:
            parts.core.tell(parts.core.end)
            await asyncio.to_thread(self._thread.join)
        self._thread, self._has_loaded = None, False
        del parts
        release_unused()

    async def generate(self, request: EngineRequest) -> AsyncGenerator[Piece]:
        """See `Engine.generate`."""
        limit = self.settings.embedded.max_requests + self.settings.embedded.max_queued
        if self._num_open >= limit:
            raise EngineBusyError(f"{self._num_open} requests are open; at most {limit} may be")
        stream, is_over = _Stream(request.meter), False
        self._num_open += 1
        try:
            await self._open(request, stream)
            while not is_over:
                try:
                    piece = await stream.take()
                except TuneforkError:
                    is_over = True
                    raise
                is_over = piece.finish_reason is not None
                yield piece
        finally:
            self._num_open -= 1
            if not is_over and self._parts is not None:
                core = self._parts.core
                core.tell(lambda: core.cancel(request.id))

    async def _open(self, request: EngineRequest, stream: _Stream) -> None:
        """Hand `request` over. Not in `generate`, which waits for its reader: one that is slow must
        not keep the memory of an engine that was stopped."""
        parts = self._alive()
        self._check(request, parts)
        matcher = await self._matcher(request, parts)
        now = asyncio.get_running_loop().time()
        answer = open_sequence(request, stream, now, parts.tokenizer, matcher)
        parts.core.tell(lambda: parts.core.add(answer))
        if self._alive() is not parts:  # stopped while the grammar was made: nobody would answer
            raise EngineDeadError("the engine was stopped")

    async def prefetch(self, adapter: ServedAdapter) -> None:
        """Bring `adapter` into host memory while its request waits in the gateway's queue."""
        tiers = self._alive().core.tiers
        if tiers is not None:
            self._alive().core.tell(lambda: tiers.prefetch(adapter))

    async def forget(self, adapter_id: str) -> None:
        """Drop it from every tier once no request uses it."""
        tiers = self._alive().core.tiers
        if tiers is not None:
            self._alive().core.tell(lambda: tiers.forget(adapter_id))

    async def pin(self, adapter: ServedAdapter, pinned: bool) -> None:
        """Keep it in a slot, or no longer."""
        tiers = self._alive().core.tiers
        if tiers is not None:
            self._alive().core.tell(lambda: tiers.pin(adapter, pinned))

    def state(self) -> EngineState:
        """As of the last pass."""
        if self._parts is None or self._death is not None:
            return EngineState(healthy=False, why=self._death or "")
        return self._parts.core.state

    def info(self) -> Mapping[str, Any]:
        """Shown by /health and in the logs."""
        return {"engine": "embedded"} if self._parts is None else self._parts.info

    def _capabilities(self, max_model_len: int) -> Capabilities:
        ours = self.settings.embedded
        return Capabilities(
            max_model_len=max_model_len,
            max_logprobs=20,
            grammars=KINDS if is_available() else frozenset(),
            max_rank=ours.max_rank,
            sampling=_SAMPLING,
            max_requests=ours.max_requests,
            most_pins=ours.slots - 1,
        )

    def _run(self, parts: Assembled) -> None:
        """The engine's thread."""
        try:
            use_device(parts.core.passes.device)
            parts.core.run()
        except Exception as error:  # whatever it was: the gateway starts the engine again
            self._death = f"the engine stopped: {type(error).__name__}: {error}"[:500]
            # Told as text: whoever kept the error would keep all that the engine holds.
            logger.error("the engine stopped\n%s", traceback.format_exc())
        try:
            parts.core.close(EngineDeadError(self._death) if self._death else None)
        except Exception:  # everyone was told: what is left belongs to a dead device
            logger.error("the engine's memory cannot be given back\n%s", traceback.format_exc())

    def _alive(self) -> Assembled:
        if self._death is not None:
            raise EngineDeadError(self._death)
        if self._parts is None:
            raise EngineDeadError("the engine is not started")
        return self._parts

    def _check(self, request: EngineRequest, parts: Assembled) -> None:
        length, wanted = len(request.prompt_ids), request.sampling.max_tokens
        if length < 1 or wanted < 1 or length + wanted > parts.max_model_len:
            raise BadInputError(
                f"{length} tokens of prompt and {wanted} of answer; this engine takes at least one "
                f"of each, and at most {parts.max_model_len} together"
            )
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < parts.vocabulary:
            raise BadInputError(f"a token id of the prompt is none of {parts.vocabulary} tokens")
        bias = request.sampling.logit_bias
        if bias and not 0 <= min(bias) <= max(bias) < parts.vocabulary:
            raise BadInputError(f"logit_bias: a token id is none of {parts.vocabulary} tokens")

    async def _matcher(self, request: EngineRequest, parts: Assembled) -> Matcher | None:
        grammar = request.sampling.grammar
        if grammar is None:
            return None
        if parts.grammars is None:
            raise BadInputError("this engine has no grammars; install tunefork[grammar]")
        return await asyncio.to_thread(parts.grammars.matcher, grammar)

    def _post(self, parcels: list[Parcel]) -> None:
        """From the engine's thread to the event loop."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(_deliver, parcels)
        except RuntimeError:
            return  # the loop is closed: nobody is left to read


def _deliver(parcels: list[Parcel]) -> None:
    for stream, item in parcels:
        stream.put(item)
