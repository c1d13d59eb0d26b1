"""Adapters that the operator has given a place of their own: in a slot, or in an engine.

A pinned one stays in a slot, and follows its tag. A merged one (`--merge`) has an engine more, with
the adapter added into its base's weights; that is one exact version, and a tag that moves on leaves
it for the adapters' engine. A replica that died is started again; meanwhile the adapters' engine
answers for it, where it can.
"""

import logging
from collections.abc import Callable, Sequence

from tunefork.errors import BadInputError, TuneforkError
from tunefork.serve.adapters import Adapters, Lease
from tunefork.serve.api.errors import ApiError
from tunefork.serve.engine import Engine, ServedAdapter
from tunefork.serve.revival import Revival
from tunefork.serve.tenants import LOCAL

logger = logging.getLogger(__name__)


class Replicas:
    """Engines with one adapter merged; from one event loop."""

    def __init__(self, make: Callable[[ServedAdapter], Engine]) -> None:
        self._make = make
        self._all: dict[str, tuple[Revival, Lease]] = {}

    async def start(self, names: Sequence[str], adapters: Adapters) -> None:
        """An engine for each of `names`. Raises BadInputError where one cannot be served."""
        for name in names:
            lease = await _lease(name, adapters, "merge")
            version = lease.checked.adapter
            if version.id in self._all:
                lease.release()
                continue
            engine = self._make(version)
            self._all[version.id] = (Revival(engine, f"the replica of {version.id}"), lease)
            await engine.start()
            logger.info("a replica answers for %s", version.id)

    def find(self, version: str) -> Engine | None:
        """The engine of `version`, if it has one that answers."""
        if version not in self._all:
            return None
        engine = self._all[version][0].engine
        return engine if engine.state().healthy else None

    def up(self) -> dict[str, bool]:
        """Whether each version's engine answers."""
        return {version: self.find(version) is not None for version in self._all}

    def engines(self) -> list[Engine]:
        """All of them."""
        return [revival.engine for revival, _ in self._all.values()]

    def revive(self) -> None:
        """Start those that died again; the server goes on meanwhile."""
        for revival, _ in self._all.values():
            revival.look()

    async def stop(self) -> None:
        """End them all."""
        for revival, lease in self._all.values():
            await revival.stop()
            lease.release()
            await revival.engine.stop()
        self._all.clear()


class Pins:
    """Adapters that stay in slots."""

    def __init__(self, engine: Engine, names: Sequence[str]) -> None:
        self._engine, self._names = engine, names
        self._leases: dict[str, Lease] = {}
        self._faults: dict[str, str] = {}
        """Why a name's newest version is not pinned, as the log has been told."""

    async def start(self, adapters: Adapters) -> None:
        """Pin all. Raises BadInputError where one cannot be served, or others never could be."""
        leases = {name: await _lease(name, adapters, "pin") for name in self._names}
        count = len({lease.checked.adapter.id for lease in leases.values()})
        most = self._engine.capabilities.most_pins
        if most is not None and count > most:
            raise BadInputError(
                f"pin: {count} adapters are more than {most}, and no other would ever get in; pin "
                "fewer, or set embedded.slots (of vLLM: vllm.host_adapters) to more than are pinned"
            )
        for name, lease in leases.items():
            await self._pin(name, lease)

    async def follow(self, adapters: Adapters) -> None:
        """Where a tag has moved, pin the new version in place of the old one."""
        for name in self._names:
            try:
                await self._pin(name, await adapters.lease(name, LOCAL))
            except (ApiError, TuneforkError) as error:
                fault = error.message if isinstance(error, ApiError) else str(error)
                if self._faults.get(name) != fault:
                    logger.warning("pin: %s: %s; the version before stays", name, fault)
                self._faults[name] = fault
            else:
                self._faults.pop(name, None)

    def release(self) -> None:
        """Hold none of them any longer."""
        for lease in self._leases.values():
            lease.release()

    async def again(self) -> None:
        """The engine was started anew: it knows of none."""
        for lease in self._leases.values():
            await self._engine.pin(lease.checked.adapter, True)

    async def _pin(self, name: str, lease: Lease) -> None:
        before = self._leases.get(name)
        if before is not None and before.checked.adapter.id == lease.checked.adapter.id:
            lease.release()
            return
        try:
            await self._engine.pin(lease.checked.adapter, True)
        except BaseException:
            lease.release()
            raise
        self._leases[name] = lease
        if before is not None:
            await self._engine.pin(before.checked.adapter, False)
            before.release()


async def _lease(name: str, adapters: Adapters, option: str) -> Lease:
    try:
        return await adapters.lease(name, LOCAL, is_merged=option == "merge")
    except ApiError as error:
        why = error.message
        if error.status == 404:
            why = "the store has no such adapter (tunefork adapters list shows all)"
        raise BadInputError(f"{option}: {name}: {why}") from error
