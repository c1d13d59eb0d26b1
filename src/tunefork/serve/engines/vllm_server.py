"""One life of a vLLM server as seen from here: how it is reached, what it told, and its health."""

import asyncio
import contextlib
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tunefork.errors import EngineDeadError, EngineError, IdentityError, TuneforkError
from tunefork.home import home
from tunefork.model.load import find
from tunefork.recipe import ModelSection
from tunefork.serve.engines import vllm_api as api
from tunefork.serve.engines.vllm_adapters import Adapters
from tunefork.serve.engines.vllm_base import is_built_for_cpus, save_zeros
from tunefork.serve.engines.vllm_child import SERVED_NAME, Child, find_python
from tunefork.serve.engines.vllm_settings import VllmSettings
from tunefork.serve.event_stream import Address, StreamBrokenError

_LOOK_S = 1.0
"""Between two looks at the server's health."""
_READY_LOOK_S = 0.25
"""Between two looks while it starts."""
_SILENT_S = 30.0
"""Without an answer, after which a server that has not ended is taken for dead."""
_CALL_S = 120.0
"""Longest call that is no answer to a request: the loading of a large adapter."""
_RUNNING_ANSWERS_S = 10.0
"""For a server that is said to run already."""
_PROBE = "Tokens tell one base from another: naïve café, 1234567, def f(x):\n\treturn x"
_AN_ID = re.compile(r".+:v\d+")


@dataclass(slots=True)
class Server:
    """A server that answers, until `healthy` is false."""

    settings: VllmSettings
    address: Address
    headers: dict[str, str]
    client: httpx.AsyncClient
    adapters: Adapters
    child: Child | None
    base_name: str = SERVED_NAME
    max_model_len: int = 1
    version: str = ""
    on_cpu: bool = False
    healthy: bool = False
    gauges: dict[str, float] = field(default_factory=dict)
    """Of vLLM's metrics, as of the last look."""
    _watch: "asyncio.Task[None] | None" = None

    @classmethod
    async def open(cls, section: ModelSection, settings: VllmSettings, tokenizer: Any) -> "Server":
        """Start a child, or go to the server at `settings.url`; healthy once this returns.

        Raises TuneforkError, and leaves nothing behind then.
        """
        on_cpu, child = settings.device == "cpu", None
        if settings.url is None:
            python = find_python(settings)
            if settings.device == "auto":
                on_cpu = await is_built_for_cpus(python)
            base = await asyncio.to_thread(find, section)
            child = await Child.start(base, settings, more=int(on_cpu))
        server = cls._reach(settings, child, more=int(on_cpu))
        server.on_cpu = on_cpu
        try:
            await server._wait_until_ready()
            await server._learn()
            await server._check_tokenizer(tokenizer)
            if on_cpu:
                await server._put_base_in_slot(section)
        except BaseException:
            await server.close()
            raise
        server.healthy = True
        server._watch = asyncio.create_task(server._watch_health())
        return server

    @classmethod
    def _reach(cls, settings: VllmSettings, child: Child | None, more: int) -> "Server":
        if child is not None:
            address, key = child.address, child.key
        else:
            address = Address.parse(settings.url or "")
            key = os.environ.get(settings.key_env, "") if settings.key_env else ""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        client = httpx.AsyncClient(
            base_url=str(address), headers=headers, timeout=_CALL_S, trust_env=False
        )

        async def call(path: str, fields: Mapping[str, Any]) -> tuple[int, str]:
            try:
                answer = await client.post(path, json=dict(fields))
            except httpx.HTTPError as error:
                raise EngineDeadError(f"vLLM gives no answer: {type(error).__name__}") from error
            return answer.status_code, str(api.refusal(answer.status_code, answer.content))

        spool = child.folder / "adapters" if child is not None else None
        places = settings.host_adapters + more
        adapters = Adapters(call, places, settings.rank_step, spool)
        return cls(settings, address, headers, client, adapters, child)

    async def close(self) -> None:
        """End a child; take its adapters from a server that goes on running."""
        was_healthy, self.healthy = self.healthy, False
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        if self.child is not None:
            await self.child.stop()
        elif was_healthy:
            await self.adapters.unload_all()
        await self.client.aclose()

    def ensure_healthy(self) -> None:
        """Raises EngineDeadError where it no longer answers."""
        if self.child is not None and self.child.process.returncode is not None:
            self.healthy = False
        if not self.healthy:
            raise EngineDeadError("vLLM does not run; it is started again")

    def why(self) -> str:
        """What is known of its end; nothing while it answers."""
        if self.healthy:
            return ""
        ended = "" if self.child is None else self.child.why_ended()
        return ended or "vLLM runs, but does not answer"

    async def what_broke(self, error: StreamBrokenError | EngineError) -> TuneforkError:
        """What to raise for an answer that failed: the server may have failed with it, or not."""
        if self.healthy and not await self._is_well():
            self.healthy = False
        if self.healthy:
            return EngineError(f"an answer failed: {error}")
        return EngineDeadError(f"vLLM ended while it answered: {error}")

    async def _wait_until_ready(self) -> None:
        limit = self.settings.start_timeout_s if self.child is not None else _RUNNING_ANSWERS_S
        deadline = time.monotonic() + limit
        while not await self._is_well():
            if self.child is not None:
                self.child.ensure_running()
            if time.monotonic() > deadline:
                where = "" if self.child else f" at {self.address}"
                said = self.child.log_tail() if self.child else "Is it running?"
                raise EngineDeadError(f"vLLM{where} does not answer after {limit:.0f} s. {said}")
            await asyncio.sleep(_READY_LOOK_S)

    async def _learn(self) -> None:
        """Names, lengths and version that the server tells."""
        answer = await self.client.get("/v1/models")
        if answer.status_code != 200:
            raise api.refusal(answer.status_code, answer.content)
        cards = answer.json()["data"]
        base = next(card for card in cards if card.get("parent") is None)
        self.base_name, self.max_model_len = base["id"], int(base["max_model_len"])
        # what a gateway that was killed had loaded; other names are left alone
        self.adapters.adopt(
            {
                card["id"]: Path(card["root"])
                for card in cards
                if card.get("parent") is not None and _AN_ID.fullmatch(card["id"])
            }
        )
        with contextlib.suppress(httpx.HTTPError, ValueError, KeyError):
            self.version = str((await self.client.get("/version")).json()["version"])

    async def _put_base_in_slot(self, section: ModelSection) -> None:
        if self.child is not None:
            folder = self.child.folder / "zeros"
        else:
            folder = (self.settings.spool or home() / "vllm") / "zeros"
        zeros = await asyncio.to_thread(save_zeros, section, folder)
        await self.adapters.bring(zeros, pinned=True)
        self.base_name = zeros.id

    async def _check_tokenizer(self, tokenizer: Any) -> None:
        """A server at a URL may have any base: at least its tokens are compared."""
        fields = {"model": self.base_name, "prompt": _PROBE, "add_special_tokens": False}
        answer = await self.client.post("/tokenize", json=fields)
        if answer.status_code == 404:
            return
        ours = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        if answer.status_code != 200 or answer.json().get("tokens") != ours:
            raise IdentityError(
                "the vLLM server's tokens are not those of --base: it serves another model; start "
                "it over the same base"
            )

    async def _watch_health(self) -> None:
        """Until the server ended, or has not answered for long; then it is not healthy."""
        heard = time.monotonic()
        while time.monotonic() - heard < _SILENT_S:
            await asyncio.sleep(_LOOK_S)
            if self.child is not None and self.child.process.returncode is not None:
                break
            if await self._is_well():
                heard = time.monotonic()
            with contextlib.suppress(httpx.HTTPError, ValueError):
                told = await self.client.get("/metrics", timeout=5.0)
                self.gauges = api.gauges(told.text)
        self.healthy = False

    async def _is_well(self) -> bool:
        try:
            return (await self.client.get("/health", timeout=5.0)).status_code == 200
        except httpx.HTTPError:
            return False
