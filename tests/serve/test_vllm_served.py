"""`tunefork serve --engine vllm` as a user runs it, over a real vLLM; see `vllm_cpu.sh`."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.serve.servers import eventually
from tests.serve.test_vllm_real import ARGS, PYTHON, RANKS, save_adapter, save_base
from tests.serve.test_vllm_real import pytestmark as pytestmark
from tunefork.model.fingerprint import identify
from tunefork.recipe import ModelSection
from tunefork.registry.provenance import Provenance, write_provenance
from tunefork.registry.store import Store

KEYS = ("acme", "other")


@dataclass
class Served:
    """The program, its address, and keys of two tenants."""

    process: "subprocess.Popen[str]"
    url: str
    keys: dict[str, str]
    spool: Path

    def http(self, tenant: str = "acme") -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.keys[tenant]}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def below(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("served")
    save_base(root / "tiny-base")
    environment = os.environ | {"TUNEFORK_HOME": str(root / "home"), "VLLM_CPU_KVCACHE_SPACE": "1"}
    identity = identify(ModelSection(id=str(root / "tiny-base")))
    with Store.open(root / "home") as store:
        for number, rank in enumerate(RANKS):
            save_adapter(root / "tiny-base", root / f"r{rank}", rank, number)
            told = Provenance(identity=identity, recipe={"data": {"train": "x.jsonl"}})
            write_provenance(root / f"r{rank}", told)
            store.publish(root / f"r{rank}", f"{KEYS[rank == 32]}/r{rank}")
    keys = {
        name: _run(
            environment, "serve", "keys", "add", name, "--models", f"{name}/*", "--operator"
        ).stdout.split()[-1]
        for name in KEYS
    }
    options = {
        "python": PYTHON, "args": list(ARGS), "slots": 2, "host_adapters": 3, "max_rank": 32,
        "max_requests": 8,
    }  # fmt: skip
    sets = [f"--set=vllm.{name}={json.dumps(value)}" for name, value in options.items()]
    command = ["serve", "--base", str(root / "tiny-base"), "--engine=vllm", "--port=0", *sets]
    with (root / "said").open("w") as said:
        process = subprocess.Popen([_program(), *command], env=environment, stderr=said, text=True)
    try:
        eventually(lambda: " at http://" in (root / "said").read_text(), within_s=240)
        url = (root / "said").read_text().split(" at ")[1].split()[0].split("/v1")[0]
        served = Served(process, url, keys, root / "home" / "vllm")
        wait_until_ready(served)
        yield served
    finally:
        process.kill()
        process.wait()


def _program() -> str:
    return str(Path(__file__).parents[2] / ".venv" / "bin" / "tunefork")


def _run(environment: dict[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [_program(), *arguments], env=environment, capture_output=True, text=True, check=True
    )


def wait_until_ready(served: Served, within_s: float = 180.0) -> None:
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        assert served.process.poll() is None
        if httpx.get(f"{served.url}/ready", timeout=5).status_code == 200:
            return
        time.sleep(0.5)
    raise AssertionError("never ready")


def ask(http: httpx.Client, model: str, **fields: Any) -> httpx.Response:
    asked = {"model": model, "prompt": [30, 40, 50, 60], "max_tokens": 8, "temperature": 0}
    return http.post("/v1/completions", json=asked | {"ignore_eos": True} | fields)


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def test_adapters_are_mixed_and_each_answers_as_it_does_alone(served: Served) -> None:
    asked = [("acme", "tiny-base"), ("acme", "acme/r8"), ("acme", "acme/r16:v1")]
    asked.append(("other", "other/r32"))

    def one(tenant_model: tuple[str, str]) -> str:
        with served.http(tenant_model[0]) as http:
            return text_of(ask(http, tenant_model[1]))

    alone = [one(each) for each in asked]
    assert len(set(alone)) == 4
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(one, asked * 6)) == alone * 6


def test_parameters_pass_through_the_gateway_to_vllm(served: Served) -> None:
    with served.http() as http:
        told = ask(http, "acme/r8", logprobs=2, max_tokens=3).json()["choices"][0]
        assert len(told["logprobs"]["tokens"]) == 3
        assert all(len(one) >= 2 for one in told["logprobs"]["top_logprobs"])
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


def test_tenants_do_not_share_prefixes_names_or_bills(served: Served) -> None:
    with served.http("other") as http:
        assert ask(http, "acme/r8").status_code == 404
        assert "acme" not in http.get("/v1/models").text


def test_200_clients_that_vanish_leave_nothing_in_vllm(served: Served) -> None:
    def vanish(number: int) -> None:
        model = ("tiny-base", "acme/r8", "acme/r16")[number % 3]
        fields = {"model": model, "prompt": "the quick fox", "max_tokens": 150, "stream": True}
        with served.http() as http, http.stream("POST", "/v1/completions", json=fields) as answer:
            if number % 2:
                next(answer.iter_lines())

    with ThreadPoolExecutor(40) as pool:
        list(pool.map(vanish, range(200)))
    with served.http() as http:
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


def test_a_killed_vllm_is_a_503_until_it_is_back(served: Served) -> None:
    with served.http() as http:
        before = text_of(ask(http, "acme/r8"))
        below = served.below()
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
    assert len(list(served.spool.iterdir())) == 1


def test_sigterm_ends_every_process(served: Served) -> None:
    below = served.below()
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(60) == 0
    _, alive = psutil.wait_procs(below, timeout=10)
    assert not alive
    assert not list(served.spool.iterdir())
