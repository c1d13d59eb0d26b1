"""When a rule applies: small named questions about the facts, one a row of the table.

The docstring of each is its description in docs/advice.md.
"""

from tunefork.advise.amount import FEW_STEPS
from tunefork.advise.estimate import SMALL_MODEL
from tunefork.advise.facts import FEW_EXAMPLES, FEWEST_EXAMPLES, MUCH_TEXT, Facts
from tunefork.recipe import Method

DELTAS = (Method.LORA, Method.QLORA)
NARROW = ("classification", "extraction")
DEEP_CHANGES = ("behaviour", "domain_language")
MANY_TENANTS = 10


def always(facts: Facts) -> bool:
    """always"""
    return True


# The data


def data_fits_a_rank(facts: Facts) -> bool:
    """a standard rank holds the supervised tokens"""
    return facts.rank_needed is not None


def data_fits_no_rank(facts: Facts) -> bool:
    """not even rank 256 holds the supervised tokens"""
    return facts.rank_needed is None


def too_few_examples(facts: Facts) -> bool:
    """fewer than 50 examples, and no plain text"""
    examples = facts.situation.examples
    return examples is not None and examples < FEWEST_EXAMPLES and not facts.amount.is_plain_text


def few_examples(facts: Facts) -> bool:
    """fewer than 200 examples, and no plain text"""
    examples = facts.situation.examples
    return examples is not None and examples < FEW_EXAMPLES and not facts.amount.is_plain_text


def few_steps(facts: Facts) -> bool:
    """fewer than 100 optimiser steps"""
    return facts.amount.steps < FEW_STEPS


def enough_steps(facts: Facts) -> bool:
    """100 optimiser steps and more"""
    return facts.amount.steps >= FEW_STEPS


# The task and the change


def is_narrow(facts: Facts) -> bool:
    """the task is classification or extraction"""
    return facts.situation.task in NARROW


def is_style(facts: Facts) -> bool:
    """the task or the change is style"""
    return "style" in (facts.situation.task, facts.situation.change)


def is_facts(facts: Facts) -> bool:
    """the task or the change is facts"""
    return "facts" in (facts.situation.task, facts.situation.change)


def is_domain_language(facts: Facts) -> bool:
    """the task or the change is domain language"""
    return "domain_language" in (facts.situation.task, facts.situation.change)


def is_much_text(facts: Facts) -> bool:
    """plain text of 100M tokens and more"""
    return facts.amount.is_plain_text and facts.amount.tokens >= MUCH_TEXT


def is_plain_text(facts: Facts) -> bool:
    """what is learnt is plain text"""
    return facts.amount.is_plain_text


def is_distillation(facts: Facts) -> bool:
    """the task is distillation"""
    return facts.situation.task == "distillation"


def is_deep(facts: Facts) -> bool:
    """the change is behaviour or domain language"""
    return facts.situation.change in DEEP_CHANGES or is_domain_language(facts)


def is_behaviour(facts: Facts) -> bool:
    """the change is behaviour"""
    return facts.situation.change == "behaviour"


# Who uses the result


def several_tenants(facts: Facts) -> bool:
    """two tenants or more"""
    return facts.tenants >= 2


def many_tenants(facts: Facts) -> bool:
    """ten tenants or more"""
    return facts.tenants >= MANY_TENANTS


def is_distributed(facts: Facts) -> bool:
    """the weights are handed to others"""
    return facts.situation.distribute is True


def points_pay(facts: Facts) -> bool:
    """one point of quality is worth more than what full fine-tuning costs beyond LoRA"""
    return facts.worth_usd > facts.full_extra_usd


# Memory, money, time


def is_small_model(facts: Facts) -> bool:
    """a model under 2B parameters for one tenant"""
    return facts.is_size_known and facts.params < SMALL_MODEL and facts.tenants == 1


def nothing_to_spend(facts: Facts) -> bool:
    """a budget of 0 and no GPUs at hand"""
    return facts.situation.budget_usd == 0 and facts.situation.gpus is None


def _a_delta_fits(facts: Facts) -> bool:
    return any(map(facts.may_fit_here, DELTAS))


def full_fits_only_elsewhere(facts: Facts) -> bool:
    """full fine-tuning does not fit the GPUs at hand, an adapter does, the data may leave"""
    is_free = facts.situation.data_may_leave is not False
    return is_free and not facts.fits_here(Method.FULL) and _a_delta_fits(facts)


def full_fits_nowhere(facts: Facts) -> bool:
    """full fine-tuning does not fit the GPUs at hand, an adapter does, the data may not leave"""
    is_bound = facts.situation.data_may_leave is False
    return is_bound and not facts.fits_here(Method.FULL) and _a_delta_fits(facts)


def only_full_fits_nothing(facts: Facts) -> bool:
    """full fine-tuning fits no machine of up to eight GPUs, an adapter does"""
    return facts.best(Method.FULL) is None and not all(facts.best(m) is None for m in DELTAS)


def only_full_is_over_budget(facts: Facts) -> bool:
    """full fine-tuning costs more than the budget, an adapter does not"""
    is_over = facts.best(Method.FULL) is not None and facts.is_over_budget(Method.FULL)
    return is_over and not all(map(facts.is_over_budget, DELTAS))


def only_full_is_too_slow(facts: Facts) -> bool:
    """full fine-tuning takes longer than the deadline, an adapter does not"""
    is_over = facts.best(Method.FULL) is not None and facts.is_too_slow(Method.FULL)
    return is_over and not all(map(facts.is_too_slow, DELTAS))


def lora_does_not_fit(facts: Facts) -> bool:
    """LoRA does not fit the GPUs at hand"""
    return not facts.fits_here(Method.LORA)


def only_lora_is_over_budget(facts: Facts) -> bool:
    """LoRA costs more than the budget, QLoRA on its cheapest machine does not"""
    return facts.is_over_budget(Method.LORA) and not facts.is_over_budget(Method.QLORA)


# What was measured


def measured_adapter(facts: Facts) -> bool:
    """the latest comparable comparison of the user's own recommends LoRA or QLoRA"""
    return facts.measured_best in ("lora", "qlora")


def measured_qlora(facts: Facts) -> bool:
    """the same recommends QLoRA"""
    return facts.measured_best == "qlora"


def measured_full(facts: Facts) -> bool:
    """the same recommends full fine-tuning, and there are fewer than ten tenants"""
    return facts.measured_best == "full" and not many_tenants(facts)  # quality, not serving


def measured_base(facts: Facts) -> bool:
    """the same recommends the untouched base"""
    return facts.measured_best == "base"
