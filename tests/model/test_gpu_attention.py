"""Attention within segments on a GPU: exact, repeatable, compiled, captured, never waiting.

Tolerances: bf16 rounds at 2^-8 = 0.004. A kernel rounds its inputs' products, weights and result
so; its error against float64 may be 1 % of the result's norm, or twice that of the masked kernel
that it replaces. Of two bf16 models' losses and gradients, whose kernels differ in
each of two layers, 1 % and 5 %.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig

from tests.data.test_pack import random_examples
from tunefork.data.bucket import padded, size_of
from tunefork.data.pack import MicroBatch, Segments, pack
from tunefork.model.attention import NAME, register
from tunefork.model.attention_reference import reference, sees
from tunefork.model.head import Head, find_head
from tunefork.model.kept_attention import Results, has_cudnn
from tunefork.model.packed_attention import flash, in_place_of_mask, packed_attention
from tunefork.train.deterministic import deterministic
from tunefork.train.kernels import attention_kernels
from tunefork.train.loss import loss_sum
from tunefork.train.runner import _inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda", 0)
LENGTHS = [300, 17, 1, 129, 64, 513]
LAYOUTS = [LENGTHS, [1024], [40, 0, 60, 0, 0]]

_States = tuple[Tensor, Tensor, Tensor]


def _states(tokens: int, heads: int, kv_heads: int, features: int) -> _States:
    torch.manual_seed(0)

    def draw(count: int) -> Tensor:
        drawn = torch.randn(tokens, count, features, device=DEVICE, dtype=torch.bfloat16)
        return drawn.requires_grad_()

    return draw(heads), draw(kv_heads), draw(kv_heads)


def _starts(lengths: list[int]) -> Tensor:
    return Segments.of(lengths, rows=1).starts.to(DEVICE)


def _with_gradients(attend: Callable[..., Tensor], states: _States) -> list[Tensor]:
    """The output and the three gradients, for one upstream gradient."""
    out = attend(*states)
    torch.manual_seed(1)
    upstream = torch.randn(out.shape, device=DEVICE).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, states, upstream)]


def _exact(states: _States, starts: Tensor, window: int | None) -> list[Tensor]:
    """`reference` in float64."""
    q, k, v = (x.detach().double().requires_grad_() for x in states)
    torch.manual_seed(1)
    upstream = torch.randn(q.shape, device=DEVICE).to(torch.bfloat16).double()
    out = reference(q, k, v, starts, 0, scale=0.1, window=window)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), upstream)]


def _masked(starts: Tensor, window: int | None) -> Callable[..., Tensor]:
    """What it replaces: SDPA with a dense mask, heads repeated."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (
            x.repeat_interleave(q.shape[1] // x.shape[1], dim=1).transpose(0, 1)[None]
            for x in (q, k, v)
        )
        mask = sees(starts, q.shape[2], window)
        with attention_kernels():
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.1)
        return out[0].transpose(0, 1)

    return attend


def _error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("features", [64, 128, 256])
@pytest.mark.parametrize(("lengths", "rows"), [(LENGTHS, 1), ([512] * 4, 4)])
def test_what_was_kept_gives_what_is_made_again(
    lengths: list[int], rows: int, features: int
) -> None:
    """By flash over segments, and by cuDNN where rows are whole."""
    length = sum(lengths) // rows
    told = in_place_of_mask(Segments.of(lengths, rows=rows), length)
    told = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in told.items()}
    states = _states(sum(lengths), 8, 2, features)
    module = torch.nn.Identity()

    def attend(*states: Tensor, results: Results | None = None) -> Tensor:
        q, k, v = (x.view(rows, length, *x.shape[1:]).transpose(1, 2) for x in states)
        options: dict[str, Any] = told | {"dropout": 0.0, "attention_results": results}
        return packed_attention(module, q, k, v, scaling=0.1, **options)

    results = Results(has_cudnn(DEVICE), [])
    with torch.no_grad():
        first = attend(*states, results=results)
    made = _with_gradients(attend, states)
    given = _with_gradients(partial(attend, results=results), states)
    assert results.kept == [] and torch.equal(first, given[0])
    for name, got, want in zip(("out", "dq", "dk", "dv"), given, made, strict=True):
        assert _error(got, want.double()) < 0.01, name


@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize("features", [8, 64, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2)])
@pytest.mark.parametrize("lengths", LAYOUTS)
def test_flash_is_the_definition(
    lengths: list[int], heads: int, kv_heads: int, features: int, window: int | None
) -> None:
    states, starts = _states(sum(lengths), heads, kv_heads, features), _starts(lengths)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash(q, k, v, starts, 1024, scale=0.1, window=window)

    exact = _exact(states, starts, window)
    actual = _with_gradients(attend, states)
    dense = _with_gradients(_masked(starts, window), states)
    for name, got, old, want in zip(("out", "dq", "dk", "dv"), actual, dense, exact, strict=True):
        if window == 1 and name in ("dq", "dk"):  # one token is seen: no gradient, but rounding
            assert float(got.double().abs().max()) < 0.05
            continue
        assert _error(got, want) < max(2 * _error(old, want), 0.01), name
    # And a wrong segmentation would be seen.
    q, k, v = states
    wrong = flash(q, k, v, _starts([sum(lengths)]), 1024, scale=0.1).detach()
    if len(lengths) > 1 and window != 1:
        assert _error(wrong, exact[0]) > 0.05


class _Module(nn.Module):
    is_causal = True


def _packed(segments: Segments, rows: int, **options: Any) -> Callable[..., Tensor]:
    """`packed_attention` of (N, H, E) states, laid out in rows."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        told = in_place_of_mask(segments, q.shape[0] // rows)
        del told["attention_mask"]
        q, k, v = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in (q, k, v))
        out = packed_attention(_Module(), q, k, v, dropout=0.0, scaling=0.1, **told, **options)
        return out.flatten(0, 1)

    return attend


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("features", [64, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2)])
def test_whole_rows_are_the_definition(
    heads: int, kv_heads: int, features: int, window: int | None
) -> None:
    rows, length = 3, 256
    segments = Segments.of([length] * rows, rows=rows).to(DEVICE)
    states = _states(rows * length, heads, kv_heads, features)
    exact = _exact(states, segments.starts, window)
    actual = _with_gradients(_packed(segments, rows, sliding_window=window), states)
    for got, want in zip(actual, exact, strict=True):
        assert _error(got, want) < 0.01


@pytest.mark.filterwarnings("ignore")  # the profiler's
def test_whole_rows_are_cudnn_s_work() -> None:
    """On Hopper and later; grouped heads are not repeated for it."""
    if torch.cuda.get_device_capability(DEVICE)[0] < 9:
        pytest.skip("cuDNN's attention is the faster one from Hopper on")
    segments = Segments.of([2048] * 2, rows=2).to(DEVICE)
    q, k, v = _states(4096, 8, 2, 128)
    with torch.profiler.profile() as profile:
        _packed(segments, 2)(q, k, v)
    names = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_cudnn_attention" in names
    assert "aten::repeat_interleave" not in names


@pytest.mark.parametrize("is_uniform", [True, False])
def test_deterministic_runs_repeat(is_uniform: bool) -> None:
    rows, lengths = (4, [1024] * 4) if is_uniform else (1, [3000, 700, 396])
    segments = Segments.of(lengths, rows=rows).to(DEVICE)
    states = _states(sum(lengths), 8, 2, 128)
    with deterministic(True):
        first = _with_gradients(_packed(segments, rows), states)
        for _ in range(4):
            again = _with_gradients(_packed(segments, rows), states)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def _shape(features: int) -> dict[str, Any]:
    return {
        "vocab_size": 64,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": features,
        "max_position_embeddings": 2048,
    }


CONFIGS: dict[str, PretrainedConfig] = {
    "64 features": LlamaConfig(**_shape(64)),
    "128 features": LlamaConfig(**_shape(128)),
    "a window": MistralConfig(**_shape(64), sliding_window=50),
}


def _model(name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    register()
    torch.manual_seed(0)
    config = type(CONFIGS[name]).from_dict(CONFIGS[name].to_dict())
    model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME, dtype=dtype)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model.to(DEVICE).train()


def _batch(lengths: list[int], seed: int = 0, row_length: int = 512) -> MicroBatch:
    examples = random_examples(lengths, seed)
    [batch] = pack(examples, max_tokens=10**4, packing=True, row_length=row_length)
    return batch


PACKED, UNIFORM = [300, 17, 129, 64, 480], [512, 512, 512]


def _gradients(model: Any, head: Head, batch: MicroBatch) -> tuple[Tensor, list[Tensor]]:
    with attention_kernels():
        loss = loss_sum(model, head, batch)
        found = torch.autograd.grad(loss, list(model.parameters()))
    return loss.detach(), list(found)


def _assert_alike(
    actual: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]
) -> None:
    torch.testing.assert_close(actual[0], expected[0], rtol=0.01, atol=0.0)
    for got, want in zip(actual[1], expected[1], strict=True):
        assert _error(got, want.double()) < 0.05


@pytest.mark.parametrize("lengths", [PACKED, UNIFORM])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_trains_as_with_the_mask(name: str, lengths: list[int]) -> None:
    model, batch = _model(name), _batch(lengths).to(DEVICE)
    head = find_head(model)
    assert head.takes_segments
    assert batch.segments.is_uniform == (lengths == UNIFORM)
    by_mask = _gradients(model, replace(head, takes_segments=False), batch)
    _assert_alike(_gradients(model, head, batch), by_mask)


def test_fp32_keeps_the_mask() -> None:
    assert not find_head(_model("64 features", torch.float32)).takes_segments


@contextmanager
def _no_waiting() -> Iterator[None]:
    """While entered, whatever waits for the GPU raises."""
    torch.cuda.synchronize(DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore")  # PyTorch says that this mode is a prototype
@pytest.mark.parametrize("lengths", [PACKED, UNIFORM])
def test_nothing_waits_for_the_gpu(lengths: list[int]) -> None:
    model, batch = _model("a window"), _batch(lengths).to(DEVICE)
    head = find_head(model)
    for _ in range(2):  # cuBLAS and cuDNN make themselves ready in the first
        _gradients(model, head, batch)
    with _no_waiting():
        _gradients(model, head, batch)
    # The test would see it: making the mask waits.
    with _no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        _gradients(model, replace(head, takes_segments=False), batch)


@pytest.mark.filterwarnings("ignore")  # inductor's advice
@pytest.mark.parametrize("name", CONFIGS)
def test_compiled_layers(name: str) -> None:
    model = _model(name)
    head = find_head(model)
    torch._dynamo.reset()
    counters.clear()
    for layer in model.base_model.layers:
        layer.compile(fullgraph=True)
    for seed, lengths in enumerate(([300, 17, 129], [64, 480, 30, 9], [200] * 7, [512], [700, 5])):
        batch = _batch(lengths, seed, row_length=4096).to(DEVICE)
        compiled = _gradients(model, head, batch)
        with torch.compiler.set_stance("force_eager"):
            eager = _gradients(model, replace(head, takes_segments=False), batch)
        _assert_alike(compiled, eager)
    # Rows of one segment (512) have code of their own; each of the two is made at most twice,
    # for either layer: here each is compiled by itself.
    assert counters["stats"]["unique_graphs"] <= 8
    torch._dynamo.reset()


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lengths", [PACKED, UNIFORM])
def test_captured_and_replayed_with_other_batches(lengths: list[int], is_compiled: bool) -> None:
    model = _model("a window" if lengths == PACKED else "128 features")
    # PyTorch's loss: the fused kernel's place for ignored labels is tested with it.
    head = replace(find_head(model), is_plain=False)
    torch._dynamo.reset()
    if is_compiled:
        for layer in model.base_model.layers:
            layer.compile(fullgraph=True)
    size = size_of(_batch(lengths))
    size = replace(size, supervised=size.supervised + 64)
    batches = [padded(_batch(lengths, seed), size) for seed in range(3)]
    static = batches[0].to(DEVICE)

    def step() -> Tensor:
        model.zero_grad(set_to_none=False)
        with attention_kernels():
            loss = loss_sum(model, head, static)
            loss.backward()
        return loss.detach()

    stream = torch.cuda.Stream(DEVICE)
    stream.wait_stream(torch.cuda.current_stream(DEVICE))
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream(DEVICE).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for batch in batches[1:]:
        for ours, theirs in zip(_inputs(static), _inputs(batch), strict=True):
            ours.copy_(theirs)
        graph.replay()
        found = loss.clone(), [parameter.grad.clone() for parameter in model.parameters()]
        with torch.compiler.set_stance("force_eager"):
            _assert_alike(found, _gradients(model, head, batch.to(DEVICE)))
    torch._dynamo.reset()
