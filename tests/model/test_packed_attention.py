"""Attention within segments: the definition, what is refused, and that compiled code is kept."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.functional import scaled_dot_product_attention

from tests.tiny import tiny_model
from tunefork.data.pack import Segments
from tunefork.model import attention
from tunefork.model.attention_reference import reference
from tunefork.model.packed_attention import flash, in_place_of_mask


class _Module(nn.Module):
    is_causal = True


_States = tuple[Tensor, Tensor, Tensor]


def _states(tokens: int, heads: int, kv_heads: int, features: int = 8) -> _States:
    torch.manual_seed(0)

    def draw(count: int) -> Tensor:
        return torch.randn(tokens, count, features, dtype=torch.float64, requires_grad=True)

    return draw(heads), draw(kv_heads), draw(kv_heads)


def _by_row(states: _States, rows: int) -> _States:
    q, k, v = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in states)
    return q, k, v


def _apart(states: _States, lengths: list[int], scale: float, window: int | None) -> Tensor:
    """Each segment by itself, by PyTorch's attention."""
    found = []
    for q, k, v in zip(*(x.split(lengths) for x in states), strict=True):
        at = torch.arange(len(q))
        mask = at[:, None] >= at
        if window is not None:
            mask = mask & (at[:, None] - at < window)
        by_head = [x.transpose(0, 1)[None] for x in (q, k, v)]
        out = scaled_dot_product_attention(
            by_head[0], by_head[1], by_head[2], attn_mask=mask, scale=scale, enable_gqa=True
        )
        found.append(out[0].transpose(0, 1))
    return torch.cat(found)


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[5, 1, 9, 3], [7], [4, 0, 6, 0, 0]])
def test_the_reference_is_each_segment_alone(
    lengths: list[int], kv_heads: int, window: int | None
) -> None:
    states = _states(sum(lengths), 4, kv_heads)
    starts = Segments.of(lengths, rows=1).starts
    actual = reference(*states, starts, 9, scale=0.3, window=window)
    expected = _apart(states, lengths, 0.3, window)
    torch.testing.assert_close(actual, expected)
    upstream = torch.randn_like(expected)
    for got, want in zip(
        torch.autograd.grad(actual, states, upstream),
        torch.autograd.grad(expected, states, upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_rows_are_flattened_and_put_back() -> None:
    rows, length, lengths = 2, 12, [5, 7, 9, 3]
    states = _states(rows * length, 4, 2)
    told = in_place_of_mask(Segments.of(lengths, rows=rows), length)
    by_row = _by_row(states, rows)
    for scaling in (None, 0.2):
        out, weights = attention.attention(_Module(), *by_row, **told, scaling=scaling)
        assert weights is None
        expected = _apart(states, lengths, 8**-0.5 if scaling is None else scaling, None)
        torch.testing.assert_close(out.flatten(0, 1), expected)


@pytest.mark.parametrize("window", [None, 5, 128])
def test_whole_rows(window: int | None) -> None:
    rows, length = 2, 128
    states = _states(rows * length, 4, 2)
    told = in_place_of_mask(Segments.of([length] * rows, rows=rows), length)
    assert told["whole_rows"]
    by_row = _by_row(states, rows)
    out, _ = attention.attention(_Module(), *by_row, **told, sliding_window=window)
    expected = _apart(states, [length] * rows, 8**-0.5, window)
    torch.testing.assert_close(out.flatten(0, 1), expected)


def test_which_rows_are_whole() -> None:
    assert not in_place_of_mask(Segments.of([100] * 2, rows=2), 100)["whole_rows"]
    assert not in_place_of_mask(Segments.of([100, 28, 128], rows=2), 128)["whole_rows"]
    assert in_place_of_mask(Segments.of([129], rows=1), 129)["max_length_q"] == 256


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("softcap", {"softcap": 30.0}),
    ("s_aux", {"s_aux": torch.zeros(4)}),
    ("position_bias", {"position_bias": torch.zeros(1)}),
    ("dropout", {"dropout": 0.1}),
    ("later tokens", {"is_causal": False}),
]


@pytest.mark.parametrize(("why", "options"), REFUSED)
def test_what_the_kernels_cannot_express_is_refused(why: str, options: dict[str, Any]) -> None:
    x = torch.zeros(1, 4, 8, 8)
    told = in_place_of_mask(Segments.of([5, 3], rows=1), 8)
    with pytest.raises(ValueError, match=why):
        attention.attention(_Module(), x, x, x, **told, **options)


def test_shapes_that_are_refused() -> None:
    told = in_place_of_mask(Segments.of([5, 3], rows=1), 8)
    x, odd, large = (torch.zeros(1, 4, 8, features) for features in (8, 12, 264))
    for states, why in (
        ((odd, odd, odd), "12 features"),
        ((large, large, large), "264 features"),
        ((x, x, torch.zeros(1, 4, 8, 16)), "values 16"),
        ((x, torch.zeros(1, 4, 9, 8), torch.zeros(1, 4, 9, 8)), "a cache"),
    ):
        with pytest.raises(ValueError, match=why):
            attention.attention(_Module(), *states, **told)


def test_a_model_that_is_not_told_stops() -> None:
    x = torch.zeros(1, 4, 8, 8)
    told = in_place_of_mask(Segments.of([5, 3], rows=1), 8)
    with pytest.raises(ValueError, match="_Module is not told the segments"):
        attention.attention(_Module(), x, x, x, told["attention_mask"])
    # Nor does PyTorch take for a mask what stands in its place.
    with pytest.raises(RuntimeError):
        scaled_dot_product_attention(x, x, x, attn_mask=told["attention_mask"])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo
def test_layers_are_compiled_at_most_twice() -> None:
    """Tokens, segments and the longest one change; from the second shape on they are dynamic."""
    attention.register()
    model = tiny_model("llama", attn_implementation=attention.NAME)
    torch._dynamo.reset()
    counters.clear()
    for layer in model.base_model.layers:
        layer.compile(backend="eager", fullgraph=True)
    for lengths in ([9, 3], [20, 30, 40], [150, 2], [300], [5] * 7, [64, 64]):
        segments = Segments.of(lengths, rows=1)
        tokens = sum(lengths)
        ids = torch.arange(tokens)[None] % 90
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
        compiled = model.base_model(**inputs, **in_place_of_mask(segments, tokens))
        with torch.compiler.set_stance("force_eager"):
            dense = model.base_model(**inputs)
        torch.testing.assert_close(compiled.last_hidden_state, dense.last_hidden_state)
    assert counters["stats"]["unique_graphs"] <= 2
    torch._dynamo.reset()


def test_the_kernel_is_compiled_at_most_twice() -> None:
    """On the meta device the operator itself is traced, with the gradient that it has."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(flash, backend="aot_eager", fullgraph=True)
    for tokens, segments, longest in ((100, 4, 128), (200, 7, 256), (300, 9, 512), (50, 3, 1024)):
        with torch.device("meta"):
            q = torch.empty(tokens, 4, 64, dtype=torch.bfloat16, requires_grad=True)
            k = torch.empty(tokens, 2, 64, dtype=torch.bfloat16, requires_grad=True)
            starts = torch.empty(segments + 1, dtype=torch.int32)
        out = compiled(q, k, k, starts, longest, scale=0.1, window=3)
        assert out.shape == q.shape
        out.sum().backward()
        assert q.grad is not None and k.grad is not None and k.grad.shape == k.shape
    assert counters["stats"]["unique_graphs"] <= 2
    torch._dynamo.reset()


def test_the_definition_would_show_a_leak() -> None:
    states = _states(10, 4, 2)
    out = reference(*states, torch.tensor([0, 4, 10]), 6, scale=1.0)
    leaking = reference(*states, torch.tensor([0, 10]), 10, scale=1.0)
    assert (out - leaking)[:4].abs().max() == 0
    assert (out - leaking)[4:].abs().max() > 0.1
