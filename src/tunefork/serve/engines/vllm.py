"""A vLLM server behind the gateway: started as a child, or one that runs already.

vLLM batches, pages its cache and spreads over devices and hosts; here requests are put in its
words, adapters are loaded before they are named, and its health is watched. Prefixes are shared
within a tenant only: each has a salt, which no other can guess. A server that died is not started
again here: the gateway does so (`stop`, `start`).
"""

import asyncio
import contextlib
import hashlib
import hmac
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from tunefork.errors import BadInputError, EngineDeadError, EngineError
from tunefork.model.load import load_tokenizer
from tunefork.serve.engine import Capabilities, EngineRequest, EngineState, Piece, ServedAdapter
from tunefork.serve.engines import vllm_api as api
from tunefork.serve.engines.vllm_base import ZERO_ID
from tunefork.serve.engines.vllm_server import Server
from tunefork.serve.event_stream import Answer, StreamBrokenError, post
from tunefork.serve.settings import ServeSettings
from tunefork.serve.token_text import text_of

_SAMPLING = {"max_tokens", "temperature", "top_p", "top_k", "seed", "presence_penalty"} | {
    *("frequency_penalty", "logit_bias", "stop", "stop_ids", "ignore_eos", "logprobs", "grammar")
}


class VllmEngine:
    """Drives one vLLM server; see `Engine`."""

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings.vllm
        self._section = settings.base
        self.capabilities = self._capabilities(self.settings.max_model_len or 1)
        self._salt_key = secrets.token_bytes(32)
        self._tokenizer: Any = None
        self._texts: dict[int, str] = {}
        self._server: Server | None = None
        self._open = 0
        self._before = (0, 0, 0.0)
        """Loads, evictions and seconds of the servers before this one."""

    async def start(self) -> None:
        """Start the server, or find it; ready once it answers. Raises TuneforkError."""
        if self._tokenizer is None:
            self._tokenizer = await asyncio.to_thread(load_tokenizer, self._section)
        self._server = await Server.open(self._section, self.settings, self._tokenizer)
        self.capabilities = self._capabilities(self._server.max_model_len, self._server.on_cpu)

    async def stop(self) -> None:
        """End a child, or leave a server as it was found; idempotent."""
        server = self._server
        if server is not None:
            await server.close()
            self._before = self._totals()
            self._server = None

    async def generate(self, request: EngineRequest) -> AsyncIterator[Piece]:
        """See `Engine`. vLLM drops a request when its connection closes."""
        server, has_begun = self._running(), False
        self._open += 1
        try:
            async with contextlib.AsyncExitStack() as held:
                async with _until(request.deadline):
                    answer = await self._ask(server, request, held)
                events = answer.events()
                while True:
                    async with _until(request.deadline):
                        event = await anext(events, b"[DONE]")
                    if event == b"[DONE]":
                        raise StreamBrokenError("the answer has no end")
                    piece = api.piece(event, request.sampling, self._text_of)
                    if piece is not None:
                        has_begun = True
                        yield piece
                        if piece.finish_reason is not None:
                            return
        except TimeoutError:
            yield Piece("", (), finish_reason="deadline")
        except (StreamBrokenError, EngineError) as error:
            broken = await server.what_broke(error)
            if request.sampling.grammar and isinstance(broken, EngineError) and not has_begun:
                # vLLM looks at a grammar before it takes a request, but compiles it only after
                raise BadInputError("vLLM cannot follow this grammar") from error
            raise broken from error
        finally:
            self._open -= 1

    async def _ask(
        self, server: Server, request: EngineRequest, held: contextlib.AsyncExitStack
    ) -> Answer:
        """The head of the answer; `held` keeps the adapter and the connection."""
        name = server.base_name
        if request.adapter is not None:
            name = await held.enter_async_context(server.adapters.using(request.adapter))
        body = api.body(request, name, self.salt(request.tenant))
        answer = await held.enter_async_context(
            post(server.address, "/v1/completions", body, server.headers)
        )
        if answer.status == 404:  # another server than the one that was told of it
            server.healthy = False
            raise EngineDeadError(f"vLLM knows no {name}: it was started again by somebody")
        if answer.status != 200:
            raise api.refusal(answer.status, await answer.body())
        return answer

    async def prefetch(self, adapter: ServedAdapter) -> None:
        """Load it if there is a place now; what is wrong with it is said to its request."""
        with contextlib.suppress(Exception):
            await self._running().adapters.bring(adapter)

    async def forget(self, adapter_id: str) -> None:
        """Unload it, and remove its files, once no request uses it."""
        if self._server is not None:
            self._server.adapters.forget(adapter_id)

    async def pin(self, adapter: ServedAdapter, pinned: bool) -> None:
        """Keep it known to the server; which ones are in slots is vLLM's own choice."""
        await self._running().adapters.bring(adapter, pinned=pinned)

    def state(self) -> EngineState:
        """As of now; vLLM's own gauges as of the last look.

        vLLM does not say which adapters are in its slots: those that were used last are.
        """
        server = self._server
        loads, evictions, seconds = self._totals()
        if server is None:
            return EngineState(
                healthy=False, loads=loads, evictions=evictions, load_seconds={"load": seconds}
            )
        known = [name for name in server.adapters.ids() if name != ZERO_ID]
        waiting = min(self._open, int(server.gauges.get("vllm:num_requests_waiting", 0)))
        cache = int(server.gauges.get("cache_tokens", 0))
        used = server.gauges.get("vllm:kv_cache_usage_perc", 0.0)
        return EngineState(
            healthy=server.healthy,
            why=server.why(),
            running=self._open - waiting,
            waiting=waiting,
            slots=self.settings.slots,
            resident=tuple(known[: self.settings.slots]),
            in_host_memory=tuple(known),
            loads=loads,
            evictions=evictions,
            load_seconds={"load": seconds},
            free_cache_tokens=int(cache * (1 - used)),
            total_cache_tokens=cache,
        )

    def info(self) -> Mapping[str, Any]:
        """Without addresses and paths."""
        return {
            "engine": "vllm",
            "version": self._server.version if self._server is not None else "",
            "server": "child" if self.settings.url is None else "running before",
            "slots": self.settings.slots,
            "max_rank": self.settings.rank_step,
        }

    def salt(self, tenant: str) -> str:
        """What keeps the cached prefixes of `tenant` from others, who cannot guess it."""
        return hmac.new(self._salt_key, tenant.encode(), hashlib.sha256).hexdigest()

    def _running(self) -> Server:
        if self._server is None:
            raise EngineDeadError("vLLM does not run")
        self._server.ensure_healthy()
        return self._server

    def _totals(self) -> tuple[int, int, float]:
        loads, evictions, seconds = self._before
        if self._server is not None:
            now = self._server.adapters
            loads, evictions = loads + now.loads, evictions + now.evictions
            seconds += now.load_seconds
        return loads, evictions, seconds

    def _capabilities(self, max_model_len: int, on_cpu: bool = False) -> Capabilities:
        # On a CPU, a seeded request whose prompt is read in two steps ends the server: a CPU's
        # generator has no offset (v1/worker/gpu_model_runner.py, _bookkeeping_sync, of 0.32).
        honoured = _SAMPLING - {"seed"} if on_cpu else _SAMPLING
        return Capabilities(
            max_model_len=max_model_len,
            max_logprobs=20,  # vLLM's --max-logprobs
            grammars=frozenset({"json_object", "json_schema", "regex"}),
            max_rank=self.settings.rank_step,
            sampling=frozenset(honoured),
            max_requests=self.settings.max_requests,
            most_pins=self.settings.host_adapters - 1,
        )

    def _text_of(self, token_id: int) -> str:
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = text_of(self._tokenizer, token_id)
        return text


def _until(deadline: float | None) -> asyncio.Timeout:
    """Ends what takes longer; `deadline` is of `time.monotonic()`, the loop's own clock or not."""
    return asyncio.timeout(None if deadline is None else max(0.0, deadline - time.monotonic()))
