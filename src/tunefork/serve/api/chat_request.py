"""POST /v1/chat/completions: what may be asked."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from tunefork.serve.api.sampling_fields import WHOLE, ApiModel, Count, SamplingFields

MOST_SCHEMA_DEPTH = 32
MOST_SCHEMA_NODES = 4096


class TextPart(ApiModel):
    """A part of a turn; only text is understood."""

    type: Literal["text"]
    text: str


class ChatMessage(ApiModel):
    """One turn. `developer` is another word for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=1024, fail_fast=True)]
    refusal: None = None
    """As an earlier answer has it: null."""
    tool_calls: None = None
    function_call: None = None
    audio: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    @property
    def text(self) -> str:
        """The parts put together."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class PlainFormat(ApiModel):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(ApiModel):
    """Some JSON object."""

    type: Literal["json_object"]


class NamedSchema(ApiModel):
    """A JSON schema, which every answer then matches."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Annotated[str, Field(max_length=4096)] | None = None
    """For the reader; the model is not shown it."""
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None
    """Answers match in any case."""

    @model_validator(mode="after")
    def _is_bounded(self) -> Self:
        level: list[Any] = [self.schema_]
        depth = nodes = 0
        while level:
            depth, nodes = depth + 1, nodes + len(level)
            if depth > MOST_SCHEMA_DEPTH or nodes > MOST_SCHEMA_NODES:
                raise ValueError(
                    f"must be nested at most {MOST_SCHEMA_DEPTH} deep and have at most "
                    f"{MOST_SCHEMA_NODES} values"
                )
            inner = [v.values() if isinstance(v, dict) else v for v in level]
            level = [v for values in inner if not isinstance(values, _SCALARS) for v in values]
        return self


_SCALARS = (str, int, float, bool, type(None))


class JsonSchemaFormat(ApiModel):
    """JSON that matches a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


def _is_false(value: Any) -> Any:
    """To Python, 0 is False."""
    if value is not False:
        raise ValueError("should be false")
    return value


TextOnly = Annotated[list[Literal["text"]], Field(min_length=1, max_length=1, fail_fast=True)]
ResponseFormat = Annotated[
    PlainFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]


class ChatRequest(SamplingFields):
    """A conversation whose next turn is wanted."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=2048, fail_fast=True)]
    logprobs: bool | None = None
    """Tell the log probability of each token of the answer."""
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    """And of so many likeliest ones in its place; only with `logprobs`."""
    max_tokens: Count | None = None
    """Most tokens of an answer. Default: what the context has left."""
    max_completion_tokens: Count | None = None
    """The newer name of `max_tokens`."""
    response_format: ResponseFormat | None = None
    """What the answer must match."""
    modalities: TextOnly | None = None
    parallel_tool_calls: None = None
    tool_choice: Literal["none"] | None = None
    store: Annotated[Literal[False], BeforeValidator(_is_false)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    safety_identifier: Annotated[str, Field(max_length=256)] | None = None
    """The newer name of `user`."""
