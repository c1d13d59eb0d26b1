import pytest

from tests.compare.fabricated import fabricate
from tunefork.compare.claims import Claim, claims
from tunefork.compare.comparison import Comparison


def _claims(comparison: Comparison) -> dict[str, Claim]:
    return {claim.row.split(":")[0]: claim for claim in claims(comparison)}


def test_rules_are_held_against_what_was_measured() -> None:
    found = _claims(fabricate())
    assert found["share"].agreement == "does not hold here"  # 3.50 % is above 3 %
    assert found["memory"].agreement == "does not hold here"
    assert "1.5 times as much as LoRA" in found["memory"].measured
    assert "0.81 times as long as QLoRA" in found["time"].measured
    assert found["artifact"].agreement == "not measurable here"  # a rule about 70B
    assert "14 times as big as LoRA" in found["artifact"].measured
    assert found["forgetting"].agreement == "holds here"
    assert found["cost"].agreement == "does not hold here"


@pytest.mark.parametrize(
    ("full", "half_width", "agreement"),
    [
        (0.872 / 0.98, 0.002, "holds here"),  # 2 % below, well inside
        (0.872, 0.002, "does not hold here"),
        (0.872 / 0.98, 0.03, "cannot tell"),  # the interval reaches in and out
    ],
)
def test_quality_is_judged_by_its_interval(full: float, half_width: float, agreement: str) -> None:
    accuracies = {"base": 0.2, "lora": 0.872, "full": full}
    found = _claims(fabricate(accuracies, half_width=half_width))["metric"]  # type: ignore[arg-type]
    assert found.agreement == agreement


def test_a_rule_without_figures_is_not_measurable() -> None:
    nothing = _claims(fabricate(failed={"full": "out of memory"}))
    assert {c.agreement for name, c in nothing.items() if name != "share"} == {
        "not measurable here"
    }
    unlabelled = _claims(fabricate(has_labels=False, usd_per_hour=None, has_forgetting=False))
    for name in ("metric", "cost", "forgetting"):
        assert unlabelled[name].agreement == "not measurable here"
    assert "no price was given" in unlabelled["cost"].measured


def test_a_model_of_70b_can_be_held_against_the_rule_about_70b() -> None:
    made = fabricate()
    model = made.model.model_copy(update={"parameters": 70_600_000_000})
    found = _claims(made.model_copy(update={"model": model}))
    assert found["artifact"].agreement == "holds here"
