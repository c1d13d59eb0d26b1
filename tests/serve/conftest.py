"""A base and adapters over it, made once; the tokenizers of the data's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.data.conftest import make_tokenizer
from tests.folders import save_model
from tests.recipes import make_recipe
from tests.registry.conftest import trained
from tests.serve.fake_engine import FakeEngine
from tests.serve.servers import Running, serving
from tunefork.model.fingerprint import identify
from tunefork.recipe import LoraSection, Method, ModelSection
from tunefork.registry.peft_format import save_adapter
from tunefork.registry.provenance import Provenance, write_provenance
from tunefork.registry.store import Store
from tunefork.serve.settings import ServeSettings

__all__ = ["make_recipe", "make_tokenizer"]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama's folder."""
    folder = tmp_path_factory.mktemp("base") / "tiny-base"
    save_model(folder)
    return folder


@pytest.fixture(scope="session")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter over it that changes something."""
    folder = tmp_path_factory.mktemp("adapter")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    save_adapter(trained(model, Method.LORA), folder, LoraSection(rank=4), base=str(base))
    identity = identify(ModelSection(id=str(base)))
    write_provenance(folder, Provenance(identity=identity, recipe={"data": {"train": "x.jsonl"}}))
    return folder


@pytest.fixture(autouse=True)
def quick_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a server does every second it does ten times as often, so that tests wait less."""
    monkeypatch.setattr("tunefork.serve.gateway._LOOK_S", 0.1)
    monkeypatch.setattr("tunefork.serve.engines.vllm_server._READY_LOOK_S", 0.025)
    monkeypatch.setattr("tunefork.serve.revival._FIRST_S", 0.1)


@pytest.fixture
def settings(base: Path) -> ServeSettings:
    return ServeSettings.model_validate({"base": str(base), "hold_idle_s": 0.0})


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def server(engine: FakeEngine, settings: ServeSettings) -> Iterator[Running]:
    """A server of the test's own."""
    with serving(engine, settings) as running:
        yield running


@pytest.fixture(scope="module")
def shared(
    base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """A server that a module's tests have in common, with the adapter support/acme:prod."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNEFORK_HOME", str(tmp_path_factory.mktemp("served")))
        with Store.open() as store:
            store.publish(adapter, "support/acme", tags=("prod",))
        settings = ServeSettings.model_validate({"base": str(base)})
        with serving(FakeEngine(), settings) as running:
            with running.http() as http:
                assert http.get("/v1/models").status_code == 200  # opens this home's store
            yield running
