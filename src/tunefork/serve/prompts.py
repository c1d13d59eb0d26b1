"""Turns of a request become token ids, exactly as the trainer rendered them.

The recipe of a model says more than its chat template: a system turn for conversations that bring
none, and, where texts were classified, the instruction that stood before each. A client sends what
a row of the training data held, and the server adds what the trainer added.

The recipe of an adapter is foreign text: what it says is rendered, but no file that it names is
read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tunefork.data.chat import Renderer
from tunefork.data.convert import default_instruction
from tunefork.data.example import Message
from tunefork.data.template import LABEL_CUE
from tunefork.recipe import DataSection


@dataclass(frozen=True)
class Prompts:
    """How one model is asked."""

    renderer: Renderer
    stop_ids: tuple[int, ...]
    """Tokens that end a turn of it."""

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the prompt for the next turn. Raises DataError where the template refuses."""
        section = self.renderer.section
        turns = list(messages)
        instruction = instruction_of(section)
        if instruction is not None and turns[-1].role == "user":
            turns[-1] = self._instructed(turns[-1], instruction)
        if section.system and turns[0].role != "system":
            turns.insert(0, Message("system", section.system))
        return self.renderer.prompt_ids(turns)

    @property
    def added_characters(self) -> int:
        """About how much a conversation grows by what its model's recipe adds."""
        section = self.renderer.section
        return len(section.system or "") + len(instruction_of(section) or "")

    def text(self, text: str) -> list[int]:
        """Ids of a text to be written on."""
        return self.renderer.text_ids(text)

    def _instructed(self, turn: Message, instruction: str) -> Message:
        """As `add_instruction` does, unless the client has sent the instruction itself."""
        if turn.content.startswith(f"{instruction}\n\n"):
            return turn
        cue = LABEL_CUE if self.renderer.template_in_use == "plain" else ""
        return replace(turn, content=f"{instruction}\n\n{turn.content}{cue}")


def instruction_of(data: DataSection) -> str | None:
    """What stood before each training text, as far as the recipe itself says."""
    if data.format not in ("classification", "auto"):
        return None
    if data.instruction or data.labels:
        return data.instruction or default_instruction(data.labels or ())
    return None
