"""Two tenants at one server: a flood of the one does not make the other wait for it."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from tests.serve.fake_engine import ALL, FakeEngine, everything, nothing
from tests.serve.servers import Running, eventually, serving
from tunefork.serve.settings import ServeSettings
from tunefork.serve.tenants import Tenant, add_key


def _order(running: Running, keys: dict[str, str], flood: int) -> list[str]:
    """Whose answers were begun, in their order: `flood` of a, then four of b."""
    engine = running.gateway.engine
    assert isinstance(engine, FakeEngine)
    with ThreadPoolExecutor(flood + 4) as pool:
        first = [pool.submit(running.ask, keys["a"], max_tokens=8) for _ in range(flood)]
        eventually(lambda: running.gateway.parts.queue.waiting == flood - 2)
        others = [pool.submit(running.ask, keys["b"], max_tokens=8) for _ in range(4)]
        eventually(lambda: running.gateway.parts.queue.waiting == flood + 2)
        engine.holds = nothing
        assert {f.result().status_code for f in [*first, *others]} == {200}
    return [request.tenant for request in engine.seen]


def test_a_flood_of_one_tenant_does_not_hold_up_another(settings: ServeSettings) -> None:
    keys = {name: add_key(settings.accounts_file, Tenant(name)) for name in "ab"}
    engine = FakeEngine(capabilities=replace(ALL, max_requests=2))
    engine.holds = everything
    with serving(engine, settings) as running:
        order = _order(running, keys, 20)
    last_of_b = max(place for place, tenant in enumerate(order) if tenant == "b")
    assert last_of_b < 18  # in the order of arrival it would be the last, the 23rd
