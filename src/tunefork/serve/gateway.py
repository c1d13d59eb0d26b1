"""The server without its HTTP: who may ask what, which model answers, and whether it is up.

It is `starting` until base and engine are there, then `ready`; `failed` while an engine that died
is started again; `draining` once it is told to stop. Only when ready does it take requests.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from tunefork.errors import StoreError
from tunefork.serve.adapters import Adapters, Lease
from tunefork.serve.api.errors import ApiError, no_such_model, unavailable
from tunefork.serve.base import ServedBase, load_base
from tunefork.serve.checks import Checks
from tunefork.serve.door import Caller, Door
from tunefork.serve.engine import Engine, ServedAdapter
from tunefork.serve.fair import FairQueue
from tunefork.serve.ledger import Ledger
from tunefork.serve.metrics import Metrics, Snapshot
from tunefork.serve.parts import Parts
from tunefork.serve.prompts import Prompts
from tunefork.serve.quotas import Quotas
from tunefork.serve.revival import Revival
from tunefork.serve.settings import ServeSettings
from tunefork.serve.standing import Pins, Replicas
from tunefork.serve.tenants import Tenant

State = Literal["starting", "ready", "failed", "draining"]
_SETTLE_S = 2.0
"""Cancelled answers have as long to be recorded, when the server stops."""
_LOOK_S = 1.0
"""How often keys, the engine's health and what is held are looked at."""
_THREADS = 4
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Target:
    """What a request's `model` came to."""

    name: str
    """The base's name, or the exact version."""
    engine: Engine
    adapter: ServedAdapter | None
    prompts: Prompts
    lease: Lease | None

    def release(self) -> None:
        """No answer came of it."""
        if self.lease is not None:
            self.lease.release()


class Gateway:
    """One base, one engine, and whoever asks them; lives in one event loop."""

    def __init__(
        self,
        engine: Engine,
        settings: ServeSettings,
        replicate: Callable[[ServedAdapter], Engine],
    ) -> None:
        self.engine, self.settings = engine, settings
        self._is_draining = False
        self.loop: asyncio.AbstractEventLoop | None = None
        """Once it has begun."""
        self.failure: BaseException | None = None
        """Why it never became ready."""
        self.on_failure: Callable[[], None] = lambda: None
        self.on_ready: Callable[[], None] = lambda: None
        self.threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="render")
        """For what would keep the event loop: large inputs are parsed and tokenised there."""
        self._reading: dict[str, asyncio.Semaphore] = {}
        self._open: Counter[str] = Counter()
        self.began = int(time.time())
        """Seconds since 1970."""
        self._base: ServedBase | None = None
        self._adapters: Adapters | None = None
        self._parts: Parts | None = None
        self._ledger: Ledger | None = None
        self._replicas = Replicas(replicate)
        self._pins = Pins(engine, settings.pin)
        self._revival = Revival(engine, "the engine", self._pin_again)
        self.door = Door(settings.accounts_file, may_be_open=settings.is_loopback)
        self._task: asyncio.Task[None] | None = None
        self._is_up = False
        """It was started."""

    def begin(self) -> None:
        """Start, in the background: /health answers meanwhile."""
        self.loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self._live())

    def drain(self) -> None:
        """Take no more requests; those that run go on."""
        self._is_draining = True

    async def stop(self) -> None:
        """Give everything back. Answers that still run are cancelled and recorded."""
        self.drain()
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        with suppress(TimeoutError):  # the server has cancelled them and waits for none of them
            async with asyncio.timeout(_SETTLE_S):
                while self._open.total():
                    await asyncio.sleep(0.01)
        if self._parts is not None:
            await self._parts.settle()
        await self._revival.stop()
        self._pins.release()
        for end in (self._replicas.stop, self.engine.stop):
            try:
                await end()
            except Exception:  # of a device that is lost, say; the files are closed all the same
                logger.exception("an engine cannot be stopped")
        if self._adapters is not None:
            await self._adapters.close()
        if self._ledger is not None:
            self._ledger.close()
        self.threads.shutdown(cancel_futures=True)

    @property
    def state(self) -> State:
        """As of now."""
        if self._is_draining:
            return "draining"
        if self.failure is not None or self._revival.is_at_work:
            return "failed"
        return "ready" if self._is_up else "starting"

    def not_ready(self) -> ApiError:
        """Why no request is taken."""
        match self.state:
            case "starting":
                return unavailable("starting", "The model is being loaded; try again", 5.0)
            case "draining":
                return unavailable("draining", "The server is about to stop; try another", 5.0)
        if self.failure is not None:
            return unavailable("engine_failed", "The engine cannot be started", 5.0)
        failures, after_s = self._revival.failures, self._revival.retry_after()
        often = "once" if failures == 1 else f"{failures} times in a row"
        return unavailable(
            "engine_failed",
            f"The engine failed {often} and is started again; try again in {after_s:.0f} s",
            after_s,
        )

    @property
    def has_begun(self) -> bool:
        """Whether it ever was ready."""
        return self._parts is not None

    @property
    def base(self) -> ServedBase:
        """Once ready."""
        assert self._base is not None
        return self._base

    @property
    def adapters(self) -> Adapters:
        """Once ready."""
        assert self._adapters is not None
        return self._adapters

    @property
    def parts(self) -> Parts:
        """Once ready."""
        assert self._parts is not None
        return self._parts

    def identify(self, headers: Mapping[str, str]) -> Caller:
        """Who asks. Raises ApiError: 503 while not ready, 401."""
        if self.state != "ready":
            raise self.not_ready()
        return self.door.identify(headers)

    def admit(self, tenant: Tenant) -> None:
        """Count a request of `tenant`, which is to `leave`. Raises ApiError (429)."""
        if self._open[tenant.name] >= self.settings.max_open_requests_per_tenant:
            self.parts.metrics.refused(tenant.name, "open")
            raise ApiError(
                429,
                "Too many requests of this tenant are open; wait for answers before asking more",
                kind="requests",
                code="too_many_open_requests",
                retry_after=1.0,
            )
        try:
            self.parts.quotas.admit_request(tenant)
        except ApiError:
            self.parts.metrics.refused(tenant.name, "requests")
            raise
        self._open[tenant.name] += 1

    def leave(self, tenant: Tenant) -> None:
        """A request that was admitted is over."""
        self._open[tenant.name] -= 1

    async def target(self, model: str, tenant: Tenant) -> Target:
        """What answers for `model`. Raises ApiError (404, 400)."""
        if model == self.base.name:
            if not tenant.has_base:
                raise no_such_model()
            return Target(model, self.engine, None, self.base.prompts, None)
        lease = await self.adapters.lease(model, tenant)
        adapter, prompts = lease.checked.adapter, lease.checked.prompts
        if (replica := self._replicas.find(adapter.id)) is not None:
            return Target(adapter.id, replica, None, prompts, lease)
        if lease.checked.needs_replica:
            lease.release()
            raise unavailable(
                "engine_failed", "This adapter's engine is started again; try again", 5.0
            )
        return Target(adapter.id, self.engine, adapter, prompts, lease)

    async def read(self, tenant: Tenant, function: Callable[..., Any], *arguments: Any) -> Any:
        """Parse or tokenise what `tenant` sent, never in all threads: others have some to send."""
        places = self._reading.setdefault(tenant.name, asyncio.Semaphore(_THREADS // 2))
        await places.acquire()
        work = asyncio.ensure_future(self.in_thread(function, *arguments))
        # A thread goes on when its request is cancelled, and so does its place.
        work.add_done_callback(lambda _: places.release())
        return await asyncio.shield(work)

    async def in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run what is not quick beside the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.threads, partial(function, *arguments))

    async def _live(self) -> None:
        try:
            await self._start()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self.failure = error
            self.on_failure()
            return
        self._is_up = True
        if not self._is_draining:
            self.on_ready()
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                await self._look()
            except StoreError as error:
                logger.error("%s", error)
            except Exception as error:  # of the engine: the next look finds it dead
                logger.error("what is to be done every second failed", exc_info=error)

    async def _start(self) -> None:
        settings = self.settings
        ledger = self._ledger = await self.in_thread(Ledger, settings.accounts_file)
        await self.in_thread(self.door.read)
        base: ServedBase
        base, _ = await asyncio.gather(
            self.in_thread(load_base, settings.base, settings.base_name), self.engine.start()
        )
        self._base = base
        capabilities = self.engine.capabilities
        is_single = str(self.engine.info().get("dtype", "")).endswith("float32")
        checks = Checks(base, capabilities, 4 if is_single else 2)
        self._adapters = Adapters(self.engine, checks, base.identity.weights_sha256, base.name)
        await self._replicas.start(settings.merge, self._adapters)
        await self._pins.start(self._adapters)
        queue = FairQueue(
            capabilities.max_requests,
            settings.max_queued,
            settings.max_queued_per_tenant,
            slots=self.engine.state().slots,
            resident=lambda: self.engine.state().resident,
        )
        for replica in self._replicas.engines():
            queue.add_places(replica, replica.capabilities.max_requests)
        metrics = Metrics(base.name, settings.max_metric_adapters, capabilities.max_requests)
        metrics.watch(self._snapshot)
        self._parts = Parts(queue, Quotas(ledger), ledger, metrics)
        logger.info("serving %s: %s", base.name, dict(self.engine.info()))

    async def _look(self) -> None:
        self._revival.look()
        self._replicas.revive()
        await self.in_thread(self.door.read)
        await self.in_thread(self.parts.ledger.refresh)
        self.parts.queue.look()
        await self.adapters.sweep(self.settings.hold_idle_s)
        if not self._revival.is_at_work:
            await self._pins.follow(self.adapters)

    async def _pin_again(self) -> None:
        try:
            await self._pins.again()
        except Exception as error:  # the engine answers without; if it died, it is seen
            logger.error("what is pinned cannot be brought back: %s", error)

    def _snapshot(self) -> Snapshot:
        queue = self.parts.queue
        waiting = queue.waiting_by_tenant()
        held, replicas = self.adapters.in_use(), self._replicas.up()
        return self.engine.state(), waiting, queue.running, held, replicas
