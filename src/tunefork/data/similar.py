"""Examples that repeat each other: exactly, with another label, and nearly (`near.py`)."""

from tunefork.data.example import Example
from tunefork.data.faults import Fault, Findings, Place
from tunefork.data.near import Near, find_near
from tunefork.data.split import content_key, prompt_key
from tunefork.recipe import FaultSection


def check_repeats(
    train: list[Example], held: list[Example], faults: FaultSection, findings: Findings
) -> tuple[list[Example], list[Example]]:
    """Look for all of them; returns those of each split that the recipe does not drop."""
    if faults.duplicates != "ignore":
        train, held = _duplicates(train, held, faults, findings)
    if faults.contradictions != "ignore":
        _contradictions(train, faults, findings)
    if faults.near_duplicates == faults.near_overlap == "ignore":
        return train, held
    # All of them whatever is looked for: what counts as a template's wording depends on all texts.
    near = find_near([_compared(e) for e in (*train, *held)], faults.near_similarity)
    dropped: set[int] = set()
    if faults.near_overlap != "ignore":
        dropped |= _near_overlap(train, held, near, faults, findings)
    if faults.near_duplicates != "ignore":
        dropped |= _near_duplicates(train, near, faults, findings)
    return [example for index, example in enumerate(train) if index not in dropped], held


def _compared(example: Example) -> str:
    """What makes examples alike: all turns but the system's, and not a label."""
    if example.text is not None:
        return example.text
    turns = example.messages[:-1] if example.label is not None else example.messages
    return "\n".join(turn.content for turn in turns if turn.role != "system")


def _duplicates(
    train: list[Example], held: list[Example], faults: FaultSection, findings: Findings
) -> tuple[list[Example], list[Example]]:
    places: list[Place] = []
    splits: list[list[Example]] = []
    for examples in (train, held):
        first: dict[bytes, Example] = {}
        for example in examples:
            other = first.setdefault(content_key(example), example)
            if other is not example:
                places.append(Place(source=example.source, what=f"repeats {other.source}"))
        splits.append(list(first.values()) if faults.duplicates == "drop" else examples)
    findings.add(Fault.DUPLICATES, faults.duplicates, places, num_dropped=len(places))
    return splits[0], splits[1]


def _contradictions(train: list[Example], faults: FaultSection, findings: Findings) -> None:
    first: dict[bytes, Example] = {}
    places = []
    for example in train:
        if example.label is None:
            continue
        other = first.setdefault(prompt_key(example), example)
        if other.label != example.label:
            places.append(Place(source=example.source, what=f"has the text of {other.source}"))
    findings.add(Fault.CONTRADICTIONS, faults.contradictions, places)


def _near_overlap(
    train: list[Example],
    held: list[Example],
    near: Near,
    faults: FaultSection,
    findings: Findings,
) -> set[int]:
    """Indices of the training examples to leave out. Equal prompts are `audit.separate`'s."""
    members: dict[int, list[int]] = {}
    for index in range(len(train)):
        members.setdefault(near.group[index], []).append(index)
    equal = {content_key(example) for example in train} | {prompt_key(e) for e in train}
    places: list[Place] = []
    dropped: set[int] = set()
    for index, example in enumerate(held):
        alike = [g for g in near.like(len(train) + index) if g in members]
        if not alike or content_key(example) in equal or prompt_key(example) in equal:
            continue
        likeness = near.like(len(train) + index)
        best = max(alike, key=lambda group: (likeness[group], -members[group][0]))
        what = f"is {likeness[best]:.0%} like {train[members[best][0]].source}"
        places.append(Place(source=example.source, what=what))
        dropped |= {member for group in alike for member in members[group]}
    is_drop = faults.near_overlap == "drop"
    num_dropped = len(dropped) if is_drop else 0
    findings.add(Fault.NEAR_OVERLAP, faults.near_overlap, places, num_dropped=num_dropped)
    return dropped if is_drop else set()


def _near_duplicates(
    train: list[Example], near: Near, faults: FaultSection, findings: Findings
) -> set[int]:
    """Indices of the training examples to leave out: those like an earlier one that is kept."""
    kept: dict[int, int] = {}  # group -> its first example
    seen: set[bytes] = set()
    places: list[Place] = []
    dropped: set[int] = set()
    for index, example in enumerate(train):
        key = content_key(example) if example.label is None else prompt_key(example)
        if key in seen:
            continue  # an exact duplicate or a contradiction, counted as such
        seen.add(key)
        likeness = near.like(index)
        alike = [group for group in likeness if group in kept]
        if alike:
            best = max(alike, key=lambda group: (likeness[group], -kept[group]))
            what = f"is {likeness[best]:.0%} like {train[kept[best]].source}"
            places.append(Place(source=example.source, what=what))
            dropped.add(index)
        elif near.group[index] >= 0:
            kept[near.group[index]] = index
    is_drop = faults.near_duplicates == "drop"
    num_dropped = len(dropped) if is_drop else 0
    findings.add(Fault.NEAR_DUPLICATES, faults.near_duplicates, places, num_dropped=num_dropped)
    return dropped if is_drop else set()
