"""The FP8 gate's script: its pairs, its bounds and its float64 reference, on tiny models."""

import argparse
import gzip
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import fp8_gate, fp8_run, int8_emulated, results
from benchmarks.fp8_gradients import agreement, gradients, reference_gradients
from benchmarks.fp8_run import Trial, adapter, pack_columns, put_adapter, unpack_columns
from benchmarks.fp8_verdict import GRADIENT_BOUNDS, against, collect, judge_gradients, within
from tests.folders import save_model
from tests.tiny import VOCABULARY, tiny_model
from tunefork.data.example import Encoded
from tunefork.kernels import fp8, fp8_weight
from tunefork.kernels.layout import Layout
from tunefork.model.build import build
from tunefork.model.linear import LoraLinear
from tunefork.recipe import LoraSection, Method, Recipe


@pytest.fixture
def arguments(tmp_path: Path) -> argparse.Namespace:
    """Of `measure` over a tiny llama and 12 rows in two classes."""
    save_model(tmp_path / "base")
    for name, start, count in (("train", 0, 12), ("eval", 100, 6)):
        rows = [
            {"text": f"colour {n}", "label": ("fox", "dog")[n % 2]}
            for n in range(start, start + count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return argparse.Namespace(
        model=tmp_path / "base",
        data=tmp_path,
        out=tmp_path / "raw.jsonl",
        done=[],
        methods=["lora"],
        precisions=["bf16", "fp8"],
        seeds=[0, 1],
        steps=2,
        batch_size=4,
        learning_rate=1e-2,
        max_train_examples=None,
        max_eval_examples=None,
        set=["lora.rank=4", "data.max_length=256"],
        seconds=600.0,
    )


@pytest.fixture
def fp8_is_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """FP8 needs its GPU: here its runs compute in fp32."""
    real = fp8_run.recipe_of

    def stand_in(arguments: argparse.Namespace, trial: Trial) -> Recipe:
        precision = "fp32" if trial.precision == "fp8" else trial.precision
        return real(arguments, Trial(trial.method, precision, trial.seed))

    monkeypatch.setattr(fp8_run, "recipe_of", stand_in)


@pytest.mark.usefixtures("fp8_is_fp32")
def test_what_is_measured_is_judged_and_not_measured_twice(
    arguments: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    fp8_gate.measure(arguments)
    lines = list(fp8_gate.read([arguments.out]))
    assert [row["run"] for row in lines] == [
        *("lora_bf16_0", "lora_fp8_0", "lora_bf16_1", "lora_fp8_1")
    ]
    assert not [row["error"] for row in lines if "error" in row]
    arguments.precisions += ["fp32", "bf16_cut"]
    fp8_gate.measure(arguments)
    assert len(list(fp8_gate.read([arguments.out]))) == 8
    table = json.loads(collect([arguments.out], "gate").read_text(encoding="utf-8"))
    first, second, overall, *floors = table["rows"]
    assert (first["case"], first["seed"], second["seed"]) == ("lora", 0, 1)
    assert first["num_examples"] == 6
    assert not first["holds"]  # six examples are too few, whatever they show
    assert (overall["case"], overall["seeds"]) == ("lora_all_seeds", [0, 1])
    assert not overall["holds_on_average"]  # of two seeds
    assert [row["case"] for row in floors] == [
        *("lora_bf16_against_fp32", "lora_fp8_against_fp32", "lora_bf16_cut_against_bf16")
    ]
    of_bf16, of_fp8, of_cut = floors
    # FP8's stand-in is fp32: bf16 is as far from that as it is from bf16, in fp32's units.
    mean = overall["mean_loss_relative_difference"]
    assert of_bf16["mean_loss_relative_difference"][0] == pytest.approx(-mean[0], rel=0.05)
    assert mean[1] <= mean[0] <= mean[2]
    # What is served of FP8's is that adapter over bf16.
    served = first["as_served"]["loss"]["fp8"] / first["as_trained"]["loss"]["fp8"] - 1
    assert of_fp8["each_seed"][0]["loss_relative_difference"] == pytest.approx(served)
    assert set(of_cut["each_seed"][0]["loss"]) == {"bf16", "bf16_cut"}
    # The adapter is the same, and a bf16 base another model than an fp32 one.
    trained, served = first["as_trained"]["loss"]["fp8"], first["as_served"]["loss"]["fp8"]
    assert served != trained
    assert served == pytest.approx(trained, rel=0.02)


def test_what_int8_would_be_is_measured_by_the_same_run(
    arguments: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    arguments.precisions, arguments.seeds = ["bf16", "int8"], [0]
    with pytest.raises(SystemExit, match="int8 is of LoRA alone"):
        fp8_gate.measure(argparse.Namespace(**{**vars(arguments), "methods": ["lora", "qlora"]}))
    fp8_gate.measure(arguments)
    assert fp8.product_of is not int8_emulated.product_of  # what was put there is gone again
    assert vars(fp8_weight)["e4m5_weight"] is not int8_emulated.int8_weight
    table = json.loads(collect([arguments.out], "gate").read_text(encoding="utf-8"))
    row, overall = table["rows"]
    assert (row["case"], overall["case"]) == ("lora_int8", "lora_int8_all_seeds")
    losses = row["as_trained"]["loss"]
    assert losses["int8"] != losses["bf16"]
    assert losses["int8"] == pytest.approx(losses["bf16"], rel=0.02)


def test_int8_products_are_those_of_whole_numbers_and_nearer_than_e4m3s() -> None:
    """Rounded like this, numbers of a normal distribution are a hundredth off; e4m3's three bits
    of mantissa take a thirtieth of each."""
    torch.manual_seed(0)
    x, w, dy = torch.randn(256, 512), torch.randn(32, 512) / 16, torch.randn(256, 32)
    a, b = torch.randn(4, 512) / 16, torch.randn(32, 4)
    layout = Layout("e4m5", "fp8", (32,), (4,), 0.5)
    whole = x @ w.t() + 0.5 * (x @ a.t()) @ b.t(), dy @ w + 0.5 * (dy @ b) @ a
    errors = {}
    for form in ("int8", "e4m3"):
        with int8_emulated.emulated() if form == "int8" else nullcontext():
            weights = fp8_weight.fp8_weights([w.bfloat16()], layout, 512)
            fp8_weight.set_apart(x.bfloat16(), weights, layout, [w.bfloat16()])
            leaf = x.bfloat16().requires_grad_()
            [y] = fp8.fp8_lora(leaf, layout, weights, [a], [b])
            y.backward(dy.bfloat16())
            assert leaf.grad is not None
        pairs = zip((y.detach(), leaf.grad), whole, strict=True)
        errors[form] = [float((got - want).norm() / want.norm()) for got, want in pairs]
    assert all(error < 0.015 for error in errors["int8"])
    assert all(3 * near < far for near, far in zip(*errors.values(), strict=True))


def test_on_average_the_whole_intervals_must_lie_within_the_bounds() -> None:
    fine, points = [0.0, -0.004, 0.005], [0.1, -1.4, 1.5]
    assert within(fine, fine, points)
    assert not within(fine, [0.0, -0.0051, 0.001], points)
    assert not within([0.001, -0.001, 0.0051], fine, points)
    assert not within(fine, fine, [0.1, -1.51, 0.2])


def test_data_are_tokenised_once_for_all_processes(
    arguments: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = Trial("lora", "bf16", 0)
    data, _ = fp8_run.load(arguments, trial)
    file = fp8_run.encode(arguments, trial)
    assert file.parent == arguments.data
    with monkeypatch.context() as patch:
        patch.setattr(fp8_run, "load_data", lambda *_, **__: pytest.fail("tokenised again"))
        again, _ = fp8_run.load(arguments, trial)
    assert again.fingerprint() == data.fingerprint() and again.labels == data.labels
    assert again.section == data.section and again.eval_examples == data.eval_examples
    with (arguments.data / "eval.jsonl").open("a") as stream:  # other data: not those of the file
        stream.write(json.dumps({"text": "colour 9", "label": "fox"}) + "\n")
    assert len(fp8_run.load(arguments, trial)[0].eval) == len(data.eval) + 1


def test_a_run_that_fails_is_a_row_and_the_next_is_run(
    arguments: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(fp8_gate, "run", _out_of_memory)
    fp8_gate.measure(arguments)
    assert len(list(fp8_gate.read([arguments.out]))) == 4
    table = json.loads(collect([arguments.out], "gate").read_text(encoding="utf-8"))
    assert {row["error"] for row in table["rows"]} == {"RuntimeError: out of memory"}


def _out_of_memory(*_: Any) -> dict[str, Any]:
    raise RuntimeError("out of memory")


def _columns(right: int, loss: float, total: int = 4000) -> dict[str, Any]:
    return {
        "predicted": (np.arange(total) < right).astype(np.int64),
        "gold": np.ones(total, dtype=np.int64),
        "loss_sum": np.full(total, loss),
        "tokens": np.ones(total, dtype=np.int64),
    }


@pytest.mark.parametrize(
    ("right", "loss", "holds"),
    [
        (3000, 1.0, True),
        (3010, 1.004, True),
        (3000, 1.006, False),
        (3000, 0.994, False),  # too good to be the same training
        (2950, 1.0, False),  # 1.25 points worse: the interval reaches beyond 1.5
        (3050, 1.0, False),
    ],
)
def test_the_bounds(right: int, loss: float, holds: bool) -> None:
    found = against(_columns(3000, 1.0), _columns(right, loss))
    assert found["holds"] is holds
    assert found["loss_relative_difference"] == pytest.approx(loss - 1)
    assert found["accuracy_difference_points"][0] == pytest.approx((right - 3000) / 40)


def test_columns_survive_their_line() -> None:
    columns = _columns(3, 0.1, total=5)
    for name, values in unpack_columns(pack_columns(columns)).items():
        np.testing.assert_array_equal(values, columns[name])


def _deltas(model: Any) -> None:
    build(model, Method.LORA, LoraSection(rank=4), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)


def _examples() -> list[Encoded]:
    draw = np.random.default_rng(0)
    found = []
    for at, length in enumerate((9, 14, 5)):
        ids = draw.integers(3, VOCABULARY, length).astype(np.int32)
        found.append(Encoded(f"row {at}", ids, draw.random(length) < 0.6))
    return found


@pytest.mark.parametrize("spoil", [None, "scale", "weights"])
def test_the_reference_is_what_fp32_comes_to(spoil: str | None) -> None:
    """Of another scale or other weights it is not: the comparison can fail."""
    model = tiny_model("llama")
    _deltas(model)
    layers = [(path, m) for path, m in model.named_modules() if isinstance(m, LoraLinear)]
    weights = {path: layer.materialize().detach().clone() for path, layer in layers}
    scale = layers[0][1].scale
    if spoil == "weights":
        weights[layers[3][0]] *= 1.05
    truth = reference_gradients(
        tiny_model("llama").double(),
        weights,
        adapter(model),
        scale * (1.05 if spoil == "scale" else 1.0),
        _examples(),
    )
    found = agreement(gradients(model, _examples(), 0), truth)
    assert found["lora_a"]["tensors"] == found["lora_b"]["tensors"] == len(layers)
    kinds = [found[kind] for kind in ("lora_a", "lora_b")]
    worst = max(max(1 - kind["worst_cosine"], abs(kind["worst_norm_error"])) for kind in kinds)
    assert (worst < 1e-4) is (spoil is None)


def test_a_gradient_that_is_off_breaks_its_bounds() -> None:
    found = dict.fromkeys(("median_cosine", "worst_cosine"), 0.99)
    good = {"lora_a": found, "lora_b": found, "whole_cosine": 0.99, "whole_norm_error": 0.01}
    for change, holds in (
        ({}, True),
        ({"whole_cosine": 0.9}, False),
        ({"whole_norm_error": -0.2}, False),
        ({"lora_b": found | {"worst_cosine": 0.3}}, False),
    ):
        row = judge_gradients({"run": "gradients_lora", "fp8": good | change})
        assert row["holds"] == {"fp8": holds}
        assert row["bounds"] == GRADIENT_BOUNDS


def test_deltas_go_only_where_they_belong() -> None:
    one, other = tiny_model("llama"), tiny_model("llama")
    _deltas(one)
    build(other, Method.LORA, LoraSection(rank=4, targets="mlp"), seed=0)
    with pytest.raises(ValueError, match="other deltas"):
        put_adapter(other, adapter(one))


def test_more_evaluation_examples_leave_the_rest_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split, numbers in (("train", range(100)), ("test", range(200, 210))):
        rows = [json.dumps({"text": f"gloss {n}", "label": "fox"}) + "\n" for n in numbers]
        with gzip.open(tmp_path / f"wordnet_lexname_{split}.jsonl.gz", "wt") as file:
            file.write("".join(rows))
    monkeypatch.setattr(fp8_gate, "_FIRST_EVAL", 20)
    found = {}
    for count in (15, 20, 50):
        fp8_gate.prepare(tmp_path, tmp_path / str(count), 30, count)
        parts = [tmp_path / str(count) / f"{name}.jsonl" for name in ("train", "eval")]
        train, held_out = ([*fp8_gate.read([part])] for part in parts)
        found[count] = (train, held_out)
        texts = {row["text"] for row in train + held_out}
        assert (len(train), len(held_out), len(texts)) == (30, count, 30 + count)
    assert found[50][0] == found[20][0]
    assert found[50][1][:20] == found[20][1]
    assert found[20][1][:15] == found[15][1]
    with pytest.raises(SystemExit, match="100 unused training rows, 101 are needed"):
        fp8_gate.prepare(tmp_path, tmp_path / "more", 30, 81)
