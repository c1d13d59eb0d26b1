"""What a server is: every option, its default, its range and why; one file, and flags over it.

Nothing heavy is imported, so that `tunefork serve --help` answers at once.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from tunefork.errors import RecipeError, nearest
from tunefork.home import home
from tunefork.recipe import ModelSection, PositiveFloat, PositiveInt, Section
from tunefork.serve.engines.embedded_settings import EmbeddedSettings
from tunefork.serve.engines.vllm_settings import VllmSettings
from tunefork.yaml_text import read_yaml

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class ServeSettings(Section):
    """A server over one base."""

    base: ModelSection
    """The base, as a recipe's `model`: a hub id, a folder, a .gguf file or a packaged name."""

    name: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """What clients call the base in `model`. None: the last part of its id."""

    engine: Literal["embedded", "vllm"] = "embedded"
    """What computes: transformers with our many-adapter linear, or a vLLM server."""

    host: str = "127.0.0.1"
    """Where it listens. Anywhere but on the loopback interface, every request needs a key."""

    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """0: any that is free."""

    tenants: Path | None = None
    """The file of tenants, keys and usage (SQLite, on a local disk). None:
    TUNEFORK_HOME/serve.sqlite."""

    merge: tuple[str, ...] = ()
    """Adapters (`name:vN`, `name:tag`) that get a merged copy of the base each: an engine more,
    with its memory. The metric `tunefork_merge_would_pay` says for which."""

    pin: tuple[str, ...] = ()
    """Adapters that stay in a slot of the engine, whatever else is asked."""

    allowed_hosts: tuple[str, ...] = ()
    """Names by which clients reach the server (the `Host` header), beside those of this machine.
    Others are refused: a page's script could reach a local server under its own name."""

    allowed_origins: tuple[str, ...] = ()
    """Origins of pages that may call the server (`https://app.example`). None may by default."""

    max_body_bytes: PositiveInt = 4 * 2**20
    """Of a request. A million tokens as ids take 7 MB, as English text 4 MB."""

    max_open_requests: PositiveInt = 2048
    """Requests at the same time, waiting ones too; more are sent away with 503."""

    max_open_requests_per_tenant: PositiveInt = 512
    """The same of one tenant, so that none keeps the others out; more get 429."""

    max_queued: PositiveInt = 1024
    """Answers that wait for the engine; more are sent away with 429."""

    max_queued_per_tenant: PositiveInt = 256
    """The same of one tenant, so that none can fill the queue."""

    body_timeout_s: PositiveFloat = 30.0
    """Seconds until a request has arrived."""

    request_timeout_s: PositiveFloat = 600.0
    """Seconds until an answer is complete, waiting included: the openai package's own limit."""

    stall_timeout_s: PositiveFloat = 30.0
    """Seconds that a client may leave a stream unread before its answer is cancelled."""

    drain_timeout_s: Annotated[float, Field(ge=0.0)] = 60.0
    """Seconds that running answers have once the server is told to stop (SIGTERM)."""

    hold_idle_s: Annotated[float, Field(ge=0.0)] = 60.0
    """Seconds after its last request until a version may be removed from the store again."""

    max_metric_adapters: PositiveInt = 200
    """Adapters that metrics tell apart; later ones are counted as `other`."""

    embedded: EmbeddedSettings = EmbeddedSettings()
    vllm: VllmSettings = VllmSettings()

    @field_validator("base", mode="before")
    @classmethod
    def _short_for_id(cls, value: Any) -> Any:
        return {"id": value} if isinstance(value, str) else value

    @field_validator("name")
    @classmethod
    def _is_plain(cls, value: str | None) -> str | None:
        if value is not None and (
            not value.isprintable() or ":" in value or value != value.strip()
        ):
            raise ValueError("must be printable, without ':' and without white space around it")
        return value

    @field_validator("allowed_hosts")
    @classmethod
    def _are_names(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            if not re.fullmatch(r"[A-Za-z0-9._-]+|[0-9a-fA-F:]+", value):
                raise ValueError(f"{value!r} is no host's name; write ai.example, without a port")
        return values

    @field_validator("allowed_origins")
    @classmethod
    def _are_origins(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/*\s]+", value):
                raise ValueError(
                    f"{value!r} is no origin; write https://app.example, without a path; each by "
                    "its name"
                )
        return values

    @model_validator(mode="after")
    def _no_tokens_are_added(self) -> "ServeSettings":
        if self.base.add_tokens:
            raise ValueError("base.add_tokens: is for training; a base is served as it is")
        return self

    @property
    def base_name(self) -> str:
        """What clients call the base."""
        return self.name or Path(self.base.id).name.replace(":", "-")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in LOOPBACK

    @property
    def accounts_file(self) -> Path:
        """The file of tenants, keys and usage."""
        return self.tenants or home() / "serve.sqlite"


def read_settings(file: Path | None, flags: dict[str, Any], sets: tuple[str, ...]) -> ServeSettings:
    """Settings of a YAML file (if any), then of `a.b=c` strings, then of flags that are not None.

    Raises RecipeError that names each wrong field.
    """
    fields: dict[str, Any] = {}
    where = "settings"
    if file is not None:
        where = str(file)
        try:
            fields = read_yaml(file.read_text(encoding="utf-8"), where)
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{file}: cannot be read ({error}); give a settings file") from error
        if not isinstance(fields, dict):
            raise RecipeError(f"{file}: must be a mapping (base, port, ...)")
    for text in sets:
        _put(fields, text)
    fields |= {name: value for name, value in flags.items() if value is not None}
    try:
        return ServeSettings.model_validate(fields)
    except ValidationError as error:
        lines = [_explain(detail) for detail in error.errors()]
        raise RecipeError("\n".join(f"{where}: {line}" for line in lines)) from error


def _put(fields: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    *path, last = key.strip().split(".")
    if not equals or not last:
        raise RecipeError(f"--set {text}: write KEY=VALUE, for example --set max_queued=100")
    at = fields
    for name in path:
        if isinstance(at.get(name), str):
            at[name] = {"id": at[name]}
        at = at.setdefault(name, {})
        if not isinstance(at, dict):
            raise RecipeError(f"--set {text}: {name!r} is not a section")
    at[last] = read_yaml(value, f"--set {key}")


def _explain(detail: Any) -> str:
    at = ".".join(map(str, detail["loc"]))
    if detail["type"] == "extra_forbidden":
        *sections, key = detail["loc"]
        known: Any = ServeSettings
        for name in sections:
            known = known.model_fields[name].annotation
        return f"{at}: unknown key{nearest(str(key), list(known.model_fields))}"
    if detail["type"] == "missing":
        return f"{at}: is missing; it has no default"
    message = str(detail["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    return f"{at}: {message}" if at else message
