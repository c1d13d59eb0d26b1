import pytest

from tests.compare.fabricated import fabricate
from tunefork.compare.comparison import Arm, Verdict
from tunefork.compare.verdict import decide, explanation, headline, subheading
from tunefork.recipe import Metric

FULL_AHEAD: dict[Arm, float] = {"base": 0.248, "lora": 0.872, "qlora": 0.864, "full": 0.90}
ALL_FAILED: dict[Arm, str] = dict.fromkeys(
    ("lora", "qlora", "full"), "out of memory\nTraceback ..."
)


def _said(verdict: Verdict) -> str:
    return " ".join((verdict.text, *verdict.would_change))


def test_a_detected_best_is_the_verdict() -> None:
    verdict = fabricate(FULL_AHEAD, half_width=0.004).verdict
    assert (verdict.method, verdict.recommended) == ("full", "full")
    assert verdict.confidence is not None and verdict.confidence > 0.99
    assert verdict.text.startswith("Choose full fine-tuning. It reaches accuracy 90.0 % (87.0 to")
    assert "ahead of LoRA by 2.8 points (95 % interval 2.4 to 3.2): a detectable" in verdict.text
    assert "Against LoRA it takes 1.5 times the memory, 1.2 times the time" in verdict.text
    assert "If 3.2 points would not matter (compare.margin), LoRA" in _said(verdict)


def test_one_that_forgets_more_than_another_is_told() -> None:
    told = (
        "It forgets more: on general text its loss rose by 0.16 nats a token, that of LoRA by 0.04 "
        "and that of QLoRA by 0.04."
    )
    assert told in fabricate(FULL_AHEAD, half_width=0.004).verdict.text
    assert "forgets" not in fabricate().verdict.text  # LoRA is chosen, and full forgets most
    assert (
        "forgets" not in fabricate(FULL_AHEAD, half_width=0.004, has_forgetting=False).verdict.text
    )


def test_indistinguishable_methods_give_the_cheapest_and_what_could_be_lost() -> None:
    verdict = fabricate().verdict
    assert (verdict.method, verdict.recommended) == ("no_detectable_difference", "lora")
    assert verdict.confidence is not None and verdict.confidence < 0.95
    assert "that could be chance" in verdict.text
    assert "up to 2.9 points worse, which is more than the margin of 1.0 point" in verdict.text


def test_a_difference_within_the_margin_is_named_but_the_cheaper_is_recommended() -> None:
    comparison = fabricate(half_width=0.004, margin=0.02)
    verdict = comparison.verdict
    assert (verdict.method, verdict.recommended) == ("full", "lora")
    assert "at most 1.2 points worse, which is within the margin of 2.0 points" in verdict.text
    assert "less than matters" in subheading(verdict, "accuracy")
    assert "If less than 1.2 points mattered" in _said(verdict)


@pytest.mark.parametrize("base", [0.86, 0.97])
def test_without_a_gain_over_the_base_the_answer_is_not_to_fine_tune(base: float) -> None:
    verdict = fabricate({"base": base, "lora": 0.872, "qlora": 0.864, "full": 0.88}).verdict
    assert (verdict.method, verdict.recommended) == ("no_detectable_difference", "base")
    assert headline(verdict) == "Do not fine-tune on this evidence"
    assert ("Every method does worse" in verdict.text) == (base > 0.9)
    assert "more passes over these 960 examples" in _said(verdict)


def test_a_method_that_does_not_beat_the_base_is_not_recommended_for_being_cheap() -> None:
    verdict = fabricate({"base": 0.855, "lora": 0.872, "qlora": 0.864, "full": 0.88}).verdict
    assert (verdict.method, verdict.recommended) == ("no_detectable_difference", "full")
    assert "LoRA does not detectably beat the untouched base" in verdict.text
    assert "it also costs least" not in verdict.text


def test_lower_loss_is_better() -> None:
    verdict = fabricate(FULL_AHEAD, half_width=0.004, has_labels=False).verdict
    assert verdict.method == "full"
    assert "It reaches loss 0.3000" in verdict.text


def test_a_failed_method_is_reported_as_itself() -> None:
    verdict = fabricate(failed={"qlora": "out of memory\nmore\nlines"}).verdict
    assert verdict.recommended == "lora"
    assert "QLoRA failed and is not judged: out of memory. " in verdict.text
    assert verdict.would_change[0].startswith("QLoRA has no figures")


def test_nothing_to_compare() -> None:
    verdict = fabricate(failed=ALL_FAILED).verdict
    assert (verdict.recommended, verdict.confidence) == (None, None)
    assert headline(verdict).startswith("No answer") and subheading(verdict, "accuracy") == ""
    assert "Traceback" not in verdict.text
    alone = fabricate({"base": 0.2, "lora": 0.8}, failed={"base": "killed"}).verdict
    assert (alone.recommended, alone.method) == (None, "no_detectable_difference")
    assert "there is nothing to compare" in alone.text


def test_without_the_base_methods_are_still_compared() -> None:
    verdict = fabricate(FULL_AHEAD, half_width=0.004, failed={"base": "killed"}).verdict
    assert verdict.method == "full"
    assert "whether fine-tuning pays at all is unmeasured" in verdict.text


def test_one_method_alone_is_judged_against_the_base() -> None:
    verdict = fabricate({"base": 0.2, "lora": 0.8}).verdict
    assert (verdict.method, verdict.recommended) == ("lora", "lora")
    assert "judged against the base alone" in verdict.text


@pytest.mark.parametrize(("seeds", "is_said"), [((0,), True), ((0, 1), True), ((0, 1, 2), False)])
def test_fewer_than_three_seeds_leave_training_variance_unmeasured(
    seeds: tuple[int, ...], is_said: bool
) -> None:
    verdict = fabricate(seeds=seeds).verdict
    assert ("the variance of training is unmeasured" in verdict.text) == is_said
    assert ("Three seeds or more" in _said(verdict)) == is_said


def test_the_text_names_the_size_that_was_measured() -> None:
    text = fabricate().verdict.text
    assert "134.5M parameters" in text and "says nothing about a model of another size" in text


def test_the_most_frequent_label_is_named_and_warned_of() -> None:
    text = fabricate().verdict.text
    assert "most frequent label would reach 14.2 %." in text
    low = fabricate({"base": 0.02, "lora": 0.10, "qlora": 0.09, "full": 0.11}).verdict.text
    assert "would reach 14.2 %, and the best method is not detectably above." in low


def test_examples_needed_follow_from_the_width_of_the_interval() -> None:
    # +-2.1 points at 400 examples; +-1 point needs 400 * 2.1^2 = 1,764.
    assert "About 1,800 evaluation examples" in fabricate().verdict.would_change[0]
    assert "over a million" in _said(fabricate(margin=0.0001).verdict)
    assert "evaluation examples or more" not in _said(fabricate(margin=0.03).verdict)


@pytest.mark.parametrize(
    ("rate", "said"), [(1e-4, "the lowest tried"), (1e-3, "the highest tried"), (3e-4, None)]
)
def test_a_learning_rate_at_the_edge_of_the_grid_is_named(rate: float, said: str | None) -> None:
    made = fabricate()
    lora = made.methods["lora"].model_copy(update={"learning_rate": rate})
    verdict = decide(
        made.methods | {"lora": lora},
        made.paired,
        metric="accuracy",
        margin=0.01,
        model=made.model,
        data=made.data,
    )
    edges = [line for line in verdict.would_change if "LoRA's learning rate" in line]
    assert [said in line for line in edges if said] == ([True] if said else [])
    assert bool(edges) == (said is not None)


def test_explanation_leaves_the_headline_out() -> None:
    verdict = fabricate().verdict
    paragraphs = explanation(verdict)
    assert paragraphs[0].startswith("It reaches accuracy") and len(paragraphs) == 3
    assert f"{headline(verdict)}. " + "\n\n".join(paragraphs) == verdict.text


def test_few_examples_are_a_caution() -> None:
    facts = fabricate()
    few = facts.data.model_copy(update={"eval_examples": 12})
    said = decide(
        facts.methods,
        facts.paired,
        metric=facts.primary_metric,
        margin=facts.margin,
        model=facts.model,
        data=few,
    ).text
    assert "With only 12 evaluation examples the intervals are too narrow" in said
    assert "too narrow" not in facts.verdict.text


def _decide(metric: Metric, examples: int, num_examples: int, half_width: float = 0.3) -> Verdict:
    """A verdict on `metric`, measured on `examples` of the `num_examples` for evaluation."""
    facts = fabricate(half_width=half_width, examples=examples)
    methods = {
        arm: result.model_copy(update={"metrics": {metric: result.metrics["accuracy"]}})
        for arm, result in facts.methods.items()
    }
    paired = [pair.model_copy(update={"metric": metric}) for pair in facts.paired]
    return decide(
        methods,
        [pair for at, pair in enumerate(paired) if facts.paired[at].metric == "accuracy"],
        metric=metric,
        margin=0.01,
        model=facts.model,
        data=facts.data.model_copy(update={"eval_examples": num_examples}),
    )


def test_one_example_detects_nothing_and_the_verdict_says_so() -> None:
    verdict = _decide("accuracy", 1, 1, half_width=0.0001)
    assert (verdict.method, verdict.recommended) == ("no_detectable_difference", "base")
    assert verdict.confidence is not None and verdict.confidence < 0.95
    assert "With only 1 evaluation example nothing counts as detected" in verdict.text
    assert "10 evaluation examples or more, in place of 1" in " ".join(verdict.would_change)


def test_too_few_examples_are_named_where_an_interval_excludes_0() -> None:
    facts = fabricate(FULL_AHEAD, half_width=0.004, examples=9, failed={"base": "killed"})
    assert facts.verdict.method == "no_detectable_difference"
    assert "(95 % interval 2.4 to 3.2): too few examples to tell" in facts.verdict.text


def test_a_generated_metric_is_measured_on_the_answers_generated() -> None:
    verdict = _decide("rouge_l", 12, 60)
    assert "and 12 generated answers (of 60 evaluation examples);" in verdict.text
    assert "With only 12 generated answers the intervals are too narrow" in verdict.text
    # +-30 points at 12 answers; +-1 point needs 12 * 30^2 = 10,800.
    assert verdict.would_change[0].startswith(
        "About 11,000 generated answers or more (evaluate.max_generated, and as many evaluation "
        "examples), in place of 12:"
    )


def test_plain_text_is_counted_by_what_the_intervals_draw() -> None:
    assert "and 24 documents (of 60 evaluation examples);" in _decide("loss", 24, 60).text
    assert "and 60 evaluation examples;" in _decide("loss", 60, 60).text


def test_two_common_seeds_leave_training_variance_unmeasured() -> None:
    said = "With 2 training runs a method, the variance of training is unmeasured"
    assert said in fabricate(seeds=(0, 1, 2), paired_seeds=(1, 2)).verdict.text
    assert said not in fabricate(seeds=(0, 1, 2)).verdict.text
