"""`tunefork serve`: the OpenAI API over one base and its adapters; keys and usage."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunefork.cli.arguments import AsJson

if TYPE_CHECKING:
    from tunefork.serve.settings import ServeSettings
    from tunefork.serve.tenants import Tenant

serve = typer.Typer(help="Serve one base and all its adapters.", invoke_without_command=True)
keys = typer.Typer(help="Who may ask, for what, and how much.", no_args_is_help=True)
serve.add_typer(keys, name="keys")

TenantsFile = Annotated[
    Path | None,
    typer.Option(
        "--tenants",
        metavar="FILE",
        help="Tenants, keys and usage.",
        show_default="TUNEFORK_HOME/serve.sqlite",
    ),
]


@serve.callback()
def run(
    context: typer.Context,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A hub id, folder, .gguf or packaged name.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="embedded or vllm.", show_default="embedded")
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(help="Beyond 127.0.0.1 keys are demanded.", show_default="127.0.0.1"),
    ] = None,
    port: Annotated[int | None, typer.Option(help="0: any free one.", show_default="8000")] = None,
    name: Annotated[
        str | None,
        typer.Option(help="The base's name for clients.", show_default="its id's last part"),
    ] = None,
    tenants: TenantsFile = None,
    merge: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Give this adapter a merged copy of the base."),
    ] = None,
    pin: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Keep this adapter in a slot.")
    ] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="A name by which clients reach this server.")
    ] = None,
    allowed_origin: Annotated[
        list[str] | None, typer.Option(help="A page's origin that may call it.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", metavar="FILE", help="Settings as YAML (docs/serving_settings.md)."
        ),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any setting of it, as embedded.slots=16."),
    ] = None,
) -> None:
    """Serve one base and all its adapters through the OpenAI API, until Ctrl-C."""
    if context.invoked_subcommand is not None:
        return
    flags: dict[str, Any] = {
        "base": base,
        "engine": engine,
        "host": host,
        "port": port,
        "name": name,
    }
    flags |= {"tenants": tenants, "merge": merge, "pin": pin}
    flags |= {"allowed_hosts": allowed_host, "allowed_origins": allowed_origin}
    _serve(_settings(config, flags, tuple(sets or ())))


def _settings(config: Path | None, flags: dict[str, Any], sets: tuple[str, ...]) -> ServeSettings:
    from tunefork.errors import BadInputError
    from tunefork.serve.settings import read_settings

    if config is None and flags["base"] is None and not any(s.startswith("base") for s in sets):
        raise BadInputError("--base: is missing; name the model to serve (tunefork serve --help)")
    return read_settings(config, flags, sets)


def _serve(settings: ServeSettings) -> None:
    import logging

    _check_extra()
    from tunefork.serve.choose import make_engine
    from tunefork.serve.run import serve as run_server

    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("tunefork").setLevel(logging.INFO)
    run_server(make_engine(settings), settings, say=lambda line: typer.echo(line, err=True))


def _check_extra() -> None:
    """Say what is to be installed, before anything fails in the middle of an import."""
    from importlib.util import find_spec

    from tunefork.errors import BadInputError

    wanted = ("fastapi", "uvicorn", "prometheus_client", "httpx")
    missing = [name for name in wanted if find_spec(name) is None]
    if missing:
        raise BadInputError(
            f"serving needs {', '.join(missing)}, which is not installed: "
            "pip install 'tunefork[serve]'"
        )


_LIMIT = typer.Option(min=0, max=2**63 - 1, help="0: no limit.")


@keys.command()
def add(
    tenant: Annotated[str, typer.Argument(help="Whose key it is; made if need be.")],
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--models", metavar="PATTERN", help="Adapters it sees ('acme/*').", show_default="all"
        ),
    ] = None,
    base: Annotated[
        bool | None, typer.Option("--base/--no-base", help="May ask the base as it is.")
    ] = None,
    operator: Annotated[
        bool | None, typer.Option("--operator/--no-operator", help="May read /metrics.")
    ] = None,
    weight: Annotated[
        float | None, typer.Option(min=0.01, max=100.0, help="Its share where tenants compete.")
    ] = None,
    requests_per_minute: Annotated[int | None, _LIMIT] = None,
    tokens_per_minute: Annotated[int | None, _LIMIT] = None,
    tokens_per_month: Annotated[int | None, _LIMIT] = None,
    tenants: TenantsFile = None,
    as_json: AsJson = False,
) -> None:
    """Make a key, which is shown this once, and set what its tenant may do."""
    from dataclasses import replace

    from tunefork.serve.tenants import Tenant, add_key, find_tenant

    file = _file(tenants)
    known = find_tenant(file, tenant) if file.exists() else None
    given = {
        "models": tuple(models) if models else None,
        "has_base": base,
        "is_operator": operator,
        "weight": weight,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "tokens_per_month": tokens_per_month,
    }
    changed: dict[str, Any] = {
        name: None if name.endswith(("_minute", "_month")) and value == 0 else value
        for name, value in given.items()
        if value is not None
    }
    key = add_key(file, replace(known or Tenant(tenant), **changed))
    if as_json:
        _print_json({"tenant": tenant, "key": key})
    else:
        typer.echo(key)


@keys.command("list")
def list_(tenants: TenantsFile = None, as_json: AsJson = False) -> None:
    """List tenants, their limits and the ids of their keys."""
    from dataclasses import asdict

    from tunefork.serve.tenants import list_keys, read_accounts

    file = _file(tenants)
    found = list_keys(file) if file.exists() else []
    known = read_accounts(file).tenants if file.exists() else {}
    if as_json:
        _print_json(
            {"tenants": [asdict(t) for t in known.values()], "keys": [asdict(k) for k in found]}
        )
        return
    for tenant in known.values():
        typer.echo(f"{tenant.name}: {_described(tenant)}")
        for key in found:
            if key.tenant == tenant.name:
                state = f"revoked {key.revoked}" if key.revoked else f"since {key.created}"
                typer.echo(f"  {key.id}  {state}")


def _described(tenant: Tenant) -> str:
    """What it sees, and whatever of it is not as by default."""
    from tunefork.page.units import counted

    facts = [
        f"{counted(value, noun)} a {period}"
        for noun, period, value in (
            ("request", "minute", tenant.requests_per_minute),
            ("token", "minute", tenant.tokens_per_minute),
            ("token", "month", tenant.tokens_per_month),
        )
        if value is not None
    ]
    facts += [f"weight {tenant.weight:g}"] if tenant.weight != 1 else []
    facts += ["operator"] if tenant.is_operator else []
    facts += [] if tenant.has_base else ["not the base"]
    return " ".join(tenant.models) + (f" ({', '.join(facts)})" if facts else "")


@keys.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="The key's id: a key is tf_<id>_<secret>.")],
    tenants: TenantsFile = None,
) -> None:
    """End a key; running servers heed it within a second or two."""
    from tunefork.serve.tenants import revoke_key

    key = revoke_key(_file(tenants), key_id)
    typer.echo(f"{key.id} of {key.tenant}: revoked {key.revoked}")


@serve.command()
def usage(
    tenant: Annotated[str | None, typer.Option(help="Only this one's.")] = None,
    since: Annotated[
        str, typer.Option(metavar="DATE", help="2026-11, 2026-11-26: from then on, UTC.")
    ] = "",
    tenants: TenantsFile = None,
    as_json: AsJson = False,
) -> None:
    """Sum up what was used, by tenant and exact version."""
    from dataclasses import asdict

    from tunefork.errors import BadInputError
    from tunefork.page.units import counted
    from tunefork.serve.ledger import read_usage

    if since and not _is_date(since):
        raise BadInputError(f"--since: {since!r} is no date; write 2026, 2026-11 or 2026-11-26")
    file = _file(tenants)
    rows = read_usage(file, tenant=tenant, since=since) if file.exists() else []
    if as_json:
        _print_json([asdict(row) for row in rows])
        return
    for row in rows:
        typer.echo(
            f"{row.tenant}  {row.model}  {counted(row.requests, 'request')}  "
            f"{row.prompt_tokens:,} + {counted(row.completion_tokens, 'token')}"
        )


def _is_date(text: str) -> bool:
    """A year, a month or a day that there is."""
    from datetime import date

    if not re.fullmatch(r"[0-9]{4}(-[0-9]{2}){0,2}", text):
        return False
    try:
        date.fromisoformat(text + "-01-01"[len(text) - 4 :])
    except ValueError:
        return False
    return True


def _file(tenants: Path | None) -> Path:
    from tunefork.home import home

    return tenants or home() / "serve.sqlite"


def _print_json(content: Any) -> None:
    import json

    typer.echo(json.dumps(content, indent=2))
