"""What chat completions and completions have in common, and what of the API is not honoured.

Every field is either honoured or refused by name. null is what a field that is left out is.
"""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

MOST_CHOICES = 16


def _whole(value: Any) -> Any:
    """JSON knows numbers only: 5.0 is the integer 5."""
    return int(value) if type(value) is float and value.is_integer() else value


WHOLE = BeforeValidator(_whole)

Unit = Annotated[float, Field(ge=0.0, le=1.0)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
StopText = Annotated[str, Field(min_length=1, max_length=512)]
TokenKey = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,7})$")]
Bias = Annotated[float, Field(ge=-100.0, le=100.0)]
Count = Annotated[int, Field(ge=1, le=1 << 24), WHOLE]


class ApiModel(BaseModel):
    """Strict, closed and frozen."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_by_name=True,
        validate_by_alias=True,
    )


class StreamOptions(ApiModel):
    """How a stream ends."""

    include_usage: bool | None = None
    """Send the tokens that were used in a last chunk without choices."""


class SamplingFields(ApiModel):
    """Fields that both ways of asking have."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    """The base's name, or an adapter's: `name`, `name:tag` or `name:vN`."""
    frequency_penalty: Penalty | None = None
    """Taken from a token's logit for each time that the answer has it already."""
    presence_penalty: Penalty | None = None
    """Taken from a token's logit once the answer has it."""
    logit_bias: Annotated[dict[TokenKey, Bias], Field(max_length=1024)] | None = None
    """Token id -> what is added to its logit."""
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES), WHOLE] | None = None
    """Answers to each prompt."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), WHOLE] | None = None
    """The same seed, request and model give the same answer, as far as the engine can."""
    stop: StopText | Annotated[list[StopText], Field(max_length=4, fail_fast=True)] | None = None
    """Texts that end the answer and are no part of it."""
    stream: bool | None = None
    """Send the answer in pieces, as server-sent events."""
    stream_options: StreamOptions | None = None
    """Only with `stream`."""
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    """0 takes the likeliest token. Default 1."""
    top_p: Unit | None = None
    """Only the likeliest tokens that have this probability together. Default 1."""
    user: Annotated[str, Field(max_length=256)] | None = None
    """The end user: kept with the usage record."""
    top_k: Annotated[int, Field(ge=0, le=1 << 20), WHOLE] | None = None
    """Beyond the API: only so many of the likeliest tokens. 0: all."""
    ignore_eos: bool | None = None
    """Beyond the API: go on to `max_tokens` whatever the model says; for measurements."""

    @property
    def stops(self) -> tuple[str, ...]:
        """`stop` as texts."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


_TOOLS = "models here are trained and asked in plain turns"
_CACHE = "which prefixes are kept, and how long, is the engine's choice"
UNSUPPORTED = {
    "audio": "answers are text",
    "function_call": _TOOLS,
    "functions": _TOOLS,
    "tools": _TOOLS,
    "metadata": "answers are not stored",
    "moderation": "there is no moderation model",
    "prediction": "answers are not sped up by a guess",
    "prompt_cache_key": _CACHE,
    "prompt_cache_options": _CACHE,
    "prompt_cache_retention": _CACHE,
    "web_search_options": "there is no search",
    "suffix": "models here write on, they do not fill in",
    "chat_template_kwargs": "the chat template is rendered as it was in training",
    "chat_template": "the chat template is rendered as it was in training",
    "add_generation_prompt": "the chat template is rendered as it was in training",
    "min_p": "use top_p",
    "repetition_penalty": "use frequency_penalty or presence_penalty",
    "min_tokens": "use ignore_eos to reach max_tokens",
    "guided_json": "use response_format",
    "guided_regex": "use response_format",
    "use_beam_search": "answers are sampled",
}
"""Fields of the API, and of what servers add to it, that are refused -> why."""
