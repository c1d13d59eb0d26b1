"""A conversation with one model, rendered as it was rendered in training, streamed."""

from collections.abc import Iterator
from threading import Thread
from typing import Any

import torch
from transformers import TextIteratorStreamer

from tunefork.data.chat import Renderer
from tunefork.data.example import Message
from tunefork.recipe import DataSection


class Conversation:
    """Turns so far, and the model that answers them.

    `data` is the section of the recipe that the model was trained with: its template is used, and
    its system turn where `system` gives none.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        data: DataSection | None = None,
        *,
        system: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        data = data or DataSection(train="-")  # of a model as it is: the defaults, and no data
        system = data.system if system is None else system
        self.renderer = Renderer(tokenizer, data)
        self.messages = [Message("system", system)] if system else []

    def ask(self, text: str) -> Iterator[str]:
        """Add a user turn; yields the answer in pieces and adds it once it is complete."""
        self.messages.append(Message("user", text))
        ids = torch.tensor([self.renderer.prompt_ids(self.messages)], device=self.model.device)
        streamer = TextIteratorStreamer(
            self.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=600.0
        )
        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            sampling = {"do_sample": True, "temperature": self.temperature}
        failure: list[BaseException] = []

        def generate() -> None:
            try:
                self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    streamer=streamer,
                    max_new_tokens=self.max_new_tokens,
                    eos_token_id=self._stop_ids(),
                    pad_token_id=self._stop_ids()[0],
                    **sampling,
                )
            except BaseException as error:
                failure.append(error)
                streamer.end()

        thread = Thread(target=generate, daemon=True)
        thread.start()
        answer = ""
        for piece in streamer:
            answer += piece
            yield piece
        thread.join()
        if failure:
            raise failure[0]
        self.messages.append(Message("assistant", answer))

    def _stop_ids(self) -> list[int]:
        """Ids that end an answer: the model's, the tokenizer's, and the template's end of turn."""
        configured = self.model.generation_config.eos_token_id
        ids = list(configured) if isinstance(configured, list | tuple) else [configured]
        ids.append(self.tokenizer.eos_token_id)
        return [i for i in dict.fromkeys(ids) if i is not None]
