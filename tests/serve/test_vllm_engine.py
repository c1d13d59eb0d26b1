"""The vllm engine over a fake of vLLM that is started, killed and asked as the real one is.

That the real one understands the same is shown by `test_vllm_real.py`.
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from safetensors import safe_open

from tests.registry.artefacts import save_artefact
from tests.serve import fake_vllm
from tests.serve.servers import eventually
from tunefork.errors import (
    AdapterError,
    BadInputError,
    EngineDeadError,
    EngineError,
    NoAdapterMemoryError,
    RecipeError,
)
from tunefork.serve.engine import EngineRequest, Grammar, Piece, Sampling, ServedAdapter
from tunefork.serve.engines import vllm_adapters, watchdog
from tunefork.serve.engines.vllm import VllmEngine
from tunefork.serve.engines.vllm_base import is_built_for_cpus, save_zeros
from tunefork.serve.settings import ServeSettings, read_settings

PATIENCE_S = 60.0
"""For what must happen, on however busy a machine."""

Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stands for the interpreter that has vLLM."""
    file = tmp_path_factory.mktemp("bin") / "python"
    file.write_text(f'#!/bin/sh\nexec {sys.executable} {fake_vllm.__file__} "$@"\n')
    file.chmod(0o755)
    return file


@pytest.fixture
def run() -> Iterator[Run]:
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture
def make(
    base: Path, program: Path, run: Run, tmp_path: Path
) -> Iterator[Callable[..., VllmEngine]]:
    """Start an engine with the given settings."""
    made: list[VllmEngine] = []

    def start(**fields: Any) -> VllmEngine:
        options = {"device": "gpu", "spool": tmp_path / "spool"}
        if "url" not in fields:
            options["python"] = program
        settings = ServeSettings.model_validate({"base": str(base), "vllm": options | fields})
        made.append(VllmEngine(settings))
        run(made[-1].start())
        return made[-1]

    yield start
    for engine in made:
        run(engine.stop())


def adapter(folder: Path, name: str, rank: int = 2, **config: Any) -> ServedAdapter:
    save_artefact(folder / name, rank=rank)
    file = folder / name / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return ServedAdapter(f"{name}:v1", folder / name, rank, 1)


def request(
    adapter: ServedAdapter | None = None, first: int = 50, **sampling: Any
) -> EngineRequest:
    fields = {"max_tokens": 5, "temperature": 0.0} | sampling
    return EngineRequest(os.urandom(8).hex(), (first, 51, 52), Sampling(**fields), adapter, "acme")


async def answer(engine: VllmEngine, asked: EngineRequest) -> list[Piece]:
    return [piece async for piece in engine.generate(asked)]


def calls(engine: VllmEngine, path: str) -> list[Any]:
    assert engine._server is not None
    told = httpx.get(f"{engine._server.address}/calls").json()
    return [fields for called, fields in told if called == path]


def test_a_request_is_put_in_vllms_words(make: Any, run: Run, tmp_path: Path) -> None:
    engine = make()
    one = adapter(tmp_path, "one")
    asked = request(
        one, top_k=4, top_p=0.5, seed=7, stop=("end",), stop_ids=(2,), logit_bias={9: 1.5},
        presence_penalty=0.1, frequency_penalty=0.2, logprobs=2, ignore_eos=True,
        grammar=Grammar("regex", "a+"),
    )  # fmt: skip
    pieces = run(answer(engine, asked))
    assert [piece.token_ids for piece in pieces] == [(1001,)] * 5
    assert pieces[-1].finish_reason == "length"
    told = pieces[0].logprobs[0]
    assert (told.token_id, told.logprob) == (1001, -0.5)
    assert [(token, logprob) for token, _, logprob in told.top] == [(1001, -0.5), (1000, -1.5)]
    (sent,) = calls(engine, "/v1/completions")
    assert sent == {
        "model": "one:v1", "prompt": [50, 51, 52], "request_id": asked.id, "stream": True,
        "return_token_ids": True, "cache_salt": engine.salt("acme"), "max_tokens": 5,
        "temperature": 0.0, "top_p": 0.5, "top_k": 4, "min_p": 0.0, "seed": 7,
        "presence_penalty": 0.1, "frequency_penalty": 0.2, "repetition_penalty": 1.0,
        "stop": ["end"], "stop_token_ids": [2], "ignore_eos": True, "add_special_tokens": False,
        "logit_bias": {"9": 1.5}, "logprobs": 2, "return_tokens_as_token_ids": True,
        "structured_outputs": {"regex": "a+"},
    }  # fmt: skip
    (load,) = calls(engine, "/v1/load_lora_adapter")
    assert load["lora_name"] == "one:v1"
    shutil.rmtree(one.folder)
    assert Path(load["lora_path"], "adapter_model.safetensors").is_file(), "vLLM may read it again"
    assert engine.capabilities.max_model_len == 256
    assert "seed" in engine.capabilities.sampling
    state = engine.state()
    assert (state.healthy, state.running, state.loads, state.resident) == (True, 0, 1, ("one:v1",))
    assert engine.info()["version"] == "0.0-fake"


def test_salts_are_a_tenants_own_and_no_others_can_tell_them(make: Any) -> None:
    one, other = make(), make()
    assert one.salt("a") == one.salt("a") != one.salt("b")
    assert one.salt("a") != other.salt("a")
    assert len(one.salt("")) >= 43


def test_an_adapter_is_loaded_once_and_the_least_recently_used_leaves(
    make: Any, run: Run, tmp_path: Path
) -> None:
    engine = make(slots=1, host_adapters=2)
    a, b, c = (adapter(tmp_path, name) for name in "abc")

    async def many() -> None:
        await asyncio.gather(*(answer(engine, request(one)) for one in (a, b, a, b, a)))
        await answer(engine, request(a))
        await answer(engine, request(c))

    run(many())
    loads = [call["lora_name"] for call in calls(engine, "/v1/load_lora_adapter")]
    assert sorted(loads[:2]) == ["a:v1", "b:v1"]
    assert loads[2:] == ["c:v1"]
    assert [call["lora_name"] for call in calls(engine, "/v1/unload_lora_adapter")] == ["b:v1"]
    assert engine.state().in_host_memory == ("c:v1", "a:v1")
    assert (engine.state().loads, engine.state().evictions) == (3, 1)


def test_where_all_places_are_in_use_the_next_waits(make: Any, run: Run, tmp_path: Path) -> None:
    engine = make(slots=1, host_adapters=1)
    a, b = adapter(tmp_path, "a"), adapter(tmp_path, "b")

    async def two() -> None:
        earlier = engine.generate(request(a))
        await anext(earlier)
        await engine.prefetch(b)  # there is no place: it must not wait
        assert engine.state().in_host_memory == ("a:v1",)
        later = asyncio.create_task(answer(engine, request(b)))
        await asyncio.sleep(0.05)
        assert not later.done()
        assert sum([1 async for _ in earlier]) == 4
        await later

    run(two())
    assert engine.state().in_host_memory == ("b:v1",)


def test_one_that_waits_makes_one_leave(make: Any, run: Run, tmp_path: Path) -> None:
    engine = make(slots=1, host_adapters=3)
    leaves_slowly, b, c, d = (adapter(tmp_path, name) for name in ("slow", "b", "c", "d"))

    async def main() -> None:
        for one in (leaves_slowly, b, c):
            await answer(engine, request(one))
        waiting = asyncio.create_task(answer(engine, request(d)))
        await asyncio.sleep(0.05)
        await answer(engine, request(c))  # its end wakes who waits
        await waiting

    run(main())
    assert set(engine.state().in_host_memory) == {"b:v1", "c:v1", "d:v1"}


def test_pinned_ones_stay_and_forgotten_ones_leave_after_their_last_answer(
    make: Any, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_adapters, "_FILES_STAY_S", 0.05)
    engine = make(slots=1, host_adapters=2)
    a, b, c = (adapter(tmp_path, name) for name in "abc")

    async def main() -> None:
        await engine.pin(a, True)
        await answer(engine, request(b))
        await answer(engine, request(c))
        assert set(engine.state().in_host_memory) == {"a:v1", "c:v1"}
        stream = engine.generate(request(c, fake_vllm.IS_SLOW))
        await anext(stream)
        await engine.forget("c:v1")
        assert "c:v1" in engine.state().in_host_memory
        assert sum([1 async for _ in stream]) == 4
        assert engine.state().in_host_memory == ("a:v1",)
        await engine.forget("nobody:v1")
        assert engine._server is not None and engine._server.child is not None
        folder = engine._server.child.folder / "adapters"
        async with asyncio.timeout(PATIENCE_S):
            while len(list(folder.iterdir())) > 2:
                await asyncio.sleep(0.01)

    run(main())
    run(engine.pin(a, False))
    run(answer(engine, request(b)))
    run(answer(engine, request(c)))
    assert "a:v1" not in engine.state().in_host_memory


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "biases"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"rank_pattern": {"x": 4}}, "ranks that differ"),
        ({"r": 65}, "vllm.max_rank=65"),
        ({"r": None}, "no rank"),
    ],
)
def test_what_vllm_cannot_compute_is_refused_with_the_reason(
    make: Any, run: Run, tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    engine = make()
    with pytest.raises(AdapterError, match=said):
        run(answer(engine, request(adapter(tmp_path, "bad", **config))))
    assert calls(engine, "/v1/load_lora_adapter") == []
    assert run(answer(engine, request()))


def test_an_adapter_that_vllm_does_not_load_is_tried_again(
    make: Any, run: Run, tmp_path: Path
) -> None:
    engine = make()
    one = adapter(tmp_path, "one")
    (one.folder / "adapter_model.safetensors").rename(tmp_path / "away")

    async def both() -> list[Any]:
        asked = (answer(engine, request(one)) for _ in range(2))
        return await asyncio.gather(*asked, return_exceptions=True)

    for failure in run(both()):
        assert isinstance(failure, AdapterError)
        assert "one:v1: vLLM does not load it" in str(failure)
        assert str(tmp_path) not in str(failure)
    assert engine.state().in_host_memory == ()
    (tmp_path / "away").rename(one.folder / "adapter_model.safetensors")
    assert run(answer(engine, request(one)))


def test_a_lack_of_memory_is_not_the_adapters_fault(make: Any, run: Run, tmp_path: Path) -> None:
    engine = make()
    with pytest.raises(NoAdapterMemoryError, match="large:v1: vLLM has no memory .*max_rank"):
        run(answer(engine, request(adapter(tmp_path, "large"))))


def test_failures_of_one_answer_are_its_own(make: Any, run: Run) -> None:
    engine = make()
    for first, kind, said in (
        (fake_vllm.REFUSES, BadInputError, "prompt is not liked"),
        (fake_vllm.FAILS, EngineError, "out of luck"),
        (fake_vllm.BREAKS_OFF, EngineError, "has no end"),
    ):
        with pytest.raises(kind, match=said):
            run(answer(engine, request(first=first)))
    with pytest.raises(BadInputError, match="grammar"):
        run(answer(engine, request(grammar=Grammar("regex", "(fails"))))
    assert engine.state().healthy
    assert len(run(answer(engine, request()))) == 5


def test_a_deadline_ends_an_answer_and_its_connection(make: Any, run: Run) -> None:
    engine = make()
    asked = request(first=fake_vllm.IS_SLOW, max_tokens=100)
    pieces = run(answer(engine, replace(asked, deadline=time.monotonic() + 0.2)))
    assert len(pieces) < 100
    assert pieces[-1] == Piece("", (), finish_reason="deadline")
    assert engine.state().running == 0


def test_a_server_that_dies_is_dead_to_all_and_can_be_started_again(make: Any, run: Run) -> None:
    engine = make()

    async def die() -> Any:
        asked = [request(first=fake_vllm.IS_SLOW, max_tokens=100), request(first=fake_vllm.DIES)]
        return await asyncio.gather(*(answer(engine, one) for one in asked), return_exceptions=True)

    below = psutil.Process(engine._server.child.process.pid).children(recursive=True)
    assert len(below) == 2
    assert [type(error) for error in run(die())] == [EngineDeadError] * 2
    assert not engine.state().healthy
    with pytest.raises(EngineDeadError):
        run(answer(engine, request()))
    run(engine.stop())
    assert not psutil.wait_procs(below, timeout=PATIENCE_S)[1]
    run(engine.start())
    assert len(run(answer(engine, request()))) == 5


def test_stop_leaves_no_process_and_no_file(make: Any, run: Run, tmp_path: Path) -> None:
    engine = make()
    run(answer(engine, request(adapter(tmp_path, "one"))))
    below = psutil.Process(engine._server.child.process.pid).children(recursive=True)
    run(engine.stop())
    run(engine.stop())
    assert not psutil.wait_procs(below, timeout=PATIENCE_S)[1]
    assert list((tmp_path / "spool").iterdir()) == []
    assert not engine.state().healthy


def test_a_start_that_fails_says_why_and_leaves_nothing(
    make: Any, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM_FAILS", "1")
    with pytest.raises(EngineDeadError, match="no room for the model"):
        make()
    assert list((tmp_path / "spool").iterdir()) == []
    with pytest.raises(BadInputError, match=r"vllm\.python"):
        make(python=tmp_path / "nothing")


def test_the_watchdog_ends_all_once_its_parent_is_killed(tmp_path: Path) -> None:
    below_it = "import subprocess as s, time; s.Popen(['sleep', '60'], start_new_session=True)"
    parent_code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, start_new_session=True)\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    folder = tmp_path / "folder"
    folder.mkdir()
    command = [sys.executable, "-I", watchdog.__file__, str(folder)]
    command += [sys.executable, "-c", f"{below_it}; time.sleep(60)"]
    parent = subprocess.Popen(
        [sys.executable, "-c", parent_code, *command], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    dog = psutil.Process(int(parent.stdout.readline()))
    eventually(lambda: len(dog.children(recursive=True)) == 2)
    below = [dog, *dog.children(recursive=True)]
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert not psutil.wait_procs(below, timeout=PATIENCE_S)[1]
    assert not folder.exists()


@pytest.mark.slow
def test_a_parent_that_is_killed_takes_all_with_it(
    base: Path, program: Path, tmp_path: Path
) -> None:
    code = (
        "import asyncio, sys; from tunefork.serve.engines.vllm import VllmEngine as E\n"
        "from tunefork.serve.settings import ServeSettings as S\n"
        "async def main():\n"
        "    await E(S.model_validate_json(sys.argv[1])).start()\n"
        "    print('up', flush=True); await asyncio.sleep(60)\n"
        "asyncio.run(main())"
    )
    vllm = {"python": str(program), "device": "gpu", "spool": str(tmp_path / "spool")}
    settings = json.dumps({"base": str(base), "vllm": vllm})
    with subprocess.Popen([sys.executable, "-c", code, settings], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"up\n"
        below = psutil.Process(parent.pid).children(recursive=True)
        assert len(below) == 3  # the watchdog, the server, what that started
        parent.kill()
    assert not psutil.wait_procs(below, timeout=PATIENCE_S)[1]
    eventually(lambda: list((tmp_path / "spool").iterdir()) == [])


def test_a_server_that_runs_is_used_as_it_is_found(
    make: Any, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = make()
    a, b, c = (adapter(tmp_path, name) for name in "abc")
    monkeypatch.setenv("VLLM_TEST_KEY", running._server.child.key)
    options = {"url": str(running._server.address), "key_env": "VLLM_TEST_KEY"}
    killed = make(**options)
    run(answer(killed, request(a)))  # and it is never stopped: as a gateway that was killed

    engine = make(**options)
    assert engine.state().in_host_memory == ("a:v1",)
    run(answer(engine, request(a)))
    run(answer(engine, request(b)))
    assert calls(engine, "/v1/load_lora_adapter")[-1]["lora_path"] == str(b.folder)
    run(engine.stop())
    names = {call["lora_name"] for call in calls(running, "/v1/unload_lora_adapter")}
    assert names == {"a:v1", "b:v1"}
    assert running.state().healthy

    engine = make(**options)
    run(answer(engine, request(c)))
    other = adapter(tmp_path / "elsewhere", "c")
    with pytest.raises(AdapterError, match="other files under this name"):
        run(answer(engine, request(other)))
    with pytest.raises(EngineDeadError, match=r"vllm\.key_env"):
        make(url=options["url"])
    monkeypatch.setattr("tunefork.serve.engines.vllm_server._RUNNING_ANSWERS_S", 0.1)
    with pytest.raises(EngineDeadError, match="Is it running"):
        make(url="http://127.0.0.1:1")


def test_a_server_that_forgot_its_adapters_is_met_anew(make: Any, run: Run, tmp_path: Path) -> None:
    engine = make()
    one = adapter(tmp_path, "one")
    run(answer(engine, request(one)))
    server = engine._server
    run(server.client.post("/v1/unload_lora_adapter", json={"lora_name": "one:v1"}))
    with pytest.raises(EngineDeadError, match="knows no one:v1"):
        run(answer(engine, request(one)))
    assert not engine.state().healthy
    run(engine.stop())
    run(engine.start())
    assert run(answer(engine, request(one)))


def test_on_a_cpu_the_base_has_a_slot_of_zeros(
    make: Any, run: Run, base: Path, tmp_path: Path
) -> None:
    engine = make(device="cpu", slots=1, host_adapters=1)
    run(answer(engine, request()))
    run(answer(engine, request(adapter(tmp_path, "a"))))
    run(answer(engine, request(adapter(tmp_path, "b"))))
    asked = [call["model"] for call in calls(engine, "/v1/completions")]
    assert asked == ["tunefork-base:v0", "a:v1", "b:v1"]
    assert engine.state().in_host_memory == ("b:v1",), "it takes no place of others, nor leaves"
    assert "seed" not in engine.capabilities.sampling, "it would end the server"
    zeros = save_zeros(engine._section, tmp_path / "zeros")
    with safe_open(zeros.folder / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
        assert not any(bool(file.get_tensor(name).any()) for name in names)
    layer = "model.layers.0.self_attn.q_proj"
    assert names == [f"base_model.model.{layer}.lora_{x}.weight" for x in "AB"]
    assert run(is_built_for_cpus(Path(sys.executable)))


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ('vllm.args=["--host=0.0.0.0"]', "loopback"),
        ('vllm.args=["--api_key", "x"]', "drawn"),
        ('vllm.args=["--max-lora=3"]', "vllm.slots"),
        ("vllm.max_rank=513", "512"),
        ("vllm.slots=65", "host_adapters"),
        ("vllm.url=localhost:8000", "http://"),
        ('vllm={url: "http://x", python: /bin/true}', "python"),
        ("vllm.key_env=X", "key_env"),
    ],
)  # fmt: skip
def test_settings_that_would_break_it_are_refused(option: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        read_settings(None, {"base": "x"}, (option,))
    settings = read_settings(
        None, {"base": "x"}, ("vllm.max_rank=20", 'vllm.args=["--dtype=half"]')
    )
    assert settings.vllm.rank_step == 32
