"""docs/advice.md: how an answer is formed, and the tables that form it, written from the tables."""

import re
from collections.abc import Callable, Iterable, Sequence

from pydantic import BaseModel

from tunefork.advise.advice import Advice
from tunefork.advise.amount import TYPICAL
from tunefork.advise.facts import Facts
from tunefork.advise.rules import FORMS, STARTS, VOTES, Vote
from tunefork.advise.situation import MISSING, Situation
from tunefork.advise.sources import THUMB
from tunefork.schema_markdown import schema_markdown

INTRODUCTION = """\
`tunefork advise` answers "LoRA, QLoRA or full fine-tuning?" from a description, before anything is
trained. It asks a few questions on a terminal; `--situation FILE` or flags answer them without
one.

```
tunefork advise --model 8B --task classification --examples 50k
tunefork advise --situation examples/situations/2_many_customers.yaml --explain serving
tunefork advise --situation mine.yaml --json --recipe-out recipe.yaml
```

Generated from `src/tunefork/advise/` by `python -m tunefork.documentation docs`.

## How the answer is formed

1. **Facts.** What follows from the situation by arithmetic: how much data there is (said, or
   assumed and marked so), which rank holds it, and what LoRA, QLoRA and full fine-tuning take in
   memory, time and money on the GPUs at hand and on the catalogue's (predicted, `tunefork plan`).
2. **Votes.** Each row of the first table that applies adds its weight to one branch: no
   fine-tuning, an adapter, or all weights. The heaviest branch wins; where two are equal, the
   adapter. 1 and 2 are preferences, 3 and 4 strong ones; 8 and 12 decide alone; 28 and 32 settle
   it; 56 is what you measured, more than any rules of thumb that can apply together; 64 is what is
   impossible otherwise.
3. **Form.** Of that branch, the first row of the second table that applies names the method.
4. **Start.** Rows of the third table say why rank, rates and batch start where they do.

**Capacity** (LoRA Without Regret): a trained parameter stores about 2 bits, a supervised token
brings about 1 bit at most. A delta of rank r has r x (inputs + outputs) parameters a layer, so a
rank holds 2 x parameters supervised tokens. The rank advised is the lowest of 8, 16, 32, 64, 128,
256 that holds the data, but at least 16, and at least 64 for a change of behaviour or plain text.
Passes over the same data bring nothing new and do not count. Where not even 256 is enough, that
speaks for full fine-tuning.

**Your own comparisons outrank the rules.** `comparison.json` files below `--runs` (default
`runs/`) and `~/.tunefork/runs` are read, and every one that the store remembers, wherever it lies.
One counts where its model's size is within 1.5 times of
yours *and* its data is of the same kind: classification (it has labels), plain text (every token
learnt), or other answers. The latest that counts weighs 56, more than the rules of thumb can
together; the advice names its folder and figures. A comparison on 135M parameters never decides
for 8B; it is listed with the reason why not.

**Confidence.** `high`: you measured it (and the comparison is at least 95 % sure), or a row that
decides alone is at least 4 ahead. `medium`: the rules of thumb agree, nothing is measured on your
data, or one of model size, task and amount of data was not said. `low`: two of those were not
said, or the best branch is less than 2 ahead. What stands in the way lowers it: to `medium` where
the plan is over the budget or the deadline, to `low` where it is ten times over, would take 90 days
or, without a budget, a million dollars, or fits no machine.

**Where.** Beside each other: the GPUs at hand, the cheapest machine of one to eight GPUs of a kind
that fits and meets the deadline (two weeks where none is given), and managed services at tokens x
epochs x price. Prices are approximate, each with source and date in
`src/tunefork/plan/catalogue.yaml`; `--catalogue FILE` replaces them. A managed service is
recommended only where the data may leave, no GPU is at hand, one adapter is wanted, and it is
cheaper than the machine and an hour to set it up."""


def advice_markdown() -> str:
    """The text of docs/advice.md."""
    parts = [
        "# The advice",
        INTRODUCTION,
        "## Votes: which branch",
        _table(
            ("row", "when", "for", "weight", "because", "source", "border"),
            (
                (v.id, _when(v.applies), v.branch, v.weight, v.text, v.source, _border(v))
                for v in VOTES
            ),
        ),
        "## Forms: which method",
        _table(
            ("row", "branch", "when", "method", "because", "source", "border"),
            (
                (f.id, f.branch, _when(f.applies), f.method, f.text, f.source, f.border)
                for f in FORMS
            ),
        ),
        "## Starts: from where, and what to watch",
        _table(
            ("row", "branch", "knob", "when", "because", "source"),
            (
                (s.id, ", ".join(s.branches), s.knob, _when(s.applies), s.text, s.source)
                for s in STARTS
            ),
        ),
        "## The rules of thumb that are cited",
        "What practitioners say, by number. The advice starts from them where nothing was "
        "measured; `tunefork compare` tests them on your own data.",
        _table(
            ("", "dimension", "LoRA, QLoRA", "full fine-tuning"),
            ((number, *row) for number, row in THUMB.items()),
        ),
        "## What is assumed of the data where it is not said",
        "Round numbers of ours, not measurements; `tunefork data check RECIPE` counts the real "
        "ones.",
        _table(
            ("task", "tokens an example", "share learnt"),
            ((task, t.tokens, f"{t.supervised_share:.0%}") for task, t in TYPICAL.items()),
        ),
        "## What the advice does without a key",
        _table(("key", "effect"), ((f"`{key}`", effect) for key, effect in MISSING.items())),
        _section(Situation, "The situation", "A YAML or JSON file; every key is optional."),
        _section(Advice, "What `--json` prints", "One object."),
    ]
    return "\n\n".join(parts) + "\n"


def _section(schema: type[BaseModel], title: str, introduction: str) -> str:
    """A schema's page one heading deeper; the plan's own parts are left to its page."""
    page = schema_markdown(schema, title, introduction).strip()
    sections = re.split(r"\n\n(?=## )", page)
    kept = [s for s in sections if not s.startswith("## `plan.") and not s.startswith("## `plan`")]
    return "\n\n".join(re.sub(r"^#", "##", section) for section in kept)


def _when(applies: Callable[[Facts], bool]) -> str:
    return (applies.__doc__ or "").strip()


def _border(vote: Vote) -> str:
    return " ".join(filter(None, (vote.border, vote.undone_by)))


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(c).replace("|", "\\|") for c in r) + " |" for r in lines)
