"""What an adapter must be before it answers: of this base, alive, and asked as it was trained.

Done once a version, in a thread. (That it changes the logits, the engine sees when it loads it.)
The errors here are for the client: they name no path. The log has the whole message.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from safetensors import safe_open

from tunefork.data.chat import Renderer
from tunefork.data.example import Message
from tunefork.errors import AdapterError, DataError, TuneforkError
from tunefork.model.asked import TEXTS, prompts_sha256
from tunefork.model.fingerprint_tokenizer import rendering_sha256, tokenizer_sha256
from tunefork.model.golden import Undated
from tunefork.model.identity import check_identity
from tunefork.model.load import load_tokenizer
from tunefork.recipe import DataSection, ModelSection
from tunefork.registry.peft_config import WEIGHTS, read_config
from tunefork.registry.peft_format import check_fits
from tunefork.registry.provenance import Provenance, read_provenance
from tunefork.registry.safe_read import read_header
from tunefork.registry.version import Details, changed_files
from tunefork.serve.api.errors import ApiError, is_of_now, unavailable
from tunefork.serve.base import ServedBase
from tunefork.serve.engine import Capabilities, ServedAdapter
from tunefork.serve.prompts import Prompts

_TOKENIZER_FILES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
_NOT_TOKENIZER = ("adapter_config.json", "tunefork.json", "config.json", "generation_config.json")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checked:
    """A version that may be served."""

    adapter: ServedAdapter
    prompts: Prompts
    needs_replica: bool
    """The engine of all adapters cannot apply it."""


class Checks:
    """What is checked of the adapters of one server; from any thread."""

    def __init__(
        self, base: ServedBase, capabilities: Capabilities, bytes_per_element: int
    ) -> None:
        self._base, self._capabilities = base, capabilities
        self._bytes_per_element = bytes_per_element
        self._renderings: dict[tuple[str, ...], tuple[str, str]] = {}
        """Hashes of tokenizer files -> fingerprints of what they make: most versions share them."""

    def check(self, details: Details, folder: Path, *, is_merged: bool = False) -> Checked:
        """Raises ApiError (400, `adapter_unusable`), which says what does not fit.

        One that `is_merged` into its own copy of the base may be of any kind and rank.
        """
        name = str(details.version)
        self._check_intact(name, details, folder)
        with _told(name, "is no adapter that can be read"):
            config = read_config(folder)
            provenance = read_provenance(folder)
            header = read_header(folder / WEIGHTS)
        kinds = {
            "dora": config.use_dora,
            "modules_to_save": bool(config.modules_to_save),
            "token_rows": bool(config.trainable_token_indices),
        }
        used = [kind for kind, is_used in kinds.items() if is_used]
        foreign = [kind for kind in used if kind not in self._capabilities.adapter_kinds]
        if foreign and not is_merged:
            raise _unusable(
                name,
                f"has {foreign[0]}, which the engine of this server cannot apply beside others; "
                "its operator can give it a replica (--merge)",
            )
        provenance = self._check_base(name, provenance)
        data = _data_of(name, provenance)
        with _told(name, "does not fit the layers of this server's base"):
            targets = check_fits(self._base.skeleton, folder)
        self._check_alive(name, folder, list(header), is_plain=not any(kinds.values()))
        self._check_rendering(name, details, folder)
        rank = max((delta.rank for delta in targets.deltas.values()), default=0)
        most = self._capabilities.max_rank
        is_large = most is not None and rank > most
        if is_large and not is_merged:
            raise _unusable(name, f"has rank {rank}; the engine of this server takes {most}")
        with _told(name, "was trained with a template that this server's base does not have"):
            prompts = self._base.prompts_of(data)
        self._check_asked(name, provenance, data)
        elements = sum(_size(entry.shape) for entry in header.values())
        served = ServedAdapter(name, folder, rank, elements * self._bytes_per_element)
        return Checked(served, prompts, bool(foreign) or is_large)

    def _check_intact(self, name: str, details: Details, folder: Path) -> None:
        """That its files are what was published: a disk or a hand may have changed them since."""
        with _told(name, "cannot be read"):
            changed = changed_files(folder, details.files)
        if changed:
            logger.warning("%s: %s in the store is not what was published", name, changed[0])
            raise _unusable(
                name,
                "is not what was published: a file in the server's store was damaged or altered "
                "since; its operator can publish it anew",
            )

    def _check_base(self, name: str, provenance: Provenance | None) -> Provenance:
        """That it says it belongs to the base."""
        if provenance is None:
            raise _unusable(
                name,
                "records no identity of its base, so that nothing shows whether it belongs to this "
                "one; its owner can check and record it: tunefork adapters adopt, then publish",
            )
        with _told(name, "was trained on another base, tokenizer or chat template than this one"):
            check_identity(
                provenance.identity, self._base.identity, what=name, base=self._base.name
            )
        return provenance

    def _check_asked(self, name: str, provenance: Provenance, data: DataSection) -> None:
        """That fixed texts become the very prompts that the trainer made of them."""
        if provenance.asked_sha256 is None:
            return  # trained on plain text, elsewhere, or before this was recorded
        with _told(name, "has a template that refuses what it was asked in training"):
            prompts = Prompts(Renderer(Undated(self._base.tokenizer), data), ())
            asked = [prompts.chat([Message("user", text)]) for text in TEXTS]
        if prompts_sha256(asked) != provenance.asked_sha256:
            raise _unusable(
                name,
                "was trained on prompts that this server would render otherwise (its template, "
                "system turn, instruction or labels); train it with this version of tunefork",
            )

    def _check_alive(self, name: str, folder: Path, keys: list[str], *, is_plain: bool) -> None:
        """One B that is not zero is enough, so that mostly one tensor is read."""
        if not is_plain:
            return  # a magnitude or a whole module may change the model with every B zero
        with _told(name, "cannot be read"), safe_open(folder / WEIGHTS, "pt") as tensors:
            for key in keys:
                if ".lora_B." in key and bool(tensors.get_tensor(key).any()):
                    return
        raise _unusable(name, "is dead: every lora_B is zero, so that it would change nothing")

    def _check_rendering(self, name: str, details: Details, folder: Path) -> None:
        hashes = tuple(
            file.sha256
            for file in details.files
            if file.path.endswith(_TOKENIZER_FILES) and file.path not in _NOT_TOKENIZER
        )
        if not any(file.path == "tokenizer_config.json" for file in details.files):
            return  # it was asked with the base's
        if hashes not in self._renderings:
            with _told(name, "has a tokenizer that cannot be read"):
                own = load_tokenizer(ModelSection(id=str(folder)), folder)
            self._renderings[hashes] = (tokenizer_sha256(own), rendering_sha256(own))
        tokenizer, rendering = self._renderings[hashes]
        if rendering != self._base.rendering:
            raise _unusable(
                name,
                "was trained with a tokenizer or chat template that renders conversations to other "
                "tokens than this server's base does",
            )
        if tokenizer != self._base.identity.tokenizer_sha256:
            raise _unusable(name, "was trained with another tokenizer than this server's base has")


def _data_of(name: str, provenance: Provenance) -> DataSection:
    """How it was trained to be asked."""
    data = (provenance.recipe or {}).get("data") or {"train": "-"}
    try:
        return DataSection.model_validate(data)
    except ValidationError as error:
        raise _unusable(name, "has a recipe that this version of tunefork cannot read") from error


@contextmanager
def _told(name: str, what: str) -> Iterator[None]:
    try:
        yield
    except (TuneforkError, OSError, ValueError, MemoryError) as error:
        logger.warning("%s: %s", name, str(error) or "out of memory while it was checked")
        if isinstance(error, AdapterError | DataError) and not is_of_now(error):
            raise _unusable(name, what) from error
        raise unavailable("adapter_unreadable", f"{name}: cannot be read now", 5.0) from error


def _unusable(name: str, why: str) -> ApiError:
    return ApiError(400, f"{name}: {why}", param="model", code="adapter_unusable")


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
