"""An Ollama Modelfile: the GGUF, and a template that renders as the model's own does.

Ollama's templates are Go's, not Jinja. Which family a Jinja template belongs to is not guessed from
its text: it renders golden conversations, and a family is only taken if its own rendering, written
here in Python beside the Go text, is equal to the character for all of them. A template of no
family is refused: another one would give the model prompts that it was not trained on.
"""

import json
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from tunefork.errors import ModelError

Messages = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class _Family:
    name: str
    begin: str
    """Before a turn; {role} is filled in."""
    end: str
    """After a turn."""
    stop: str
    begins_text: str = ""
    """At the very start, where the tokenizer does not add it by itself."""

    def render(self, messages: Messages, default_system: str | None) -> str:
        turns = list(messages)
        if default_system is not None and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": default_system}, *turns]
        text = "".join(
            self.begin.format(role=turn["role"]) + turn["content"] + self.end for turn in turns
        )
        return self.begins_text + text + self.begin.format(role="assistant")

    def go(self) -> str:
        """The same as Ollama's TEMPLATE."""

        def turn(role: str, content: str) -> str:
            return self.begin.format(role=role) + content + self.end

        return (
            "{{- if .System }}"
            + turn("system", "{{ .System }}")
            + "{{ end }}{{- range .Messages }}"
            + '{{- if ne .Role "system" }}'
            + turn("{{ .Role }}", "{{ .Content }}")
            + "{{ end }}{{- end }}"
            + self.begin.format(role="assistant")
        )


_FAMILIES = (
    _Family("chatml", "<|im_start|>{role}\n", "<|im_end|>\n", "<|im_end|>"),
    _Family(
        "llama3",
        "<|start_header_id|>{role}<|end_header_id|>\n\n",
        "<|eot_id|>",
        "<|eot_id|>",
        begins_text="<|begin_of_text|>",
    ),
)
_GOLDEN: tuple[Messages, ...] = (
    [{"role": "user", "content": "one"}],
    [{"role": "system", "content": "rule"}, {"role": "user", "content": "one"}],
    [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ],
)


def modelfile(tokenizer: Any, *, gguf: str, adapter: str | None = None) -> str:
    """The Modelfile's text for the files named; raises ModelError for a template of no family."""
    family, system = recognise(tokenizer)
    lines = [f"FROM ./{gguf}"]
    if adapter is not None:
        lines.append(f"ADAPTER ./{adapter}")
    lines.append(f'TEMPLATE """{family.go()}"""')
    if system is not None:
        lines.append(f'SYSTEM """{system}"""')
    lines.append(f"PARAMETER stop {json.dumps(family.stop)}")
    lines.append("PARAMETER temperature 0")
    return "\n".join(lines) + "\n"


def recognise(tokenizer: Any) -> tuple[_Family, str | None]:
    """The family whose rendering is that of `tokenizer`'s template, and its default system turn."""

    def apply(messages: Messages) -> str:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )

    if not isinstance(tokenizer.chat_template, str):
        raise ModelError("ollama: the tokenizer has no chat template; export --to gguf instead")
    try:
        golden = [apply(messages) for messages in _GOLDEN]
    except TemplateError as error:
        raise ModelError(f"ollama: the chat template cannot be rendered: {error}") from error
    for family in _FAMILIES:
        for system in (None, _default_system(golden[0], family)):
            rendered = [family.render(messages, system) for messages in _GOLDEN]
            if rendered == golden:
                return family, system
    raise ModelError(
        "ollama: the chat template renders golden conversations as none of "
        f"{', '.join(family.name for family in _FAMILIES)} does, and Ollama cannot run Jinja; "
        "export --to gguf, and run that with llama-server --jinja"
    )


def _default_system(rendered: str, family: _Family) -> str | None:
    """The text of a system turn that the template puts first by itself."""
    begin = family.begins_text + family.begin.format(role="system")
    if not rendered.startswith(begin):
        return None
    return rendered[len(begin) :].partition(family.end)[0]
