"""What answers look like, for the OpenAPI document; tests hold real answers against it."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Answered(BaseModel):
    """Closed: what is sent is what is documented."""

    model_config = ConfigDict(extra="forbid")


class TokenUsage(Answered):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(Answered):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatToken(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answered):
    content: list[ChatToken]
    refusal: None


class AnswerMessage(Answered):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Answered):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(Answered):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: TokenUsage
    system_fingerprint: str
    service_tier: Literal["default"]


class CompletionLogprobs(Answered):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(Answered):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(Answered):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: TokenUsage
    system_fingerprint: str


class ModelInfo(Answered):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None
    root: str


class ModelList(Answered):
    object: Literal["list"]
    data: list[ModelInfo]


class Health(Answered):
    status: Literal["ok", "failed"]
    state: Literal["starting", "ready", "failed", "draining"]
    engine: dict[str, str] | None
