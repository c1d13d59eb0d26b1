"""The rules of detection hold: few wrong claims where nothing differs, whichever way it is tied."""

from itertools import combinations

import numpy as np
import pytest

from tests.compare.fabricated import pair
from tunefork.compare.comparison import (
    ARMS,
    Arm,
    MethodResult,
    PairedDifference,
    Trained,
)
from tunefork.compare.evidence import Finding, cheapest, gain, num_seeds, weigh
from tunefork.page.estimate import Estimate


def _weigh(figures: dict[Arm, float], half_width: float, margin: float = 0.01) -> Finding:
    methods: dict[Arm, MethodResult] = {
        arm: MethodResult(
            status="ok", metrics={"accuracy": Estimate(value=value, low=value, high=value)}
        )
        for arm, value in figures.items()
    }
    paired = [
        pair(a, b, "accuracy", figures[a] - figures[b], half_width)
        for a, b in combinations(figures, 2)
    ]
    return weigh(methods, paired, "accuracy", margin)


def _draws(truth: dict[Arm, float], sigma: float, count: int) -> list[dict[Arm, float]]:
    noise = np.random.default_rng(0).normal(0, sigma, (count, len(truth)))
    return [dict(zip(truth, np.add(list(truth.values()), row), strict=True)) for row in noise]


@pytest.mark.parametrize("qlora", [0.5, 0.49, 0.0])
def test_no_method_is_singled_out_among_equals_more_often_than_promised(qlora: float) -> None:
    sigma = 0.01
    truth: dict[Arm, float] = {"base": -9.0, "lora": 0.5, "qlora": qlora, "full": 0.5}
    found = [_weigh(draw, 1.96 * sigma * 2**0.5) for draw in _draws(truth, sigma, 1500)]
    wrong = sum(finding.is_singled_out for finding in found) / len(found)
    assert wrong < 0.065  # 5 %, and 2.7 standard errors of 1,500 draws


def test_equals_of_the_base_beat_it_no_more_often_than_promised() -> None:
    sigma = 0.01
    truth: dict[Arm, float] = dict.fromkeys(ARMS, 0.5)
    found = [_weigh(draw, 1.96 * sigma * 2**0.5) for draw in _draws(truth, sigma, 1500)]
    wrong = sum(finding.recommended != "base" for finding in found) / len(found)
    assert wrong < 0.065


def test_beating_the_base_takes_more_where_more_methods_could_have() -> None:
    # A share of 0.977 leaves 2.3 %: enough for two chances (0.954), not for three (0.931).
    alone = _weigh({"base": 0.0, "lora": 0.02}, 0.0196)
    among_three = _weigh({"base": 0.0, "lora": 0.02, "qlora": 0.0, "full": 0.0}, 0.0196)
    assert alone.recommended == "lora"
    assert among_three.recommended == "base"


def test_loss_is_better_when_lower_whichever_way_round_the_pair_is() -> None:
    paired = [
        PairedDifference(
            a="full", b="lora", metric="loss", difference=-0.2, low=-0.3, high=-0.1, share_above=0.0
        )
    ]
    better, worse = gain(paired, "loss", "full", "lora"), gain(paired, "loss", "lora", "full")
    assert (better.value, better.low, better.high, better.share) == (0.2, 0.1, 0.3, 1.0)
    assert (worse.value, worse.low, worse.high, worse.share) == (-0.2, -0.3, -0.1, 0.0)
    with pytest.raises(ValueError, match="lacks loss of full and base"):
        gain(paired, "loss", "full", "base")


def test_confidence_never_contradicts_the_interval() -> None:
    tied = PairedDifference(
        a="lora", b="full", metric="accuracy", difference=0.0, low=0.0, high=0.0, share_above=0.0
    )
    for a, b in (("lora", "full"), ("full", "lora")):
        assert gain([tied], "accuracy", a, b).confidence(2) == 0.0  # type: ignore[arg-type]
    touching = tied.model_copy(update={"difference": 0.01, "high": 0.02, "share_above": 0.99})
    assert not gain([touching], "accuracy", "lora", "full").is_detected(2)


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        # memory x time decides where it differs by more than a quarter
        ({"lora": (10, 10, 1), "qlora": (5, 13, 1), "full": (10, 10, 9)}, "qlora"),
        # within a quarter, the smaller artefact
        ({"lora": (10, 11, 1), "full": (10, 10, 14)}, "lora"),
        # all equal: the simpler
        ({"qlora": (9, 10, 1), "lora": (10, 10, 1)}, "lora"),
        # a clear advantage in memory x time outweighs the artefact
        ({"lora": (10, 20, 1), "full": (10, 10, 14)}, "full"),
    ],
)
def test_cheapest(costs: dict[Trained, tuple[int, float, int]], expected: str) -> None:
    methods: dict[Arm, MethodResult] = {
        arm: MethodResult(
            status="ok",
            peak_memory_bytes=memory,
            train_s=seconds / 2,
            search_s=seconds / 2,
            artifact_bytes=size,
        )
        for arm, (memory, seconds, size) in costs.items()
    }
    assert cheapest(methods, list(costs)) == expected


def test_cheapest_counts_an_unmeasured_cost_as_equal() -> None:
    nothing = MethodResult(status="ok")
    assert cheapest({"lora": nothing, "full": nothing}, ["full", "lora"]) == "lora"


@pytest.mark.parametrize(("examples", "is_detected"), [(1, False), (9, False), (10, True)])
def test_too_few_examples_detect_nothing(examples: int, is_detected: bool) -> None:
    clear = pair("lora", "full", "accuracy", 0.5, 0.1, examples=examples)
    found = gain([clear], "accuracy", "lora", "full")
    assert found.is_detected(2) == is_detected == (found.confidence(2) >= 0.95)
    back = gain([clear], "accuracy", "full", "lora")
    assert (back.examples, found.examples) == (examples, examples)


def test_training_runs_are_counted_where_they_are_fewest() -> None:
    seeds = {"lora": (0, 1, 2), "qlora": (0, 1, 2), "full": (1, 2, 3)}
    figure = Estimate(value=0.5, low=0.4, high=0.6)
    methods: dict[Arm, MethodResult] = {"base": MethodResult(status="ok", seeds=(0,))}
    for arm, own in seeds.items():
        methods[arm] = MethodResult(status="ok", metrics={"loss": figure}, seeds=own)  # type: ignore[index]
    common = [pair("full", "lora", "loss", 0.1, 0.2, seeds=(1, 2))]
    assert num_seeds(methods, [], "loss") == 3
    assert num_seeds(methods, common, "loss") == 2
    assert num_seeds(methods, common, "accuracy") == 0
