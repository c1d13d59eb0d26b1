"""POST /v1/completions: what may be asked."""

from typing import Annotated

from pydantic import Field

from tunefork.serve.api.sampling_fields import MOST_CHOICES, WHOLE, Count, SamplingFields

MOST_PROMPTS = 64

TokenId = Annotated[int, Field(ge=0, lt=1 << 24), WHOLE]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=1 << 20, fail_fast=True)]
Texts = Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
ManyTokenIds = Annotated[
    list[TokenIds], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)
]


class CompletionRequest(SamplingFields):
    """A text to be written on; the prompt is sent to the model as it is."""

    prompt: str | Texts | TokenIds | ManyTokenIds
    """A text, texts, token ids, or lists of them."""
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES), WHOLE] | None = None
    """Write so many answers to each prompt, and give the `n` likeliest by token; not streamed."""
    echo: bool | None = None
    """Begin the answer with the prompt; not with `logprobs`."""
    logprobs: Annotated[int, Field(ge=0, le=5), WHOLE] | None = None
    """Tell the log probability of each token of the answer, and of so many likeliest ones; never of
    the prompt's."""
    max_tokens: Count | None = None
    """Most tokens of an answer. Default 16."""

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or several, as texts or as token ids."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if isinstance(prompt[0], int):
            return [prompt]
        return prompt
