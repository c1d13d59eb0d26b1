"""What can be set of the vllm engine: how a vLLM server is started, or where one runs.

Read from `vllm serve --help=all` of vLLM 0.32; what is set here is in 0.25 as well.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from tunefork.export.servers import TABLE, step_above
from tunefork.recipe import PositiveFloat, PositiveInt, Section

_HIGHEST_RANK = (TABLE["vllm"].ranks or (512,))[-1]
_OURS = {
    "--model": "give --base",
    "--tokenizer": "it is the base's",
    "--revision": "give base.revision",
    "--host": "the server listens on loopback only",
    "--port": "a free one is taken",
    "--uds": "the server listens on loopback only",
    "--api-key": "one is drawn at each start",
    "--served-model-name": "the gateway names models",
    "--enable-lora": "it always is",
    "--no-enable-lora": "it always is",
    "--lora-modules": "adapters come from the store",
    "--max-loras": "set vllm.slots",
    "--max-cpu-loras": "set vllm.host_adapters",
    "--max-lora-rank": "set vllm.max_rank",
    "--max-model-len": "set vllm.max_model_len",
    "--max-num-seqs": "set vllm.max_requests",
    "--max-logprobs": "the gateway offers 20, as vLLM does",
    "--api-server-count": "names of adapters are known to one API server only",
    "--generation-config": "sampling is the gateway's",
    "--root-path": "only the gateway is asked",
    "--ssl-keyfile": "the server listens on loopback only",
    "--ssl-certfile": "the server listens on loopback only",
    "--config": "a file could set any of these; give its arguments",
}
"""Arguments that `vllm.args` may not change, and why."""


class VllmSettings(Section):
    """A vLLM server: one that is started as a child (`python`), or one that runs (`url`)."""

    python: Path | None = None
    """The interpreter that has vLLM (`/opt/vllm/bin/python`), from an environment of its own: vLLM
    pins versions of PyTorch and transformers. Its server is started and ends with this process."""

    url: str | None = None
    """Where a vLLM server runs already (`http://127.0.0.1:8001`), started with `--enable-lora` and
    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, over the same base, and on a machine that sees the store's
    folder under the same path. No other client may load adapters into it."""

    key_env: str | None = None
    """Environment variable with the key that the server at `url` asks for."""

    args: tuple[str, ...] = ()
    """More arguments of `vllm serve`, one word each: `--tensor-parallel-size=2`. Those that decide
    about adapters, names and addresses are refused."""

    slots: PositiveInt = 8
    """Adapters in one batch (--max-loras): requests of more wait."""

    host_adapters: PositiveInt = 64
    """Adapters that the server knows at one time (--max-cpu-loras), in its memory; at least
    `slots`. The least recently used makes room."""

    max_rank: Annotated[int, Field(ge=1, le=_HIGHEST_RANK)] = 64
    """Largest rank of an adapter. vLLM knows steps (8, 16, 32, 64, ...): the next is taken. All
    adapters take the room of that step."""

    max_model_len: PositiveInt | None = None
    """Most tokens of prompt and answer. None: the model's own."""

    device: Literal["auto", "cpu", "gpu"] = "auto"
    """What the server computes on. auto: of a child, what its PyTorch is built for; of a server at
    `url`, a GPU. vLLM for CPUs has two faults that are lived with. The adapter of the last slot is
    mixed into answers of the base, which is therefore asked for as an adapter of zeros, with a slot
    of its own. And a request with a seed can end the server, so that `seed` is refused."""

    max_requests: PositiveInt = 256
    """Answers computed at the same time (--max-num-seqs)."""

    start_timeout_s: PositiveFloat = 900.0
    """Seconds from the start of the server until it answers; of large models mostly loading."""

    spool: Path | None = None
    """Where the child's view of the adapters lies while it runs. None: TUNEFORK_HOME/vllm. Files
    are linked where that is the store's file system, and copied elsewhere."""

    log: Path | None = None
    """File that the child's output is appended to. None: it is kept while it runs, and its end
    is shown if it dies."""

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("must begin with http:// or https://")
        return value

    @field_validator("args")
    @classmethod
    def _none_of_ours(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for argument in value:
            name = argument.split("=")[0].replace("_", "-")
            # argparse takes the beginning of a name for the name
            for ours, why in _OURS.items():
                if name.startswith("--") and ours.startswith(name):
                    raise ValueError(f"{name} cannot be given ({ours}): {why}")
        return value

    @model_validator(mode="after")
    def _is_whole(self) -> "VllmSettings":
        if self.slots > self.host_adapters:
            raise ValueError(
                f"slots: {self.slots} must be at most host_adapters, {self.host_adapters}"
            )
        if self.url is not None and (self.python is not None or self.args):
            raise ValueError("url: a server that runs already takes no python and no args")
        if self.url is None and self.key_env is not None:
            raise ValueError("key_env: is of a server at url; a child gets a key by itself")
        return self

    @property
    def rank_step(self) -> int:
        """The legal --max-lora-rank that has room for `max_rank`."""
        return step_above(self.max_rank, "vllm")
