"""`tunefork serve --engine vllm` as a user runs it, over a real vLLM; see `vllm_cpu.sh`."""

import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
import pytest

from tests.serve.programs import Program, served
from tests.serve.test_abuse import draw_and_send, is_as_before
from tests.serve.test_vllm_real import ARGS, PYTHON, RANKS, save_adapter, save_base
from tests.serve.test_vllm_real import pytestmark as pytestmark
from tunefork.model.fingerprint import identify
from tunefork.recipe import ModelSection
from tunefork.registry.provenance import Provenance, write_provenance


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    root = tmp_path_factory.mktemp("served")
    save_base(root / "tiny-base")
    identity = identify(ModelSection(id=str(root / "tiny-base")))
    adapters = {}
    for number, rank in enumerate(RANKS):
        folder = adapters[f"{'other' if rank == 32 else 'acme'}/r{rank}"] = root / f"r{rank}"
        save_adapter(root / "tiny-base", folder, rank, number)
        told = Provenance(identity=identity, recipe={"data": {"train": "x.jsonl"}})
        write_provenance(folder, told)
    settings: dict[str, object] = {
        "engine": "vllm", "vllm.python": PYTHON, "vllm.args": list(ARGS), "vllm.slots": 2,
        "vllm.host_adapters": 3, "vllm.log": str(root / "vllm.log"), "vllm.max_rank": 32,
        "vllm.max_requests": 8,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        with served(
            root / "tiny-base",
            root,
            adapters=adapters,
            tenants=("acme", "other"),
            settings=settings,
        ) as program:
            yield program


def ask(http: httpx.Client, model: str, **fields: Any) -> httpx.Response:
    asked = {"model": model, "prompt": [30, 40, 50, 60], "max_tokens": 8, "temperature": 0}
    return http.post("/v1/completions", json=asked | {"ignore_eos": True} | fields)


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def test_adapters_are_mixed_and_each_answers_as_it_does_alone(program: Program) -> None:
    asked = [("acme", "tiny-base"), ("acme", "acme/r8"), ("acme", "acme/r16:v1")]
    asked.append(("other", "other/r32"))

    def one(tenant_model: tuple[str, str]) -> str:
        with program.http(tenant_model[0]) as http:
            return text_of(ask(http, tenant_model[1]))

    alone = [one(each) for each in asked]
    assert len(set(alone)) == 4
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(one, asked * 6)) == alone * 6


def test_parameters_pass_through_the_gateway_to_vllm(program: Program) -> None:
    with program.http("acme") as http:
        told = ask(http, "acme/r8", logprobs=2, max_tokens=3).json()["choices"][0]
        assert len(told["logprobs"]["tokens"]) == 3
        assert all(len(one) >= 1 for one in told["logprobs"]["top_logprobs"])
        turn = [{"role": "user", "content": "hello dog"}]
        schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
                  "additionalProperties": False}  # fmt: skip
        named = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        chat = http.post(
            "/v1/chat/completions",
            json={"model": "tiny-base", "messages": turn, "response_format": named,
                  "max_tokens": 60, "temperature": 0},
        )  # fmt: skip
        assert chat.status_code == 200, chat.text
        choice = chat.json()["choices"][0]
        assert choice["finish_reason"] == "length" or json.loads(choice["message"]["content"])


def test_tenants_do_not_share_prefixes_names_or_bills(program: Program) -> None:
    with program.http("other") as http:
        assert ask(http, "acme/r8").status_code == 404
        assert "acme" not in http.get("/v1/models").text


@dataclass(frozen=True)
class AsTenant:
    """The program, with a tenant's key in every request."""

    program: Program
    url: str

    def http(self) -> httpx.Client:
        return self.program.http("acme")


def test_hostile_requests_reach_vllm_only_where_they_are_valid(program: Program) -> None:
    server = AsTenant(program, program.url)
    models = ["tiny-base", "acme/r8:prod", "acme/r16"]
    # vLLM's threads take every core that there is: the gateway waits for one
    seen = draw_and_send(server, 300, 1, models, without="seed", health_s=5.0)
    assert seen.answered >= 60, seen.statuses
    is_as_before(server)


def test_200_clients_that_vanish_leave_nothing_in_vllm(program: Program) -> None:
    def vanish(number: int) -> None:
        model = ("tiny-base", "acme/r8", "acme/r16")[number % 3]
        fields = {"model": model, "prompt": "the quick fox", "max_tokens": 150, "stream": True}
        with (
            program.http("acme") as http,
            http.stream("POST", "/v1/completions", json=fields) as answer,
        ):
            if number % 2:
                next(answer.iter_lines())

    with ThreadPoolExecutor(40) as pool:
        list(pool.map(vanish, range(200)))
    with program.http("acme") as http:
        assert text_of(ask(http, "acme/r8"))
        for _ in range(100):
            metrics = http.get("/metrics").text
            running = [line for line in metrics.splitlines() if "tunefork_engine_running" in line]
            if not running or all(line.endswith(" 0.0") for line in running if line[0] != "#"):
                break
            time.sleep(0.1)
        began = time.monotonic()
        assert text_of(ask(http, "acme/r16"))
        assert time.monotonic() - began < 5


def test_a_killed_vllm_is_a_503_until_it_is_back(program: Program) -> None:
    with program.http("acme") as http:
        before = text_of(ask(http, "acme/r8"))
        below = program.below()
        max(below, key=lambda one: len(one.parents())).kill()
        time.sleep(0.3)
        answer = ask(http, "acme/r8")
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert http.get("/health", timeout=1).status_code == 200
        until = time.monotonic() + 240
        while (answer := ask(http, "acme/r8")).status_code == 503 and time.monotonic() < until:
            assert int(answer.headers["retry-after"]) >= 1
            time.sleep(1)
        assert text_of(answer) == before
    gone, _ = psutil.wait_procs(below, timeout=5)
    assert len(gone) == len(below)
    assert len(list((program.home / "vllm").iterdir())) == 1


def test_sigterm_ends_every_process(program: Program) -> None:
    below = program.below()
    program.process.send_signal(signal.SIGTERM)
    assert program.process.wait(60) == 0
    _, alive = psutil.wait_procs(below, timeout=10)
    assert not alive
    assert not list((program.home / "vllm").iterdir())
