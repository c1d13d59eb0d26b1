"""Tracing: two depths give the whole, and the meta device gives what really is allocated."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, PretrainedConfig

from tests.tiny import CONFIGS
from tunefork.data.pack import MicroBatch, Segments
from tunefork.model.head import Head
from tunefork.model.layers import prepare_layers
from tunefork.plan.attention import NAME, Setting, install
from tunefork.plan.built import Build
from tunefork.plan.one_pass import Step
from tunefork.plan.passes import Shape
from tunefork.plan.shape import count_params, depths, lora_params, on_meta
from tunefork.plan.step import trace_step
from tunefork.plan.trace import Trace
from tunefork.recipe import FullSection, LoraSection, Method
from tunefork.train.loss import loss_sum

SHAPE = Shape(2, 24, 40, is_masked=False)


def _build(method: Method = Method.LORA, *, recompute: bool = False, **full: Any) -> Build:
    return Build(
        method=method,
        lora=LoraSection(rank=4),
        full=FullSection(**full),
        dtype=torch.float32,
        checkpointing="full" if recompute else "none",
        device="cuda",
    )


def _deep(name: str) -> PretrainedConfig:
    """A configuration of seven layers, or of fourteen where kinds alternate."""
    if name == "gemma3":
        kinds = ["sliding_attention"] * 2 + ["full_attention"]
        config = CONFIGS["gemma3"].to_dict() | {
            "num_hidden_layers": 14,
            "layer_types": (kinds * 5)[:14],
        }
        return Gemma3TextConfig.from_dict(config)
    fields = CONFIGS[name].to_dict() | {"num_hidden_layers": 7}
    fields.pop("layer_types", None)
    return type(CONFIGS[name]).from_dict(fields)


_OTHERS = [(name, method, False) for name in CONFIGS if name != "llama" for method in Method]


@pytest.mark.parametrize(
    ("name", "method", "recompute"),
    [("llama", method, recompute) for method in Method for recompute in (False, True)]
    + [
        case if case[1] is Method.LORA else pytest.param(*case, marks=pytest.mark.slow)
        for case in _OTHERS
    ],
)
def test_two_depths_extrapolate_to_the_whole(
    name: str, method: Method, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, made = _deep(name), _build(method, recompute=recompute)
    low, high = depths(config)
    assert low < high < config.num_hidden_layers
    extrapolated = trace_step(config, made, SHAPE)
    whole_depth = config.num_hidden_layers
    monkeypatch.setattr("tunefork.plan.step.depths", lambda _: (whole_depth, whole_depth))
    monkeypatch.setattr("tunefork.plan.step.at_depth", lambda config, _: config)
    monkeypatch.setattr("tunefork.plan.step._TRACED", {})
    whole = trace_step(config, made, SHAPE)
    _assert_same(extrapolated, whole)


def _assert_same(extrapolated: Step, whole: Step) -> None:
    # An alternation's middle layers differ in their masks only, which are not traced here.
    for segment, peak in extrapolated.peaks.items():
        if "middle" not in segment:
            assert peak.total == pytest.approx(whole.peaks[segment].total, rel=1e-9), segment
    assert extrapolated.peak.total == pytest.approx(whole.peak.total, rel=1e-9)
    assert extrapolated.static == whole.static
    assert extrapolated.trained == whole.trained
    for kind, work in whole.work.items():
        assert extrapolated.work[kind].count == work.count, kind
        assert extrapolated.work[kind].flops == pytest.approx(work.flops, rel=1e-6)


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_parameters_are_counted_at_two_depths(name: str) -> None:
    config = _deep(name)
    model = on_meta(config, dtype=torch.float32)
    assert count_params(config) == sum(p.numel() for p in model.parameters())
    lora = LoraSection(rank=3)
    linear = [
        m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"
    ]
    assert lora_params(config, lora) == sum(3 * (m.in_features + m.out_features) for m in linear)


@pytest.fixture
def batch() -> Iterator[MicroBatch]:
    ids = torch.arange(48).view(2, 24) % 90
    at = torch.arange(40)
    yield MicroBatch(
        ids,
        torch.arange(24).expand(2, -1),
        ids,
        torch.zeros_like(ids),
        (at // 20, at % 20),
        at,
        Segments.of([24, 24], rows=2),
    )


@pytest.mark.parametrize("recompute", [False, True])
def test_the_meta_device_allocates_what_a_real_one_does(batch: MicroBatch, recompute: bool) -> None:
    totals = []
    for device in ("cpu", "meta"):
        trace = Trace()
        install(Setting("cuda", is_masked=False), trace)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(CONFIGS["llama"]), dtype=torch.float32, attn_implementation=NAME
            )
        if recompute:
            prepare_layers(model, "full", compiles=False)
        trace.adopt([*model.parameters(), *model.buffers()], "weights")
        head, moved = (
            Head(model.get_output_embeddings(), is_plain=True),
            batch.to(torch.device(device)),
        )
        with trace:
            loss_sum(model.train(), head, moved).backward()
        totals.append(trace.peaks["start"].total)
    # The embedding's backward pass sorts its ids in scratch memory that only a real device takes.
    assert totals[1] == pytest.approx(totals[0], rel=0.01)
