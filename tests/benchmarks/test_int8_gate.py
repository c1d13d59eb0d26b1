"""The int8 gate's script: its pairs, its bounds and its float64 reference, on tiny models."""

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import int8_gate, int8_run, results
from benchmarks.int8_gradients import agreement, gradients, reference_gradients
from benchmarks.int8_run import Trial, adapter, pack_columns, put_adapter, unpack_columns
from benchmarks.int8_verdict import GRADIENT_BOUNDS, against, collect, judge_gradients, within
from tests.folders import save_model
from tests.tiny import VOCABULARY, tiny_model
from tunefork.data.example import Encoded
from tunefork.model.build import build
from tunefork.model.linear import LoraLinear
from tunefork.recipe import LoraSection, Method


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
        precisions=["bf16", "int8"],
        seeds=[0, 1],
        steps=2,
        batch_size=4,
        learning_rate=1e-2,
        max_train_examples=None,
        max_eval_examples=None,
        set=["lora.rank=4", "data.max_length=256"],
        seconds=600.0,
    )


@pytest.mark.slow
def test_what_is_measured_is_judged_and_not_measured_twice(
    arguments: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    int8_gate.measure(arguments)
    lines = list(int8_gate.read([arguments.out]))
    assert [row["run"] for row in lines] == [
        *("lora_bf16_0", "lora_int8_0", "lora_bf16_1", "lora_int8_1")
    ]
    assert not [row["error"] for row in lines if "error" in row]
    arguments.precisions += ["fp32", "bf16_cut"]
    int8_gate.measure(arguments)
    assert len(list(int8_gate.read([arguments.out]))) == 8
    table = json.loads(collect([arguments.out], "gate").read_text(encoding="utf-8"))
    first, second, overall, *floors = table["rows"]
    assert (first["case"], first["seed"], second["seed"]) == ("lora", 0, 1)
    assert first["num_examples"] == 6
    assert not first["holds"]  # six examples are too few, whatever they show
    assert (overall["case"], overall["seeds"]) == ("lora_all_seeds", [0, 1])
    assert not overall["holds_on_average"]  # of two seeds
    assert [row["case"] for row in floors] == [
        *("lora_bf16_against_fp32", "lora_int8_against_fp32"),
        *("lora_bf16_cut_against_bf16", "lora_int8_against_bf16_cut"),
    ]
    of_bf16, of_int8, of_cut, _ = floors
    low, mean, high = (overall["mean_loss_relative_difference"][at] for at in (1, 0, 2))
    assert low <= mean <= high
    trained, served = first["as_trained"]["loss"], first["as_served"]["loss"]
    assert len({trained["bf16"], trained["int8"], served["int8"]}) == 3  # another base each
    assert trained["int8"] == pytest.approx(trained["bf16"], rel=0.02)
    assert served["int8"] == pytest.approx(trained["int8"], rel=0.02)
    # What a yardstick compares of int8's is what is served.
    fp32 = of_bf16["each_seed"][0]["loss"]["fp32"]
    assert of_int8["each_seed"][0]["loss"] == {"fp32": fp32, "int8": served["int8"]}
    assert set(of_cut["each_seed"][0]["loss"]) == {"bf16", "bf16_cut"}


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
    data, _ = int8_run.load(arguments, trial)
    file = int8_run.encode(arguments, trial)
    assert file.parent == arguments.data
    with monkeypatch.context() as patch:
        patch.setattr(int8_run, "load_data", lambda *_, **__: pytest.fail("tokenised again"))
        again, _ = int8_run.load(arguments, trial)
    assert again.fingerprint() == data.fingerprint() and again.labels == data.labels
    assert again.section == data.section and again.eval_examples == data.eval_examples
    with (arguments.data / "eval.jsonl").open("a") as stream:  # other data: not those of the file
        stream.write(json.dumps({"text": "colour 9", "label": "fox"}) + "\n")
    assert len(int8_run.load(arguments, trial)[0].eval) == len(data.eval) + 1


def test_a_run_that_fails_is_a_row_and_the_next_is_run(
    arguments: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(int8_gate, "run", _out_of_memory)
    int8_gate.measure(arguments)
    assert len(list(int8_gate.read([arguments.out]))) == 4
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
        row = judge_gradients({"run": "gradients_lora", "int8": good | change})
        assert row["holds"] == {"int8": holds}
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
    monkeypatch.setattr(int8_gate, "_FIRST_EVAL", 20)
    found = {}
    for count in (15, 20, 50):
        int8_gate.prepare(tmp_path, tmp_path / str(count), 30, count)
        parts = [tmp_path / str(count) / f"{name}.jsonl" for name in ("train", "eval")]
        train, held_out = ([*int8_gate.read([part])] for part in parts)
        found[count] = (train, held_out)
        texts = {row["text"] for row in train + held_out}
        assert (len(train), len(held_out), len(texts)) == (30, count, 30 + count)
    assert found[50][0] == found[20][0]
    assert found[50][1][:20] == found[20][1]
    assert found[20][1][:15] == found[15][1]
    with pytest.raises(SystemExit, match="100 unused training rows, 101 are needed"):
        int8_gate.prepare(tmp_path, tmp_path / "more", 30, 81)
