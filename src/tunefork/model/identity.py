"""The identity of a base, and the refusal of another one.

An adapter is worth something over one exact base only, and two bases with the same shapes take the
same adapter in silence. So a run records the identity of what it trained on, and whatever loads
its artefact compares: content with content, wherever either lies and however it is stored.
(`fingerprint.py` computes it; this module imports nothing heavy, so that records can be listed.)
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from tunefork.errors import IdentityError

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

_SHOWN = 12
"""Characters of a digest that messages show."""


class Identity(BaseModel):
    """What a base is. Two with equal digests compute the same from the same messages."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    weights_sha256: Sha256
    """Of the weights' values, whatever files and dtypes hold them."""
    tokenizer_sha256: Sha256
    """Of the vocabulary, merges, added tokens and of the ids of fixed texts."""
    template_sha256: Sha256 | None
    """Of the chat template and the ids of fixed conversations; None: the tokenizer has none."""
    config_sha256: Sha256 | None = None
    """Of what the configuration says of the computation (`fingerprint_config.py`): its rotary base,
    say. None: not recorded, and then not compared."""

    def of_model(self) -> str:
        """Weights and configuration in one word."""
        return f"{self.weights_sha256}+{self.config_sha256}"


def check_identity(recorded: Identity, found: Identity, *, what: str, base: str) -> None:
    """Raise IdentityError unless `found`, the identity of `base`, is the one that `what` records.

    The message names both sides, all that differs between them, and what to do.
    """
    known = {recorded.config_sha256, found.config_sha256} - {None}
    differing = [
        f"{name} {short(was)} recorded, {short(now)} found"
        for name, was, now in (
            ("weights", recorded.weights_sha256, found.weights_sha256),
            ("tokenizer", recorded.tokenizer_sha256, found.tokenizer_sha256),
            ("chat template", recorded.template_sha256, found.template_sha256),
        )
        if was != now
    ]
    if len(known) > 1:
        differing.append(
            f"configuration {short(recorded.config_sha256)} recorded, "
            f"{short(found.config_sha256)} found (the weights are computed with otherwise)"
        )
    if not differing:
        return
    raise IdentityError(
        f"{what}: does not belong to {base} as it is now: {'; '.join(differing)}; give the very "
        "model that it was made with (another revision or copy, perhaps), or train on this one"
    )


def short(digest: str | None) -> str:
    """What messages show of `digest`."""
    return "none" if digest is None else digest[:_SHOWN]
