"""`tunefork adapters`: what the store of this machine holds, and moving it to and from others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunefork.cli.arguments import AsJson

if TYPE_CHECKING:
    from tunefork.registry.version import Version

adapters = typer.Typer(
    help="Publish adapters under names, tag, compare, push and pull them.", no_args_is_help=True
)

Reference = Annotated[
    str,
    typer.Argument(metavar="NAME[:VERSION]", help="support/acme:v3, support/acme:prod, sha256:..."),
]
Tags = Annotated[list[str] | None, typer.Option("--tag", help="A tag to put on it.")]
Place = Annotated[
    str, typer.Argument(metavar="URL", help="A folder, s3://bucket/path or hf://owner/name.")
]


@adapters.command("list")
def list_(
    name: Annotated[str | None, typer.Argument(help="Only this name, and those below it.")] = None,
    as_json: AsJson = False,
) -> None:
    """List versions, their tags and their bases."""
    from tunefork.registry.store import Store

    with Store.open() as store:
        versions = store.list(name)
    if as_json:
        _print_json([_fields(version) for version in versions])
        return
    _print_table(versions)


@adapters.command()
def show(reference: Reference, as_json: AsJson = False) -> None:
    """Show a version: files, lineage, figures, who holds it, how its tags moved."""
    from tunefork.cli.adapters_table import print_details
    from tunefork.registry.store import Store

    with Store.open() as store:
        details = store.show(reference)
    if as_json:
        _print_json(
            _fields(details.version)
            | {
                "folder": str(details.version.folder()),
                "files": [_dict(file) for file in details.files],
                "lineage": details.lineage.model_dump(mode="json", exclude={"identity", "metrics"}),
                "identity": details.identity,
                "metrics": details.metrics,
                "holds": details.holds,
                "tag_moves": [
                    {"tag": tag, "number": number, "moved": moved}
                    for tag, number, moved in details.history
                ],
            }
        )
        return
    print_details(details)


@adapters.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="A run folder, or an adapter's or a model's.")],
    name: Annotated[str, typer.Argument(help="Such as support/acme.")],
    tag: Tags = None,
    note: Annotated[str, typer.Option(help="What a reader of the list should know.")] = "",
    as_json: AsJson = False,
) -> None:
    """Copy an artefact into the store as the next version of a name."""
    from tunefork.registry.store import Store, unfinished

    with Store.open() as store:
        version = store.publish(folder, name, tags=tag or (), note=note)
    if (told := unfinished(folder)) is not None:
        typer.echo(f"warning: {told}; {version} is published all the same", err=True)
    _print_version(version, as_json)


@adapters.command()
def adopt(
    folder: Annotated[Path, typer.Argument(help="An adapter's folder, made elsewhere.")],
    base: Annotated[
        str | None, typer.Option(help="Its base.", show_default="as adapter_config.json says")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="The base's revision on the hub.")] = None,
    name: Annotated[
        str | None, typer.Option("--publish", metavar="NAME", help="And publish it so.")
    ] = None,
    tag: Tags = None,
    as_json: AsJson = False,
) -> None:
    """Check that an adapter made elsewhere works on its base, and record which that is.

    It must change the logits; its tunefork.json then names the base by its content.
    """
    from tunefork.errors import BadInputError
    from tunefork.recipe import ModelSection
    from tunefork.registry.adopt import adopt as run
    from tunefork.registry.peft_format import base_section
    from tunefork.registry.store import Store

    if tag and name is None:
        raise BadInputError("--tag: is for a published version; give its name with --publish too")
    if revision is not None and base is None:
        raise BadInputError("--revision: is the base's; give that with --base too")
    section = base_section(folder) if base is None else ModelSection(id=base, revision=revision)
    provenance = run(folder, section, say=lambda line: typer.echo(line, err=True))
    if name is not None:
        with Store.open() as store:
            _print_version(store.publish(folder, name, tags=tag or ()), as_json)
    elif as_json:
        _print_json(provenance.model_dump(mode="json"))
    else:
        typer.echo(
            f"{folder}: adopted; its base's weights are {provenance.identity.weights_sha256}"
        )


@adapters.command()
def tag(
    reference: Reference,
    tag: Annotated[str, typer.Argument(help="Such as prod.")],
    is_removed: Annotated[
        bool, typer.Option("--remove", help="Take the tag off its name instead.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Put a tag on a version, off any other of its name, in one step."""
    from tunefork.registry.store import Store

    with Store.open() as store:
        version = store.resolve(reference)
        if is_removed:
            store.untag(version.name, tag)
            version = store.resolve(str(version))
        else:
            version = store.tag(version.name, tag, version)
    _print_version(version, as_json)


@adapters.command()
def diff(a: Reference, b: Reference, as_json: AsJson = False) -> None:
    """Compare two versions: lineage, configuration, and how far each layer's delta moved."""
    from tunefork.cli.adapters_table import print_difference
    from tunefork.registry.difference import diff as compare
    from tunefork.registry.store import Store

    with Store.open() as store:
        found = compare(store, a, b)
    if not as_json:
        print_difference(found)
        return
    fields = {
        name: {key: {"a": pair[0], "b": pair[1]} for key, pair in getattr(found, name).items()}
        for name in ("lineage", "config", "files")
    }
    layers = [_dict(layer) for layer in found.layers]
    _print_json(
        {"a": str(found.a), "b": str(found.b)}
        | fields
        | {"layers": layers, "other_tensors": found.other_tensors}
    )


@adapters.command()
def remove(reference: Reference, as_json: AsJson = False) -> None:
    """Take a version out, unless a tag or a server holds it; `gc` then frees its space."""
    from tunefork.registry.store import Store

    with Store.open() as store:
        version = store.remove(reference)
    _print_version(version, as_json, "removed ")


@adapters.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: AsJson = False,
) -> None:
    """Free the space of removed versions and of publishes that were killed."""
    from tunefork.registry.garbage import collect_garbage
    from tunefork.registry.store import Store

    with Store.open() as store:
        found = collect_garbage(store, dry_run=dry_run)
    if as_json:
        _print_json(_dict(found) | {"dry_run": dry_run})
        return
    verb = "would free" if dry_run else "freed"
    typer.echo(f"{verb} {found.bytes:,} bytes in {found.files} files")


@adapters.command()
def push(reference: Reference, url: Place, as_json: AsJson = False) -> None:
    """Copy a version to a folder, an S3-style URL or the Hugging Face hub."""
    from tunefork.registry.remote import push as run
    from tunefork.registry.store import Store

    with Store.open() as store:
        version = run(store, reference, url)
    _print_version(version, as_json)


@adapters.command()
def pull(
    url: Place,
    reference: Annotated[
        str | None,
        typer.Argument(metavar="[NAME[:VERSION]]", help="Which one; not for the hub."),
    ] = None,
    name: Annotated[str | None, typer.Option("--as", help="Its name here.")] = None,
    tag: Tags = None,
    as_json: AsJson = False,
) -> None:
    """Copy a version from there into the store, every hash checked."""
    from tunefork.registry.remote import pull as run
    from tunefork.registry.store import Store

    with Store.open() as store:
        version = run(store, url, reference, name=name, tags=tag or ())
    _print_version(version, as_json)


def _fields(version: Version) -> dict[str, Any]:
    fields = _dict(version)
    return {"version": str(version)} | {k: v for k, v in fields.items() if k not in ("id", "root")}


def _dict(value: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(value)


def _print_json(content: Any) -> None:
    import json

    typer.echo(json.dumps(content, indent=2))


def _print_version(version: Version, as_json: bool, done: str = "") -> None:
    if as_json:
        _print_json(_fields(version))
    else:
        tags = f" ({', '.join(version.tags)})" if version.tags else ""
        typer.echo(f"{done}{version}{tags} sha256:{version.digest[:12]}")


def _print_table(versions: list[Version]) -> None:
    from tunefork.cli.adapters_table import print_versions

    print_versions(versions)
