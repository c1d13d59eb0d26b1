"""Conversations whose turns come in an order that no chat has.

What cannot be rendered or learnt from (an unknown role, an answer first, no answer last) is a bad
row already, see `convert.py`; here is what a template would render, but was hardly meant.
"""

from collections.abc import Iterator, Sequence


def find_roles(roles: Sequence[str]) -> Iterator[tuple[str, int]]:
    """(kind, the turn it is at, from 0) of each fault in the order of `roles`."""
    for index, role in enumerate(roles):
        before = roles[index - 1] if index else None
        if role == "system" and index:
            yield "a system turn that is not the first", index
        elif role == before and role != "tool":  # one answer may call several tools
            yield f"two {role} turns in a row", index
        elif role == "tool" and before not in ("assistant", "tool"):
            yield "a tool turn that follows no answer", index
