"""Pinned adapters stay and follow their tag; a merged one has an engine more."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from tests.serve.fake_engine import ALL, FakeEngine, everything, nothing
from tests.serve.servers import eventually, serving
from tunefork.errors import BadInputError, EngineBusyError, EngineError, ModelError
from tunefork.registry.store import Store
from tunefork.serve import gateway
from tunefork.serve.choose import make_replica
from tunefork.serve.engine import ServedAdapter
from tunefork.serve.heat import Heat
from tunefork.serve.metrics import OTHER, Metrics
from tunefork.serve.settings import ServeSettings


def test_a_pin_follows_its_tag(settings: ServeSettings, adapter: Path) -> None:
    engine = FakeEngine()
    with Store.open() as store:
        store.publish(adapter, "acme", tags=("prod",))
        with serving(engine, settings.model_copy(update={"pin": ("acme:prod",)})):
            assert engine.pinned == {"acme:v1"} and len(store.show("acme:v1").holds) == 1
            store.publish(adapter, "acme", tags=("prod",))
            eventually(lambda: engine.pinned == {"acme:v2"})
            eventually(lambda: store.show("acme:v1").holds == ())
        assert store.show("acme:v2").holds == ()


def test_more_pins_than_leave_a_slot_for_others_are_refused(
    settings: ServeSettings, adapter: Path
) -> None:
    engine = FakeEngine(capabilities=replace(ALL, most_pins=1))
    with Store.open() as store:
        store.publish(adapter, "acme", tags=("prod",))
        store.publish(adapter, "beta")
    with serving(engine, settings.model_copy(update={"pin": ("acme", "beta")})) as running:
        eventually(lambda: running.gateway.failure is not None)
        assert "pin: 2 adapters are more than 1" in str(running.gateway.failure)
        assert not engine.pinned
    twice = settings.model_copy(update={"pin": ("acme", "acme:prod")})  # one version
    with serving(engine, twice) as running:
        assert engine.pinned == {"acme:v1"} and running.gateway.state == "ready"


def test_a_pin_that_the_engine_does_not_take_holds_nothing_and_stops_nothing(
    settings: ServeSettings, adapter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The tag's new version has no room: it is not held again with every look, other pins follow,
    and removed adapters leave the engine."""

    class Full(FakeEngine):
        tried = 0

        async def pin(self, adapter: ServedAdapter, pinned: bool) -> None:
            if adapter.id == "acme:v2":
                self.tried += 1
                raise EngineBusyError("no room")
            await super().pin(adapter, pinned)

    engine = Full()
    with Store.open() as store:
        for name in ("acme", "beta"):
            store.publish(adapter, name, tags=("prod",))
        pins = {"pin": ("acme:prod", "beta:prod"), "hold_idle_s": 0.0}
        with serving(engine, settings.model_copy(update=pins)) as running:
            for name in ("acme", "beta"):
                store.publish(adapter, name, tags=("prod",))
            eventually(lambda: engine.tried >= 3)
            assert engine.pinned == {"acme:v1", "beta:v2"}
            assert running.gateway.adapters._entries["acme:v2"].users == 0
        warned = [r for r in caplog.records if "pin: acme:prod: no room" in r.getMessage()]
        assert len(warned) == 1


def test_pins_are_told_to_an_engine_that_was_started_again(
    settings: ServeSettings, adapter: Path
) -> None:
    engine = FakeEngine()
    with Store.open() as store:
        store.publish(adapter, "acme")
    with serving(engine, settings.model_copy(update={"pin": ("acme",)})):
        engine.pinned.clear()
        engine.die()
        eventually(lambda: engine.pinned == {"acme:v1"})


def test_a_pin_that_fails_after_a_restart_does_not_keep_the_server_down(
    settings: ServeSettings, adapter: Path
) -> None:
    class Unwilling(FakeEngine):
        async def pin(self, adapter: ServedAdapter, pinned: bool) -> None:
            if self.starts > 1:
                raise EngineError("no room")
            await super().pin(adapter, pinned)

    engine = Unwilling()
    with Store.open() as store:
        store.publish(adapter, "acme")
    with serving(engine, settings.model_copy(update={"pin": ("acme",)})) as running:
        engine.die()
        eventually(lambda: engine.starts == 2 and running.gateway.state == "ready")


def test_a_merged_version_is_answered_by_its_replica(
    settings: ServeSettings, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And, while that is dead, by the adapters' engine; it is started again."""
    monkeypatch.setattr(gateway, "_LOOK_S", 0.05)
    main, replica = FakeEngine(), FakeEngine()
    made: list[ServedAdapter] = []

    def replicate(version: ServedAdapter) -> FakeEngine:
        made.append(version)
        return replica

    with Store.open() as store:
        store.publish(adapter, "acme", tags=("prod",))
        merged = settings.model_copy(update={"merge": ("acme:prod", "acme:v1")})
        with serving(main, merged, replicate=replicate) as running:
            assert [version.id for version in made] == ["acme:v1"] and replica.starts == 1
            answer = running.ask(model="acme")
            assert answer.json()["model"] == "acme:v1"
            assert (
                'replica_up{model="acme:v1"} 1.0' in running.gateway.parts.metrics.text().decode()
            )
            assert [seen.adapter for seen in replica.seen] == [None] and not main.seen
            store.publish(adapter, "acme", tags=("prod",))
            assert running.ask(model="acme:prod").json()["model"] == "acme:v2"
            replica.start_fails = ModelError("no memory")
            replica.die()
            assert (
                'replica_up{model="acme:v1"} 0.0' in running.gateway.parts.metrics.text().decode()
            )
            assert running.ask(model="acme:v1").status_code == 200
            assert [seen.adapter.id for seen in main.seen if seen.adapter] == ["acme:v2", "acme:v1"]
            eventually(lambda: replica.starts > 1)
            replica.start_fails = None
            eventually(lambda: replica.is_alive)
            assert running.ask(model="acme:v1").status_code == 200 and len(replica.seen) == 2
        assert not replica.is_alive
        assert store.show("acme:v1").holds == ()


def test_a_merged_one_may_be_of_any_rank(settings: ServeSettings, adapter: Path) -> None:
    small = replace(ALL, max_rank=2)
    with Store.open() as store:
        store.publish(adapter, "acme")
    merged = settings.model_copy(update={"merge": ("acme",)})
    engine = FakeEngine(capabilities=small)
    replica = FakeEngine()
    with serving(engine, merged, replicate=lambda _: replica) as running:
        assert running.ask(model="acme").status_code == 200
        replica.start_fails = ModelError("no memory")
        replica.die()
        assert running.ask(model="acme").status_code == 503 and not engine.seen
    with serving(engine, settings) as running:
        assert running.ask(model="acme").status_code == 400


@pytest.mark.parametrize("option", ["merge", "pin"])
def test_what_cannot_be_served_is_said_at_the_start(settings: ServeSettings, option: str) -> None:
    wanted = settings.model_copy(update={option: ("nobody",)})
    with serving(FakeEngine(), wanted) as running:
        eventually(lambda: running.gateway.failure is not None)
        assert isinstance(running.gateway.failure, BadInputError)
        assert str(running.gateway.failure).startswith(
            f"{option}: nobody: the store has no such adapter"
        )
        with running.http() as http:
            assert http.get("/health").status_code == 503
            assert http.get("/metrics").status_code == 503


def test_vllm_has_no_replicas(settings: ServeSettings, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no merged replicas"):
        make_replica(
            settings.model_copy(update={"engine": "vllm"}), ServedAdapter("a:v1", tmp_path, 1, 1)
        )


def test_heat_is_the_mean_number_of_running_answers() -> None:
    heat = Heat()
    for second in range(3600):
        heat.add("busy", 4.0, float(second))  # four that run all the time
    heat.add("once", 10.0, 3599.0)
    running = heat.mean_running(3600.0)
    assert running["busy"] == pytest.approx(4.0, rel=0.02)
    assert running["once"] < 0.05
    assert heat.mean_running(3600.0 + 3600.0)["busy"] < 0.01


def test_only_so_many_adapters_are_told_apart() -> None:
    metrics = Metrics("base", 2, places=8)
    for model in (*(f"x{number}:v1" for number in range(5)), "base"):
        metrics.ended(
            "a",
            model,
            "ok",
            prompt_tokens=1,
            completion_tokens=2,
            choices=1,
            first_token_s=0.1,
            total_s=0.2,
        )
    assert metrics.heat.mean_running(time.monotonic()).keys() == {"x0", "x1"}
    text = metrics.text().decode()
    assert 'model="base"' in text and 'model="x1"' in text and 'model="x2"' not in text
    assert f'tunefork_prompt_tokens_total{{model="{OTHER}",tenant="a"}} 3.0' in text


def test_an_adapter_is_brought_nearer_while_its_request_waits(
    settings: ServeSettings, adapter: Path
) -> None:
    engine = FakeEngine(capabilities=replace(ALL, max_requests=1))
    engine.holds = everything
    with Store.open() as store:
        store.publish(adapter, "acme")
    with serving(engine, settings) as running, ThreadPoolExecutor(2) as pool:
        first = pool.submit(running.ask)
        eventually(lambda: len(engine.open) == 1)
        second = pool.submit(running.ask, model="acme")
        eventually(lambda: "acme:v1" in engine.loaded)
        assert len(engine.seen) == 1 and not first.done()
        engine.holds = nothing
        assert second.result().status_code == 200
