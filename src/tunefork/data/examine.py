"""What each example says and in which roles: secrets, addresses, markup, broken text, odd turns.

All text is looked at that a model would be given, in training or evaluation: every turn, prompts
and system turns included, because unsupervised text is in its context all the same.
"""

from collections import Counter
from collections.abc import Callable, Iterator

from tunefork.data.example import Example
from tunefork.data.faults import Fault, Findings, Place
from tunefork.data.markup import find_markup
from tunefork.data.roles import find_roles
from tunefork.data.secrets import find_emails, find_secrets
from tunefork.data.unicode import find_broken
from tunefork.recipe import FaultSection

Found = tuple[str, int]


def _in_text(find: Callable[[str], Iterator[Found]]) -> Callable[[Example], list[Found]]:
    """`find` in every text of an example."""
    known: dict[str, list[Found]] = {}  # one system turn often stands in every row

    def look(example: Example) -> list[Found]:
        found = list(find(example.text)) if example.text is not None else []
        for message in example.messages:
            if message.role != "system":
                found += find(message.content)
                continue
            if message.content not in known:
                known[message.content] = list(find(message.content))
            found += known[message.content]
        return found

    return look


def _roles(example: Example) -> list[Found]:
    return list(find_roles([message.role for message in example.messages]))


def examine(
    train: list[Example],
    held: list[Example],
    faults: FaultSection,
    findings: Findings,
    markup: frozenset[str],
) -> tuple[list[Example], list[Example]]:
    """Look at every example; returns those of each split that the recipe does not drop. `markup`:
    the tokenizer's `control_tokens`."""
    for fault, action, look, form in (
        (Fault.ROLES, faults.roles, _roles, "{} (messages[{}])"),
        (Fault.MARKUP, faults.markup, _in_text(find_markup(markup)), "{} ({} times)"),
        (Fault.UNICODE, faults.unicode, _in_text(find_broken), "{} ({} times)"),
        (Fault.SECRETS, faults.secrets, _in_text(find_secrets), "{} ({} characters)"),
        (Fault.EMAILS, faults.emails, _in_text(find_emails), "{} ({} characters)"),
    ):
        if action == "ignore":
            continue
        places: list[Place] = []
        kinds: Counter[str] = Counter()
        splits: list[list[Example]] = []
        for examples in (train, held):
            kept = []
            for example in examples:
                if found := look(example):
                    kinds.update(kind for kind, _ in found)
                    what = ", ".join(form.format(kind, number) for kind, number in found)
                    places.append(Place(source=example.source, what=what))
                if not found or action != "drop":
                    kept.append(example)
            splits.append(kept)
        num_dropped = len(train) + len(held) - len(splits[0]) - len(splits[1])
        train, held = splits
        findings.add(fault, action, places, kinds=kinds, num_dropped=num_dropped)
    return train, held
