"""The rules of the advice, as three tables, read in this order:

- **VOTES**: each row that applies adds its weight to one branch: no fine-tuning, an adapter, or all
  weights. The heaviest branch wins. A weight of 1 or 2 is a preference, 3 or 4 a strong one; 8
  and 12 decide alone against those; 28 and 32 settle it; 56 is what the user measured, more than
  any rules of thumb that can apply together; 64 is what is impossible otherwise.
- **FORMS**: of the winning branch, the first row that applies names the method.
- **STARTS**: rows of the winning branch that apply say why a knob starts where it does, or what to
  watch.

A `border` says where the answer turns: it is shown where the row supports the answer, and where the
row would support another answer but does not apply. `undone_by` is shown in the first case only.
Texts name figures in braces (figures.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tunefork.advise import conditions as when
from tunefork.advise.facts import Facts
from tunefork.advise.sources import (
    ARITHMETIC,
    DEMO,
    DISTIL,
    LESS,
    NEW_FACTS,
    OPENAI,
    PLAN,
    QLORA,
    REGRET,
    RETRIEVE,
    RUNS,
    S_LORA,
    TULU,
    thumb,
)

Branch = Literal["nothing", "adapter", "all weights"]
Answer = Literal["lora", "qlora", "full", "continued_pretraining", "distillation", "none"]
NOTHING: Branch = "nothing"
ADAPTER: Branch = "adapter"
WEIGHTS: Branch = "all weights"
BRANCHES = (ADAPTER, WEIGHTS, NOTHING)
"""Where two are equally heavy, the first wins: it is the cheaper one to be wrong with."""


@dataclass(frozen=True, slots=True)
class Vote:
    """A row of VOTES."""

    id: str
    branch: Branch
    weight: int
    applies: Callable[[Facts], bool]
    text: str
    source: str
    border: str = ""
    undone_by: str = ""


@dataclass(frozen=True, slots=True)
class Form:
    """A row of FORMS."""

    id: str
    branch: Branch
    method: Answer
    applies: Callable[[Facts], bool]
    text: str
    source: str
    border: str = ""


@dataclass(frozen=True, slots=True)
class Start:
    """A row of STARTS."""

    id: str
    branches: tuple[Branch, ...]
    knob: str
    applies: Callable[[Facts], bool]
    text: str
    source: str


# fmt: off
VOTES: tuple[Vote, ...] = (
    Vote(
        "adapter-first", ADAPTER, 2, when.always,
        "An adapter trains {share} of the parameters and reaches full fine-tuning's quality where "
        "it can hold the data; one experiment is cheap, so start there.",
        REGRET + "; " + thumb(7),
    ),
    Vote(
        "data-fits", ADAPTER, 2, when.data_fits_a_rank,
        "The {supervised} supervised tokens bring at most {bits} bits; rank {rank} can hold what "
        "{capacity} tokens bring.",
        REGRET,
    ),
    Vote(
        "data-too-large", WEIGHTS, 8, when.data_fits_no_rank,
        "The {supervised} supervised tokens bring more than rank 256 can hold ({most} tokens), so "
        "no adapter keeps up with full fine-tuning to the end.",
        REGRET,
        "About {most} supervised tokens (here {supervised}) is what rank 256 holds on this model: "
        "below it an adapter keeps up, beyond it only full fine-tuning does.",
    ),
    Vote(
        "several-tenants", ADAPTER, 8, when.several_tenants,
        "{tenants} parties that each need a behaviour of their own share one base: {adapters} of "
        "adapters in place of {models} of models.",
        thumb(6) + "; " + S_LORA,
        "Two parties or more that each need their own behaviour (here {tenants}) speak for one "
        "base with adapters; for a single one, one model of its own is possible.",
    ),
    Vote(
        "many-tenants", ADAPTER, 12, when.many_tenants,
        "{tenants} models of {model} each would have to be kept loaded ({models}); adapters of "
        "{adapter} can be, or are loaded at request time.",
        S_LORA,
    ),
    Vote(
        "points-pay", WEIGHTS, 12, when.points_pay,
        "Full fine-tuning may gain a point or more over an adapter. A point is worth {worth}; "
        "getting full right ({runs} runs) costs {extra_why}: measure the gap, both ways.",
        thumb(5),
        "A point of quality worth about {extra} (here {worth}): above it full fine-tuning pays if "
        "it gains a point; measure that first.",
    ),
    Vote(
        "domain-language", WEIGHTS, 3, when.is_domain_language,
        "An adapter moves a model's language less far: in continued pre-training on code, rank 256 "
        "reached 0.224 on HumanEval, full 0.263 (Llama-2-7B).",
        thumb(12) + "; " + LESS,
        "If the model must be at home in another language or field (domain_language), learnt from "
        "plain text, that speaks for continued pre-training.",
    ),
    Vote(
        "much-text", WEIGHTS, 4, when.is_much_text,
        "{tokens} tokens of plain text are continued pre-training.",
        LESS,
        "About 100M tokens of plain text (here {tokens} tokens): below that, an adapter of a high "
        "rank or retrieval does.",
    ),
    Vote(
        "distillation", WEIGHTS, 28, when.is_distillation,
        "Distillation teaches a whole model of its own to imitate the teacher on much generated "
        "text, and is shipped as one artefact: train all weights on the teacher's outputs.",
        thumb(12) + "; " + DISTIL,
        "A model of its own that imitates a larger one, for others to run, is distillation: all "
        "weights; a behaviour on top of this model is an adapter.",
    ),
    Vote(
        "deep-change", WEIGHTS, 2, when.is_behaviour,
        "A change of fundamental behaviour goes deeper than an adapter comfortably reaches.",
        thumb(12),
    ),
    Vote(
        "style", ADAPTER, 2, when.is_style,
        "A style or brand voice changes how things are said, not what the model knows: a small "
        "change, which an adapter holds.",
        thumb(12),
    ),
    Vote(
        "narrow", ADAPTER, 2, when.is_narrow,
        "Short answers bring few supervised tokens ({supervised}); training all weights for them "
        "would be waste.",
        thumb(2) + "; " + REGRET,
    ),
    Vote(
        "too-few", NOTHING, 32, when.too_few_examples,
        "So few examples ({examples}) seldom show an effect: put some of them into the prompt, and "
        "keep the rest to measure by.",
        OPENAI,
        "50 examples (here {examples}): fine-tuning is worth a try from there on, with 200 or more "
        "it is on firmer ground.",
    ),
    Vote(
        "few", NOTHING, 2, when.few_examples,
        "With so few examples ({examples}) a prompt that holds some is the thing to beat.",
        OPENAI,
    ),
    Vote(
        "facts", NOTHING, 32, when.is_facts,
        "Facts are better retrieved and put into the prompt: fine-tuning learns new ones slowly, "
        "forgets where they came from, and makes the model state things it does not know.",
        RETRIEVE + "; " + NEW_FACTS,
        undone_by="If answers must have a form or tone of their own besides the facts, fine-tune "
        "for that (change: style or skill) and still retrieve the facts.",
    ),
    Vote(
        "no-money", NOTHING, 64, when.nothing_to_spend,
        "A budget of 0 rents no GPU, and none is at hand: a prompt costs nothing to train.",
        ARITHMETIC,
        undone_by="A budget of about {lora_cost} (LoRA on {lora_where}), or a GPU at hand (gpus).",
    ),
    Vote(
        "full-fits-nothing", ADAPTER, 8, when.only_full_fits_nothing,
        "Full fine-tuning of {params} fits no machine of up to eight GPUs of the catalogue; an "
        "adapter fits {qlora_where}.",
        PLAN,
    ),
    Vote(
        "full-over-budget", ADAPTER, 8, when.only_full_is_over_budget,
        "Full fine-tuning would cost {full_cost} ({full_where}), more than the budget of {budget}; "
        "LoRA costs {lora_cost}.",
        PLAN,
        undone_by="A budget of {full_cost} would allow full fine-tuning ({full_where}).",
    ),
    Vote(
        "full-too-slow", ADAPTER, 8, when.only_full_is_too_slow,
        "Full fine-tuning would take {full_time} on {full_where}, longer than {deadline}; LoRA "
        "takes {lora_time} on {lora_where}.",
        PLAN,
    ),
    Vote(
        "full-elsewhere", ADAPTER, 4, when.full_fits_only_elsewhere,
        "Full fine-tuning needs {full_peak} a GPU, and {gpus} has {memory}; it would need "
        "{full_where}.",
        PLAN + "; " + thumb(2),
        undone_by="{full_where} would hold full fine-tuning.",
    ),
    Vote(
        "full-nowhere", ADAPTER, 64, when.full_fits_nowhere,
        "Full fine-tuning needs {full_peak} a GPU, {gpus} has {memory}, and the data may not leave "
        "for a larger machine.",
        PLAN + "; " + thumb(2),
        undone_by="{full_where} in the house would hold full fine-tuning.",
    ),
    Vote(
        "small-model", WEIGHTS, 1, when.is_small_model,
        "A model of {params} is cheap to train fully ({full_cost}), and in the one comparison at "
        "135M that tunefork ships, full measured best, if not detectably: compare both.",
        DEMO,
    ),
    Vote(
        "one-artefact", WEIGHTS, 1, when.is_distributed,
        "Weights for others are simplest as one artefact; a merged adapter is one too.",
        thumb(6),
    ),
    Vote(
        "measured-adapter", ADAPTER, 56, when.measured_adapter,
        "You measured it, and that outranks the rules of thumb: {measured}.",
        RUNS,
        undone_by="A newer comparison of yours with another verdict.",
    ),
    Vote(
        "measured-full", WEIGHTS, 56, when.measured_full,
        "You measured it, and that outranks the rules of thumb: {measured}.",
        RUNS,
        "A comparison of your own on this size and kind of task (tunefork compare) that puts full "
        "fine-tuning ahead would outrank these rules.",
    ),
    Vote(
        "measured-base", NOTHING, 56, when.measured_base,
        "You measured it, and that outranks the rules of thumb: {measured}.",
        RUNS,
        undone_by="More or other training data, measured again by tunefork compare.",
    ),
)

FORMS: tuple[Form, ...] = (
    Form(
        "form-none", NOTHING, "none", when.always,
        "Prompt or retrieve before fine-tuning.", OPENAI,
    ),
    Form(
        "form-measured-qlora", ADAPTER, "qlora", when.measured_qlora,
        "Your comparison recommends QLoRA over LoRA.", RUNS,
    ),
    Form(
        "form-memory", ADAPTER, "qlora", when.lora_does_not_fit,
        "Memory is the binding limit: LoRA needs {lora_peak} a GPU, and {gpus} has "
        "{memory}; over a base in 4 bits (QLoRA) it needs {qlora_peak}.",
        PLAN + "; " + QLORA,
        "A GPU with {lora_peak} would hold LoRA over the bf16 base, which is faster and spares the "
        "quantisation; {lora_where} does.",
    ),
    Form(
        "form-money", ADAPTER, "qlora", when.only_lora_is_over_budget,
        "LoRA would cost {lora_cost} ({lora_where}), more than the budget of {budget}; QLoRA costs "
        "{qlora_cost} ({qlora_where}).",
        PLAN,
        "A budget of {lora_cost} would allow LoRA over the bf16 base.",
    ),
    Form(
        "form-lora", ADAPTER, "lora", when.always,
        "LoRA over the bf16 base: it fits, and a base in 4 bits would save memory that is not "
        "short, at lower speed.",
        QLORA,
        "Less than {lora_peak} of GPU memory: then QLoRA ({qlora_peak}).",
    ),
    Form(
        "form-distillation", WEIGHTS, "distillation", when.is_distillation,
        "Full fine-tuning on what the teacher answered, prompts as in use.", DISTIL,
    ),
    Form(
        "form-text", WEIGHTS, "continued_pretraining", when.is_plain_text,
        "Continued pre-training: full fine-tuning on plain text, every token learnt.", LESS,
    ),
    Form(
        "form-full", WEIGHTS, "full", when.always,
        "Full fine-tuning; train LoRA beside it (tunefork compare): the gap is what decides.",
        thumb(5),
    ),
)

STARTS: tuple[Start, ...] = (
    Start(
        "rank", (ADAPTER,), "rank", when.always,
        "Rank {rank}: the data needs rank {rank_needed}; 16 is the place to start and 64 for a "
        "deep change. Quality moves little with rank where the data fits.",
        REGRET + "; " + thumb(13),
    ),
    Start(
        "alpha", (ADAPTER,), "alpha", when.always,
        "Alpha 32 with 1/rank keeps the best learning rate nearly the same at every rank.", REGRET,
    ),
    Start(
        "targets", (ADAPTER,), "targets", when.always,
        "All linear layers: attention only loses to MLP only at equal parameters.", REGRET,
    ),
    Start(
        "rate", (ADAPTER,), "learning_rate", when.enough_steps,
        "Learning rate {lora_rate}: about 10 times full fine-tuning's ({full_rate}).", REGRET,
    ),
    Start(
        "rate-short", (ADAPTER,), "learning_rate", when.few_steps,
        "Learning rate {lora_rate}: with only {steps} about 15 times full fine-tuning's "
        "({full_rate}).",
        REGRET,
    ),
    Start(
        "rate-full", (WEIGHTS,), "learning_rate", when.always,
        "Learning rate {full_rate}, a tenth of LoRA's; search it (tunefork compare), one rate for "
        "both methods makes full look bad.",
        REGRET,
    ),
    Start(
        "batch", (ADAPTER,), "batch_size", when.always,
        "Batch {batch}: LoRA falls behind full fine-tuning as batches grow, at any rank.", REGRET,
    ),
    Start(
        "forgets-less", (ADAPTER,), "forgetting", when.always,
        "An adapter forgets less of what the base could (other tasks: 0.617 against full's "
        "0.545 after continued pre-training of Llama-2-7B); the base itself is not touched.",
        LESS,
    ),
    Start(
        "forgets", (WEIGHTS,), "forgetting", when.always,
        "Full fine-tuning forgets more of what the base could (average 0.545 against 0.617 in "
        "continued pre-training of Llama-2-7B): watch evaluate.forgetting, mix in general data.",
        LESS,
    ),
    Start(
        "nf4-cost", (ADAPTER,), "qlora", when.lora_does_not_fit,
        "What 4 bits cost is disputed: MMLU 53.1 against 53.0 in bf16, but AlpacaEval 56.1 against "
        "full's 73.9 (Tulu-2, 7B): evaluate it.",
        QLORA + "; " + TULU,
    ),
    Start(
        "measure", (ADAPTER, WEIGHTS), "measure", when.always,
        "None of this is measured on your data unless a reason above says so: tunefork compare "
        "with this recipe measures it, and the next advice uses the result.",
        thumb(13),
    ),
)
# fmt: on
