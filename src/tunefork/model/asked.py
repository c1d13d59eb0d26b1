"""What a model is asked for fixed texts: as rows of its training, and by a server.

Between a text and its prompt stand the template, a system turn, and a classifier's instruction with
its labels. The trainer records the hash of what all that made of the texts here
(`Provenance.asked_sha256`), and a server that makes other prompts of them refuses the adapter: it
would answer, and worse than it was measured.
"""

import hashlib
from collections.abc import Iterable, Sequence

from tunefork.data.chat import Renderer
from tunefork.data.convert import convert
from tunefork.data.example import Encoded, Example, Row
from tunefork.data.loader import Data, instructed
from tunefork.model.golden import Undated

TEXTS = (
    "What is the capital of France?",
    "Größe: 10 µm\u00a0± 5\u202f%\n\t— 東京, नमस्ते, e\u0301 = é, 👩\u200d🚀?",
    "  leading, trailing and\r\n\n\nblank lines  \n",
)
"""Changing them makes every adapter that was trained before unusable."""


def asked_sha256(data: Data) -> str | None:
    """Hash of the prompts that training on `data` made of `TEXTS`; None where it had no prompts."""
    if data.format == "text":
        return None
    labels, system = data.labels, data.section.system
    renderer = Renderer(Undated(data.renderer.tokenizer), data.section)
    prompts: list[list[int]] = []
    for text in TEXTS:
        if labels is None:
            row, format = Row("asked", {"prompt": text, "completion": "a"}), "prompt_completion"
        else:
            row, format = Row("asked", {"text": text, "label": labels[0]}), "classification"
        example = convert(row, format, system)
        assert isinstance(example, Example)
        encoded = renderer.attempt(instructed(example, renderer, labels))
        if not isinstance(encoded, Encoded):  # a template that refuses such turns
            return None
        prompts.append(encoded.input_ids[: encoded.prompt_length].tolist())
    return prompts_sha256(prompts)


def prompts_sha256(prompts: Iterable[Sequence[int]]) -> str:
    """Equal only for the same ids."""
    return hashlib.sha256(repr([list(ids) for ids in prompts]).encode()).hexdigest()
