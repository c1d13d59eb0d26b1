"""`data.faults:`: what to do about each fault that `tunefork data check` looks for."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tunefork.recipe.section import PositiveInt, Section

Action = Literal["error", "warn", "drop", "ignore"]
"""Refuse the data, say it and go on, leave the row out, or do not look."""
Verdict = Literal["error", "warn", "ignore"]
"""For what no single row is to blame: there is nothing to drop."""


class FaultSection(Section):
    """What to do about each fault that `tunefork data check` looks for: `error` refuses the data,
    `warn` says it and goes on, `drop` leaves those rows out and says so, `ignore` does not look.
    Every default is `warn`, because each of these can be meant. (See also `data.bad_rows`,
    `data.too_long` and `data.overlap`.)"""

    duplicates: Action = "warn"
    """An example that says what an earlier one of its split says, white space aside. `drop` keeps
    the first."""

    contradictions: Verdict = "warn"
    """Classification: a text that is trained on with two labels."""

    near_duplicates: Action = "warn"
    """A training example that is nearly an earlier one (`near_similarity`). `drop` keeps the
    first."""

    near_overlap: Action = "warn"
    """An evaluation example that is nearly a training example. `drop` leaves the training example
    out."""

    near_similarity: Annotated[float, Field(ge=0.5, le=1.0)] = 0.8
    """Nearly: the share that two texts have in common of all their runs of three words (Jaccard
    similarity), upper case, punctuation and wording that many rows share aside. 0.8 is what large
    corpora are deduplicated at (Lee et al. 2022, https://arxiv.org/abs/2107.06499). One other word
    makes a different text up to 28 words, or 10 where it is the first or last."""

    roles: Action = "warn"
    """A conversation with two turns of one role in a row, a system turn that is not the first, or
    a tool's turn that follows no answer. (What cannot be rendered at all is a bad row.)"""

    markup: Action = "warn"
    """Control tokens of the model's tokenizer written in a text, such as `<|im_end|>`: there a turn
    would end, and what follows be trained on as another one."""

    unicode: Action = "warn"
    """Text that was broken on its way: U+FFFD, UTF-8 read as another encoding, NUL and control
    characters, byte-order marks."""

    secrets: Action = "warn"
    """Private keys, access tokens, passwords in URLs, random values of keys and passwords. What a
    model is trained on it can repeat."""

    emails: Action = "warn"
    """E-mail addresses, those reserved for examples aside (RFC 2606)."""

    unseen_labels: Verdict = "warn"
    """Classification: evaluation examples with a label of `data.labels` that is never trained
    on."""

    similar_labels: Verdict = "warn"
    """Classification: labels that differ only in case, white space or Unicode normalisation."""

    imbalance: Verdict = "warn"
    """Classification: the most frequent label has over `imbalance_ratio` times the training
    examples of the rarest."""

    imbalance_ratio: Annotated[float, Field(ge=1.0)] = 20.0
    """See `imbalance`. A convention, not a law: small classes may need examples, not a warning."""

    few_eval: Verdict = "warn"
    """Classification: a trained label has fewer than `min_eval_per_label` evaluation examples."""

    min_eval_per_label: PositiveInt = 3
    """See `few_eval`. With fewer, one answer moves a label's accuracy by half or more; to compare
    labels give tens of each."""

    @model_validator(mode="after")
    def _numbers_apply(self) -> Self:
        fields = type(self).model_fields
        for number, faults in (
            ("near_similarity", ("near_duplicates", "near_overlap")),
            ("imbalance_ratio", ("imbalance",)),
            ("min_eval_per_label", ("few_eval",)),
        ):
            is_set = getattr(self, number) != fields[number].default
            if is_set and all(getattr(self, fault) == "ignore" for fault in faults):
                raise ValueError(f"{number}: has no use where {' and '.join(faults)}: ignore")
        return self
