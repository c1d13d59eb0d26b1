"""`model:` and `data:`: what training starts from, and what a row becomes."""

from typing import Annotated, Literal

from pydantic import Field

from tunefork.recipe.faults import FaultSection
from tunefork.recipe.section import Format, PositiveInt, Section, Seed, Share


class ModelSection(Section):
    """The model that training starts from. A plain string is short for `id`."""

    id: Annotated[str, Field(min_length=1)]
    """A hub id, a local Hugging Face folder, a `.gguf` file, or a packaged model's short name
    (`smollm2-135m-instruct`)."""

    revision: str | None = None
    """Branch, tag or commit of a hub id. Refused for everything else."""

    add_tokens: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Tokens added to the tokenizer. Their rows of the embedding (and of the output head) start as
    the mean of the others and are trained by every method: by LoRA and QLoRA alone, as PEFT's
    `trainable_token_indices`, unless `lora.modules_to_save` trains all rows."""


class DataSection(Section):
    """Where the examples come from and how a row becomes a supervised sequence."""

    train: Annotated[str, Field(min_length=1)]
    """A `.jsonl`, `.csv` or `.parquet` file, or a hub data set as `owner/name` or
    `owner/name:split` (split `train` by default). Paths are relative to the recipe's folder."""

    eval: str | None = None
    """Held-out examples, in the same forms. When absent, `eval_share` of the training examples
    is cut off, by a hash of each example, before anything is trained."""

    eval_share: Share = 0.1
    """Share of the training examples held out when `eval` is absent."""

    format: Format = "auto"
    """What a row holds. `auto` decides by the fields of all rows: `messages`,
    `conversations` (sharegpt), `instruction` + `output` (alpaca), `prompt` + `completion`,
    `text` + `label` (classification), `text`."""

    columns: dict[str, str] = Field(default={})
    """Renames: the field that `format` expects -> the column that the file has."""

    instruction: str | None = None
    """Classification only: the request put before every text. The default lists the labels."""

    labels: tuple[str, ...] | None = None
    """Classification only: the answers allowed, in order. Default: those of the training
    examples, sorted."""

    system: str | None = None
    """A system turn for rows that bring none, as a turn or in a field `system` (classification has
    no such field). Default: what the chat template does by itself."""

    template: Literal["auto", "chat", "plain"] = "auto"
    """`chat` renders turns by the tokenizer's chat template, `plain` joins prompt and answer
    without one; `auto` is `chat` where the tokenizer has a template."""

    supervise: Literal["all", "last"] = "all"
    """Which assistant turns are learnt. `last` suits templates that rewrite earlier turns."""

    max_length: Annotated[int, Field(ge=8)] = 1024
    """Longest sequence, tokens."""

    too_long: Literal["error", "cut", "drop"] = "error"
    """For a row over `max_length`: refuse the data, cut its end, or leave it out; counted and
    reported. A row whose supervised tokens would all be cut away is left out. Plain `text` is
    always split into sequences of `max_length` instead, and nothing is lost."""

    bad_rows: Literal["error", "drop"] = "error"
    """For a row that cannot be used (not JSON, a field missing, an empty answer): refuse the
    data, or leave the row out; either way each is reported by file:line."""

    overlap: Literal["error", "drop"] = "error"
    """For an evaluation example that is also a training example: refuse the data, or leave it
    out of the training examples."""

    faults: FaultSection = FaultSection()

    max_train_examples: PositiveInt | None = None
    """Train on a random subset of this many examples (by `data.seed`)."""

    max_eval_examples: PositiveInt | None = None
    """Evaluate on a random subset of this many examples (by `data.seed`)."""

    seed: Seed | None = None
    """Seeds the choice of examples: the two subsets above and `train.validation_share`. Default:
    `train.seed`. Runs with one `data.seed` and several `train.seed`s differ in training alone,
    which is how `tunefork sweep` varies the seed."""
