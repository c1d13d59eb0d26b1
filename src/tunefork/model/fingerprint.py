"""The identity of a base, computed from its files: weights, tokenizer, template, configuration.

What is computed is remembered by the files that it came from, so that only the first call reads.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tunefork.errors import IdentityError, ModelError
from tunefork.installed import version
from tunefork.model.fingerprint_cache import key_of, recall, remember
from tunefork.model.fingerprint_config import config_sha256
from tunefork.model.fingerprint_tokenizer import (
    rendering_sha256,
    template_sha256,
    tokenizer_sha256,
)
from tunefork.model.fingerprint_weights import weights_sha256
from tunefork.model.identity import Identity, check_identity, short
from tunefork.model.load import load_config, load_skeleton, load_tokenizer
from tunefork.model.weight_files import Located, find_files, weight_files
from tunefork.recipe import ModelSection

__all__ = ["Identity", "check_identity", "check_rendering", "identify", "identify_trained"]

_TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")


def identify(section: ModelSection) -> Identity:
    """The identity of the model that `section` names; instant where its files are as last time.

    Reads the weights once, without loading them. Raises ModelError for a model that cannot be read
    or whose weights are in pickle. Tokens that a recipe adds are its adapter's, not the base's.
    """
    section = section.model_copy(update={"add_tokens": ()})
    located = find_files(section)
    tokenizer = _tokenizer_digests(section, located)
    return Identity(
        weights_sha256=_weights_digest(section, located),
        tokenizer_sha256=tokenizer[0],
        template_sha256=tokenizer[1] or None,
        config_sha256=config_sha256(load_config(section)),
    )


def identify_trained(folder: Path, tokenizer: Any) -> Identity:
    """The identity of a model saved in `folder` that was trained with `tokenizer` in memory.

    Opening the folder later and finding another shows that it came back otherwise than it was.
    """
    section = ModelSection(id=str(folder))
    return Identity(
        weights_sha256=_weights_digest(section, find_files(section)),
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        template_sha256=template_sha256(tokenizer),
        config_sha256=config_sha256(load_config(section)),
    )


def check_rendering(folder: Path, base: ModelSection) -> None:
    """Raise IdentityError where a tokenizer saved in `folder` renders other ids than `base`'s.

    What was trained on one side would be asked on the other. A folder without a tokenizer passes.
    """
    if not (folder / "tokenizer_config.json").is_file():
        return
    beside = Located(str(folder), folder, None)
    load_own = partial(load_tokenizer, ModelSection(id=str(folder)), folder)
    own = _of_tokenizer("rendering", beside, load_own, rendering_sha256)
    bases = _of_tokenizer(
        "rendering", find_files(base), partial(load_tokenizer, base), rendering_sha256
    )
    if own != bases:
        raise IdentityError(
            f"{folder}: its tokenizer and chat template render other ids ({short(own)}) than those "
            f"of {base.id} ({short(bases)}), so that the adapter would be asked otherwise than it "
            "was trained; give the base that has the same, or remove the tokenizer files from the "
            "adapter's folder if the base's are right"
        )


def _weights_digest(section: ModelSection, located: Located) -> str:
    files = weight_files(located)
    keyed = [*files, located.folder / "config.json"]  # which says what is tied
    key = key_of(keyed, located.what)
    if (known := recall("weights", key)) is not None:
        return known
    found = weights_sha256(files, _aliases(section), located.what)
    if key_of(keyed, located.what) != key:
        raise ModelError(f"{located.what}: its files changed while they were read; try again")
    remember("weights", key, found)
    return found


def _aliases(section: ModelSection) -> dict[str, str]:
    """Names of tied weights -> the name of the weight that they are."""
    skeleton = load_skeleton(section)
    first: dict[int, str] = {}
    aliases = {}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        if (target := first.setdefault(id(parameter), name)) != name:
            aliases[name] = target
    return aliases


def _tokenizer_digests(section: ModelSection, located: Located) -> list[str]:
    """Of tokenizer and template; an empty one for a tokenizer without a template."""

    def compute(tokenizer: Any) -> str:
        return f"{tokenizer_sha256(tokenizer)} {template_sha256(tokenizer) or ''}"

    load = partial(load_tokenizer, section)
    return _of_tokenizer("tokenizer", located, load, compute).split(" ")


def _of_tokenizer(
    kind: str, located: Located, load: Callable[[], Any], compute: Callable[[Any], str]
) -> str:
    """What `compute` makes of what `load` loads; the libraries that build it are in the key."""
    libraries = [version("transformers"), version("tokenizers")]

    def key() -> list[list[Any]]:
        return key_of((f for p in _TOKENIZER_FILES for f in located.folder.glob(p)), located.what)

    before = key()
    if (known := recall(kind, before, libraries)) is not None:
        return known
    found = compute(load())
    if key() == before:  # else files were fetched, or changed, meanwhile: the next call computes
        remember(kind, before, found, libraries)
    return found
