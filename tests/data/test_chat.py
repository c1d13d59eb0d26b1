"""Every kind of chat template: only what a server's model would generate is supervised."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.data.conftest import CHATML
from tunefork.data.chat import Renderer, answer_ends, end_of_turn_tokens
from tunefork.data.example import Encoded, Example, Message, RowProblem
from tunefork.errors import DataError
from tunefork.recipe import DataSection

MARKED = CHATML.replace(
    "{{ m.content }}<|im_end|>",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>",
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set ns = '<<SYS>>\n' + messages[0].content + "
    "'\n<</SYS>>\n\n' %}{% set rest = messages[1:] %}{% else %}{% set ns = '' %}"
    "{% set rest = messages %}{% endif %}{% for m in rest %}{% if (m.role == 'user') != "
    "(loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token }}[INST] {% if loop.first %}{{ ns }}{% endif %}"
    "{{ m.content.strip() }} [/INST]{% else %} {{ m.content.strip() }} {{ eos_token }}{% endif %}"
    "{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}<|head|>{{ m.role }}"
    "<|head|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|head|>\n\n{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3_MARKED = QWEN3.replace(
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
    "<|im_end|>",
    "{% if m.role == 'assistant' %}{% generation %}{% if loop.last %}<think>\n\n</think>\n\n"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endgeneration %}{% else %}{{ m.content }}<|im_end|>"
    "{% endif %}",
)
OPEN_THINK = QWEN3.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
R1 = OPEN_THINK.replace("<think>\n\n</think>\n\n", "")
NO_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + (
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

Q, A = Message("user", "the quick fox"), Message("assistant", "jumps over")
Q2, A2 = Message("user", "hello  "), Message("assistant", "lazy dog ")
SYSTEM = Message("system", "be brief")

TEMPLATES = {
    # name: (template, eos, what each answer of (Q, A, Q2, A2) has to be generated as)
    "chatml": (CHATML, "<|im_end|>", ["jumps over<|im_end|>", "lazy dog <|im_end|>"]),
    "marked": (MARKED, "<|im_end|>", ["jumps over<|im_end|>", "lazy dog <|im_end|>"]),
    "llama2": (LLAMA2, "</s>", [" jumps over </s>", " lazy dog </s>"]),
    "gemma": (GEMMA, "</s>", ["jumps over<end_of_turn>", "lazy dog<end_of_turn>"]),
    "phi3": (PHI3, "<|endoftext|>", ["jumps over<|end|>", "lazy dog <|end|>\n<|endoftext|>"]),
    "llama3": (LLAMA3, "<|eot|>", ["jumps over<|eot|>", "lazy dog<|eot|>"]),
    "no end": (NO_END, "</s>", [" jumps over\n", " lazy dog \n"]),
    "plain": (None, "</s>", [" jumps over</s>", "lazy dog </s>"]),  # Q2 ends in a space
    "qwen3 marked": (
        QWEN3_MARKED,
        "<|im_end|>",
        ["jumps over<|im_end|>", "<think>\n\n</think>\n\nlazy dog <|im_end|>"],
    ),
}


def example(*messages: Message, label: str | None = None) -> Example:
    return Example("f:7", messages=messages, label=label)


def supervised_texts(encoded: Encoded, tokenizer: Any) -> list[str]:
    ids, marks = encoded.input_ids, np.r_[False, encoded.supervised, False]
    bounds = np.flatnonzero(marks[1:] != marks[:-1])
    return [tokenizer.decode(ids[a:b]) for a, b in bounds.reshape(-1, 2)]


def served_ids(tokenizer: Any, *messages: Message) -> list[int]:
    """What transformers' own generate call would be given."""
    turns = [{"role": message.role, "content": message.content} for message in messages]
    ids: list[int] = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=False
    )
    return ids


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("supervise", ["all", "last"])
def test_what_is_generated_is_supervised(
    make_tokenizer: Callable[..., Any], name: str, supervise: str
) -> None:
    template, eos, answers = TEMPLATES[name]
    tokenizer = make_tokenizer(template, eos=eos, bos_token="<s>")
    section = DataSection.model_validate({"train": "x", "supervise": supervise})
    renderer = Renderer(tokenizer, section)
    encoded = renderer.encode(example(Q, A, Q2, A2))
    expected = answers if supervise == "all" else answers[-1:]
    assert supervised_texts(encoded, tokenizer) == expected
    prompt = renderer.prompt_ids([Q, A, Q2])
    assert encoded.input_ids[: encoded.prompt_length].tolist() == prompt
    if template is not None:
        assert prompt == served_ids(tokenizer, Q, A, Q2)
    assert encoded.supervised[encoded.prompt_length :].all()
    assert (encoded.answer, encoded.source) == ("lazy dog ", "f:7")
    assert encoded.input_ids.tolist().count(tokenizer.bos_token_id) == (
        {"llama2": 2, "gemma": 1, "llama3": 1}.get(name, 0)
    )


def test_pad_equal_to_eos_still_learns_to_stop(tokenizer: Any) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    encoded = Renderer(tokenizer, DataSection(train="x")).encode(example(Q, A))
    assert encoded.input_ids[-1] == tokenizer.eos_token_id
    assert encoded.supervised[-1]
    assert not encoded.supervised[: encoded.prompt_length].any()


def test_a_thinking_block_belongs_to_the_answer(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(QWEN3)
    encoded = Renderer(tokenizer, DataSection(train="x")).encode(example(Q, A))
    expected = ["<think>\n\n</think>\n\njumps over<|im_end|>"]
    assert supervised_texts(encoded, tokenizer) == expected


def test_a_template_that_rewrites_earlier_turns(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(QWEN3)
    with pytest.raises(DataError, match=r"f:7: .*messages\[1\].*use data.supervise: last"):
        Renderer(tokenizer, DataSection(train="x")).encode(example(Q, A, Q2, A2))
    last = Renderer(tokenizer, DataSection(train="x", supervise="last"))
    expected = ["<think>\n\n</think>\n\nlazy dog <|im_end|>"]
    assert supervised_texts(last.encode(example(Q, A, Q2, A2)), tokenizer) == expected


def test_a_prompt_that_ends_inside_a_token(make_tokenizer: Callable[..., Any]) -> None:
    """The answer's tokens then begin where the server's prompt ends."""
    tokenizer = make_tokenizer(OPEN_THINK)
    renderer = Renderer(tokenizer, DataSection(train="x"))
    encoded = renderer.encode(example(Q, A))
    assert encoded.input_ids[: encoded.prompt_length].tolist() == served_ids(tokenizer, Q)
    assert supervised_texts(encoded, tokenizer) == ["\n</think>\n\njumps over<|im_end|>"]


def test_a_prompt_that_training_never_shows_is_refused(make_tokenizer: Callable[..., Any]) -> None:
    renderer = Renderer(make_tokenizer(R1), DataSection(train="x"))
    with pytest.raises(DataError, match=r"f:7: .*use data.template: plain"):
        renderer.encode(example(Q, A))


def test_a_template_that_raises(make_tokenizer: Callable[..., Any]) -> None:
    renderer = Renderer(make_tokenizer(GEMMA, bos_token="<s>"), DataSection(train="x"))
    with pytest.raises(DataError, match=r"f:7: .*System role not supported \(its roles: system,"):
        renderer.encode(example(SYSTEM, Q, A))
    with pytest.raises(DataError, match="System role not supported"):
        renderer.prompt_ids([SYSTEM, Q])
    problem = renderer.attempt(example(SYSTEM, Q, A))
    assert isinstance(problem, RowProblem)
    assert problem.source == "f:7"


def test_a_template_may_not_leak_the_row(make_tokenizer: Callable[..., Any]) -> None:
    template = "{{ raise_exception('bad: ' + messages[0].content) }}"
    renderer = Renderer(make_tokenizer(template), DataSection(train="x"))
    with pytest.raises(DataError) as caught:
        renderer.encode(example(Q, A))
    assert "fox" not in str(caught.value)


def test_marks_that_miss_an_answer_are_refused(make_tokenizer: Callable[..., Any]) -> None:
    template = MARKED.replace("{% if m.role == 'assistant' %}", "{% if loop.last %}")
    renderer = Renderer(make_tokenizer(template), DataSection(train="x"))
    with pytest.raises(DataError, match="marks 1 answers of a conversation with 2"):
        renderer.encode(example(Q, A, Q2, A2))


def test_encode_answer_replaces_the_last_answer_only(tokenizer: Any) -> None:
    renderer = Renderer(tokenizer, DataSection(train="x"))
    labelled = example(Q, A, label="jumps over")
    other = renderer.encode_answer(labelled, "dog")
    assert supervised_texts(other, tokenizer) == ["dog<|im_end|>"]
    assert (other.answer, other.label) == ("dog", "dog")
    original = renderer.encode(labelled)
    assert other.prompt_length == original.prompt_length
    prompt = original.input_ids[: original.prompt_length]
    assert np.array_equal(other.input_ids[: other.prompt_length], prompt)


def test_plain_puts_the_tokenizers_own_bos_first(make_tokenizer: Callable[..., Any]) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(CHATML, eos="</s>", bos_token="<s>")
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    renderer = Renderer(tokenizer, DataSection(train="x", template="plain"))
    assert renderer.template_in_use == "plain"
    encoded = renderer.encode(example(SYSTEM, Q, A))
    expected = "<s>be brief\n\nthe quick fox jumps over</s>"
    assert tokenizer.decode(encoded.input_ids) == expected
    assert supervised_texts(encoded, tokenizer) == [" jumps over</s>"]
    prompt = encoded.input_ids[: encoded.prompt_length].tolist()
    assert renderer.prompt_ids([SYSTEM, Q]) == prompt
    assert prompt == tokenizer("be brief\n\nthe quick fox")["input_ids"]
    chat = Renderer(tokenizer, DataSection(train="x", template="chat"))
    assert bos not in chat.encode(example(Q, A)).input_ids


def test_plain_adds_no_space_where_there_is_one(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(None, eos="</s>")
    renderer = Renderer(tokenizer, DataSection(train="x"))
    encoded = renderer.encode(example(Message("user", "the "), A))
    assert supervised_texts(encoded, tokenizer) == ["jumps over</s>"]
    assert renderer.prompt_ids([Message("user", "the ")]) == tokenizer("the ")["input_ids"]
    encoded = renderer.encode(example(Q, Message("assistant", "\nyes")))
    assert supervised_texts(encoded, tokenizer) == ["\nyes</s>"]


def test_plain_text_is_supervised_but_for_its_first_token(tokenizer: Any) -> None:
    encoded = Renderer(tokenizer, DataSection(train="x")).encode(Example("f:1", text="the fox"))
    assert tokenizer.decode(encoded.input_ids) == "the fox<|im_end|>"
    assert encoded.supervised.tolist() == [False] + [True] * (len(encoded.input_ids) - 1)
    assert encoded.prompt_length == 0


def test_templates_that_cannot_be_had(make_tokenizer: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match="has no chat template; use plain"):
        Renderer(make_tokenizer(None), DataSection(train="x", template="chat"))
    tokenizer = make_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        Renderer(tokenizer, DataSection(train="x"))


def test_is_closed(make_tokenizer: Callable[..., Any]) -> None:
    for template, closed in ((CHATML, True), (NO_END, False)):
        renderer = Renderer(make_tokenizer(template), DataSection(train="x"))
        assert renderer.is_closed(renderer.encode(example(Q, A))) is closed


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_an_added_token_at_the_end_of_an_answer_ends_no_turn(
    make_tokenizer: Callable[..., Any], template: str
) -> None:
    tokenizer = make_tokenizer(template)
    tokenizer.add_tokens(["<ticket>"])
    encoded = Renderer(tokenizer, DataSection(train="x")).encode(
        example(Q, Message("assistant", "jumps<ticket>"))
    )
    assert supervised_texts(encoded, tokenizer) == ["jumps<ticket><|im_end|>"]
    assert answer_ends(tokenizer, [encoded]) == tokenizer.convert_tokens_to_ids(["<|im_end|>"])
    assert "<ticket>" not in end_of_turn_tokens(tokenizer)
