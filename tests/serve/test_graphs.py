"""What cannot be captured is launched: without compiled layers first, then without graphs."""

from typing import Any

import pytest
import torch

from tests.tiny import tiny_model
from tunefork.model.layers import decoder_layers
from tunefork.serve.engines.compiled_layers import CompiledLayers
from tunefork.serve.engines.graphs import Graphs, Key


class _Layers:
    def __init__(self) -> None:
        self.was_removed = False

    def remove(self) -> None:
        self.was_removed = True


def _graphs(compiled: Any, *, max_tokens: int = 2048, max_rows: int = 64) -> Graphs:
    return Graphs(
        lambda key: ("launched", key),
        torch.device("cpu"),
        max_rows=max_rows,
        max_tokens=max_tokens,
        max_model_len=2048,
        compiled=compiled,
    )


def test_a_pass_that_cannot_be_captured_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(graphs: Graphs, key: Key) -> None:
        raise ValueError("an operator\nsynchronises")

    monkeypatch.setattr(Graphs, "_capture", fails)
    layers = _Layers()
    graphs = _graphs(layers)
    key = graphs.key(5, 100, has_adapters=True)
    with pytest.warns(UserWarning) as told:
        assert graphs.outcome(key) == ("launched", Key(8, 512, True))
    assert [str(one.message).split(":")[0] for one in told] == [
        "embedded.compile",
        "embedded.cuda_graphs",
    ]
    assert layers.was_removed and graphs.compiled is None and not graphs.is_on
    assert graphs.outcome(key) == ("launched", key)  # and nothing is said twice


def test_layers_that_are_compiled_no_more_run_as_written() -> None:
    model = tiny_model()
    compiled = CompiledLayers(model, lambda function, **_: function)
    assert all("forward" in vars(layer) for layer in decoder_layers(model))
    compiled.remove()
    assert not any("forward" in vars(layer) for layer in decoder_layers(model))


def test_want_of_memory_is_no_word_on_other_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(graphs: Graphs, key: Key) -> None:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(Graphs, "_capture", fails)
    graphs = _graphs(None)
    with pytest.raises(torch.OutOfMemoryError):
        graphs.outcome(graphs.key(1, 1, has_adapters=False))
    assert graphs.is_on


def test_few_sizes_serve_all_passes() -> None:
    graphs = _graphs(None)
    assert {graphs.filled(rows) for rows in range(1, 65)} == {2, 4, 8, *range(16, 65, 8)}
    assert {graphs.key(4, k, has_adapters=False).longest_k for k in (1, 512, 513, 2048)} == {
        512,
        2048,
    }
    assert graphs.key(40, 1, has_adapters=False).longest_k == 2048
