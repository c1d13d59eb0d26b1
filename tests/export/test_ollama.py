"""The Modelfile: a family is taken only if it renders the golden conversations alike."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.data.conftest import CHATML, train_tokenizer
from tunefork.errors import ModelError
from tunefork.export.ollama import modelfile, recognise

LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content']"
    " + '<|eot_id|>' }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
BARE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{{ '<|im_start|>assistant\n' }}"
)
SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _tokenizer(template: str | None) -> Any:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(), eos_token="<|im_end|>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "family", "system"),
    [
        (BARE, "chatml", None),
        (CHATML, "chatml", "Be helpful"),
        (SMOLLM, "chatml", "Be kind"),
        (LLAMA3, "llama3", None),
    ],
)
def test_a_family_is_recognised_by_what_it_renders(
    template: str, family: str, system: str | None
) -> None:
    found, default = recognise(_tokenizer(template))
    assert (found.name, default) == (family, system)


def test_the_modelfile_names_its_files_template_and_stop() -> None:
    text = modelfile(_tokenizer(SMOLLM), gguf="base.gguf", adapter="lora.gguf")
    assert text.startswith("FROM ./base.gguf\nADAPTER ./lora.gguf\nTEMPLATE ")
    assert "{{- if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}" in text
    assert 'SYSTEM """Be kind"""\nPARAMETER stop "<|im_end|>"\n' in text
    assert "ADAPTER" not in modelfile(_tokenizer(CHATML), gguf="m.gguf")


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("<|im_start|>", "<|im_start|> "),
        LLAMA3.replace("\n\n", "\n"),
        "{% for message in messages %}[INST] {{ message['content'] }} [/INST]{% endfor %}",
        "{{ raise_exception('no') }}",
        None,
    ],
)
def test_another_template_is_refused(template: str | None) -> None:
    with pytest.raises(ModelError, match="ollama: "):
        recognise(_tokenizer(template))
