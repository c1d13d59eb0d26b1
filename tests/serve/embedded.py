"""Engines over tiny bases, and adapters for them made by the PEFT library."""

import asyncio
import copy
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.folders import save_model
from tunefork.recipe import ModelSection
from tunefork.serve.engine import EngineRequest, EngineState, Piece, Sampling, ServedAdapter
from tunefork.serve.engines.embedded import EmbeddedEngine
from tunefork.serve.engines.embedded_settings import EmbeddedSettings
from tunefork.serve.settings import ServeSettings


def save_adapter(
    model: Any,
    folder: Path,
    *,
    rank: int,
    seed: int,
    size: float = 1.0,
    targets: str | list[str] | None = None,
) -> ServedAdapter:
    """A PEFT adapter that changes what `model` says; `model` comes back as it was."""
    torch.manual_seed(seed)
    if targets is None:
        targets = "all-linear" if seed % 2 else ["q_proj", "v_proj", "down_proj"]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) / parameter.shape[1] ** 0.5
            parameter.data *= size if "lora_B" in name else 1.0
    wrapped.save_pretrained(folder)
    wrapped.unload()
    if hasattr(model, "peft_config"):
        del model.peft_config
    return ServedAdapter(f"{folder.name}:v1", folder, rank, 0)


def base_folder(folder: Path, name: str = "llama") -> Any:
    """Save a tiny base with a tokenizer; returns the model."""
    return save_model(folder, name)


def settings(base: Path, **embedded: Any) -> ServeSettings:
    """Of an engine on the CPU in fp32."""
    fields = {"device": "cpu", "dtype": "fp32", "slots": 4, "max_rank": 64, "cache_tokens": 8192}
    own = EmbeddedSettings.model_validate(fields | embedded)
    return ServeSettings(base=ModelSection(id=str(base)), embedded=own)


class Peft:
    """What PEFT's `generate` says: adapters are loaded once, and the same is asked once."""

    def __init__(self, model: Any) -> None:
        """Of adapters over `model`, which is left as it is."""
        self._model = copy.deepcopy(model)
        self._loaded: list[ServedAdapter] = []
        self._said: dict[Any, list[int]] = {}

    def says(self, adapter: ServedAdapter | None, prompt: Sequence[int], new: int) -> list[int]:
        """The next `new` tokens."""
        key = (adapter, tuple(prompt), new)
        if key not in self._said:
            with self._reading(adapter):
                self._said[key] = self._generate(list(prompt), new)
        return self._said[key]

    def _reading(self, adapter: ServedAdapter | None) -> AbstractContextManager[Any]:
        if adapter is None:
            return self._model.disable_adapter() if self._loaded else nullcontext()
        if adapter not in self._loaded:
            name = str(len(self._loaded))
            if self._loaded:
                self._model.load_adapter(adapter.folder, name)
            else:
                self._model = PeftModel.from_pretrained(self._model, adapter.folder, name).eval()
            self._loaded.append(adapter)
        self._model.set_adapter(str(self._loaded.index(adapter)))
        return nullcontext()

    def _generate(self, prompt: list[int], new: int) -> list[int]:
        ids = torch.tensor([prompt])
        out = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
        return [int(token) for token in out[0, len(prompt) :]]


def request(
    name: str,
    prompt: Sequence[int],
    adapter: ServedAdapter | None = None,
    *,
    tenant: str = "",
    deadline: float | None = None,
    **sampling: Any,
) -> EngineRequest:
    """Greedy unless told otherwise."""
    options = {"max_tokens": 8, "temperature": 0.0} | sampling
    return EngineRequest(name, tuple(prompt), Sampling(**options), adapter, tenant, deadline)


async def answer(engine: EmbeddedEngine, wanted: EngineRequest) -> Piece:
    """All pieces as one."""
    pieces = [piece async for piece in engine.generate(wanted)]
    return Piece(
        "".join(piece.text for piece in pieces),
        tuple(token for piece in pieces for token in piece.token_ids),
        tuple(logprob for piece in pieces for logprob in piece.logprobs),
        pieces[-1].finish_reason,
    )


async def answers(engine: EmbeddedEngine, wanted: Sequence[EngineRequest]) -> list[Piece]:
    """Of all requests at once."""
    return list(await asyncio.gather(*(answer(engine, one) for one in wanted)))


@asynccontextmanager
async def started(base: Path, **embedded: Any) -> AsyncIterator[EmbeddedEngine]:
    """An engine that runs, and has given everything back when all is over."""
    engine = EmbeddedEngine(settings(base, **embedded))
    await engine.start()
    try:
        yield engine
        if engine.state().healthy:
            await idle(engine)
    finally:
        await engine.stop()


def held_after(engine: EmbeddedEngine, passes: int) -> threading.Event:
    """It computes so many passes more, and the next ones once the event is set."""
    assert engine._parts is not None
    compute, may_go_on, left = engine._parts.core.passes.run, threading.Event(), passes

    def run(parts: Any, follows: Any = None) -> Any:
        nonlocal left
        left -= 1
        assert left >= 0 or may_go_on.wait(60)
        return compute(parts, follows)

    engine._parts.core.passes.run = run  # type: ignore[method-assign]
    return may_go_on


async def until(is_so: Callable[[], object]) -> None:
    """Wait for it, on however busy a machine."""
    async with asyncio.timeout(60):
        while not is_so():
            await asyncio.sleep(0.005)


async def idle(engine: EmbeddedEngine) -> EngineState:
    """The state once nothing runs; every token of the cache is free again."""
    await until(lambda: not engine.state().running and not engine.state().waiting)
    state = engine.state()
    assert state.free_cache_tokens == state.total_cache_tokens
    return state
