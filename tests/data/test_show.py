from typing import Any

from tunefork.data.chat import Renderer
from tunefork.data.example import Example, Message
from tunefork.data.show import show
from tunefork.recipe import DataSection


def test_supervised_runs_stand_out_in_colour_and_without(tokenizer: Any) -> None:
    turns = [("user", "hi"), ("assistant", "yo"), ("user", "so"), ("assistant", "ok")]
    messages = tuple(Message(role, content) for role, content in turns)
    encoded = Renderer(tokenizer, DataSection(train="x")).encode(Example("f:1", messages))
    text = show(encoded, tokenizer)
    assert text.plain.endswith(
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦yo<|im_end|>⟧\n"
        "<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\n⟦ok<|im_end|>⟧"
    )
    marked = [text.plain[span.start : span.end] for span in text.spans if span.style != "dim"]
    assert marked == ["⟦yo<|im_end|>⟧", "⟦ok<|im_end|>⟧"]
