"""The common questions, answered for the situation given: `tunefork advise --explain TOPIC`.

Again a table: rows of a topic that apply are said, in order, with the situation's figures.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import Literal, get_args

from tunefork.advise import conditions as when
from tunefork.advise.advice import Reason
from tunefork.advise.facts import Facts
from tunefork.advise.figures import fill
from tunefork.advise.place import where
from tunefork.advise.sources import (
    ARITHMETIC,
    DEMO,
    LESS,
    PLAN,
    QLORA,
    REGRET,
    S_LORA,
    SPEED,
    TULU,
    VLLM,
    thumb,
)
from tunefork.page.units import counted, usd_text
from tunefork.recipe import Method

Topic = Literal["rank", "serving", "full", "qlora", "duration", "managed"]
TOPICS: tuple[Topic, ...] = get_args(Topic)


@dataclass(frozen=True, slots=True)
class Answer:
    """A row: one or two sentences on a topic."""

    topic: Topic
    applies: Callable[[Facts], bool]
    text: str
    source: str


ANSWERS: tuple[Answer, ...] = (
    Answer(
        "rank",
        when.data_fits_a_rank,
        "Start at rank {rank}. It trains {delta} parameters ({share} of {params}), which hold "
        "about what {capacity} supervised tokens bring; you have {supervised}, for which rank "
        "{rank_needed} is enough.",
        REGRET,
    ),
    Answer(
        "rank",
        when.data_fits_no_rank,
        "No standard rank holds {supervised} supervised tokens on {params}: rank 256 holds about "
        "{most}. Train all weights, or accept that an adapter stops short.",
        REGRET,
    ),
    Answer(
        "rank",
        when.always,
        "Twice the rank doubles the adapter ({adapter} at rank {rank}) and its optimiser, and "
        "moves quality little where the data fits: with alpha 32 and 1/rank the best learning rate "
        "stays within 2 times from rank 4 to 512.",
        REGRET + "; " + thumb(13),
    ),
    Answer(
        "rank",
        when.always,
        "Which rank is best for you only your evaluation set says: train rank 16 and rank 64 "
        "(--set lora.rank=64) and look whether the intervals part.",
        thumb(13),
    ),
    Answer(
        "serving",
        when.always,
        "Yes, one server can serve many adapters over one base: the base ({model}) is loaded once, "
        "each adapter adds {adapter}; {tenants} of them are {adapters}.",
        thumb(6) + "; " + S_LORA,
    ),
    Answer(
        "serving",
        when.always,
        "It is not free. Measured at 8B on one H200 with 64 requests at once: 8,431 output "
        "tokens/s for the base, 2,831 with 32 adapters all loaded, 1,474 with 8 slots for the 32.",
        VLLM,
    ),
    Answer(
        "serving",
        when.several_tenants,
        "Fully tuned, {tenants} customers would be {tenants} models of {model}, {models} together, "
        "each with a GPU of its own while it is in use.",
        ARITHMETIC,
    ),
    Answer(
        "serving",
        when.always,
        "With a single adapter, merge it into the base: it then serves at the base's speed. An "
        "adapter belongs to exactly one version of its base.",
        thumb(11),
    ),
    Answer(
        "full",
        when.always,
        "Full fine-tuning is worth it where (1) the data is more than an adapter holds: above "
        "{most} supervised tokens on {params}, you have {supervised};",
        REGRET,
    ),
    Answer(
        "full",
        when.always,
        "(2) a point of quality is worth more than getting it right costs: about {extra} beyond "
        "LoRA for {runs} runs, and you said a point is worth: {worth};",
        thumb(5) + "; " + PLAN,
    ),
    Answer(
        "full",
        when.always,
        "(3) the model must be at home in another language or field, or becomes a model of its own "
        "for others: in continued pre-training rank 256 reached 0.224 on HumanEval, full 0.263; in "
        "instruction tuning they were equal (0.498, 0.497; Llama-2-7B).",
        LESS,
    ),
    Answer(
        "full",
        when.always,
        "Here it would take {full_where}, {full_time} and {full_cost} a run (predicted), against "
        "{lora_where}, {lora_time} and {lora_cost} for LoRA, and it forgets more of the base.",
        PLAN + "; " + LESS,
    ),
    Answer(
        "qlora",
        when.always,
        "QLoRA is for when memory is the limit: the frozen base lies in 4 bits. Here it needs "
        "{qlora_peak} a GPU, LoRA {lora_peak}, full fine-tuning {full_peak} (predicted, high end).",
        QLORA + "; " + PLAN,
    ),
    Answer(
        "qlora",
        when.lora_does_not_fit,
        "On {gpus} ({memory}) LoRA does not fit, so this is that case.",
        PLAN,
    ),
    Answer(
        "qlora",
        lambda facts: not when.lora_does_not_fit(facts),
        "Memory is not your limit: QLoRA would be trained on {qlora_where} in {qlora_time} for "
        "{qlora_cost}, LoRA on {lora_where} in {lora_time} for {lora_cost}.",
        PLAN,
    ),
    Answer(
        "qlora",
        when.always,
        "It costs speed (4 bits are unpacked in each layer and pass) and perhaps quality: MMLU "
        "53.1 against 53.0 in bf16, but AlpacaEval 56.1 against full's 73.9 (7B). Evaluate it.",
        QLORA + "; " + TULU,
    ),
    Answer(
        "duration",
        when.always,
        "{steps} over {tokens} tokens x {epochs}: LoRA {lora_time} on {lora_where}, "
        "QLoRA {qlora_time} on {qlora_where}, full {full_time} on {full_where} (predicted).",
        PLAN,
    ),
    Answer(
        "duration",
        when.several_tenants,
        "That is for all {tenants} customers, one after the other.",
        ARITHMETIC,
    ),
    Answer(
        "duration",
        when.always,
        "Do not count on LoRA being 3-5 times faster: at 8B on one H200 full fine-tuning in bf16 "
        "ran 10.2k tokens/s, LoRA 9.3k to 16.4k depending on the tool and on recomputing, so 0.9 "
        "to 1.6 times. What it saves is memory.",
        SPEED + "; " + thumb(3),
    ),
    Answer(
        "duration",
        when.always,
        "A search for the learning rate takes up to about as long as one run, for each method "
        "(tunefork compare), and every further seed one run more.",
        DEMO,
    ),
)


def explain(facts: Facts, topic: Topic, today: date | None = None) -> list[Reason]:
    """A few concrete sentences on `topic`, each with its source."""
    said = [
        Reason(text=fill(row.text, facts), source=fill(row.source, facts), rule=f"explain-{topic}")
        for row in ANSWERS
        if row.topic == topic and row.applies(facts)
    ]
    return said + (_managed(facts, today or date.today()) if topic == "managed" else [])


def _managed(facts: Facts, today: date) -> list[Reason]:
    """Own or managed: prices side by side, for LoRA (what such services sell)."""
    place = where(facts, "lora", Method.LORA, today)
    own = "" if place.own is None else f"{usd_text(place.own.cost_usd)} on {place.own.machine}"
    texts = [
        (
            f"{place.text} One's own run of LoRA would cost about {own or 'more than eight GPUs'} "
            f"(predicted, one run; {fill('{tokens}', facts)} tokens x "
            f"{fill('{epochs}', facts)}, {counted(facts.tenants, 'customer')}).",
            PLAN,
        )
    ]
    for service in place.managed:
        closing = f", no new jobs from {service.self_serve_until}" * bool(service.self_serve_until)
        against = "" if service.is_usable else f": {service.why_not}"
        texts.append(
            (
                f"{service.name}: about {usd_text(service.cost_usd)}{closing}{against}.",
                f"{service.source} ({service.date})",
            )
        )
    texts.append(
        (
            "A managed service pays where runs are few and small, the data may leave and LoRA on "
            "one of its models is wanted; one's own machine where there are many runs or adapters, "
            "data that may not leave, full fine-tuning, or weights to be handed on.",
            ARITHMETIC,
        )
    )
    return [Reason(text=text, source=source, rule="explain-managed") for text, source in texts]
