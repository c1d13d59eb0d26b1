"""`tunefork merge`: adapters become one model, or one adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunefork.cli.arguments import AsJson

if TYPE_CHECKING:
    from tunefork.export.proof import Gate, Proof

Out = Annotated[Path, typer.Option(help="Folder to write; must not hold anything yet.")]
ProofRecipe = Annotated[
    Path | None,
    typer.Option("--recipe", help="Prove it on this recipe's evaluation examples and metrics too."),
]
MaxMeanKl = Annotated[
    float | None, typer.Option(min=0.0, help="Most mean KL, nats a token.", show_default="0.02")
]
MaxKl = Annotated[float | None, typer.Option(min=0.0, help="Most KL at a token.", show_default="2")]
MinTop1 = Annotated[
    float | None,
    typer.Option(
        "--min-top1", min=0.0, max=1.0, help="Least top-1 agreement.", show_default="0.85"
    ),
]


def merge(
    targets: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="A run or adapter folder; or several.")
    ],
    out: Out,
    combine: Annotated[
        str | None,
        typer.Option(help="Several: linear, ties, dare_linear, dare_ties or cat, as PEFT does."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Several: a weight each, 0.5,0.5.", show_default="1 each")
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="ties, dare: share of the values that is kept.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="dare: which values are dropped.")] = 0,
    recipe: ProofRecipe = None,
    max_mean_kl: MaxMeanKl = None,
    max_kl: MaxKl = None,
    min_top1: MinTop1 = None,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into its base: one Hugging Face folder, proven to answer as it did.

    With several adapters of one base: combine them into one adapter, which has no proof.
    """
    if len(targets) > 1 or combine is not None:
        from tunefork.export.combine import combine_adapters, parse_weights

        chosen = parse_weights(weights, len(targets))
        combine_adapters(targets, out, kind=combine, weights=chosen, density=density, seed=seed)
        typer.echo(f"{out}\nmerge it into its base: tunefork merge {out} --out MODEL")
        return
    from tunefork.cli.arguments import load_recipe
    from tunefork.errors import BadInputError
    from tunefork.export.merge import merge as merge_one

    if weights is not None or density is not None:
        raise BadInputError("--weights, --density: are for several adapters; name them, --combine")
    gate = make_gate(max_mean_kl, max_kl, min_top1)
    resolved = None if recipe is None else load_recipe(recipe, None)
    proof = merge_one(targets[0], out, gate=gate, recipe=resolved)
    if as_json:
        typer.echo(proof.model_dump_json(indent=2))
        return
    print_proof(proof)
    typer.echo(f"{out}\nrun it: tunefork chat {out}")


def make_gate(max_mean_kl: float | None, max_kl: float | None, min_top1: float | None) -> Gate:
    """The proof gate with what was given on the command line."""
    from tunefork.export.proof import Gate

    given = {"max_mean_kl": max_mean_kl, "max_kl": max_kl, "min_top1": min_top1}
    return Gate.model_validate({name: v for name, v in given.items() if v is not None})


def print_proof(proof: Proof) -> None:
    """A line a figure."""
    found = proof.agreement
    typer.echo(
        f"proof: {proof.exported} against {proof.reference}, {found.num_tokens:,} tokens of "
        f"{proof.prompts}\n"
        f"  mean KL {found.mean_kl:.3g} nats a token, largest {found.max_kl:.3g}, same likeliest "
        f"token {found.top1:.4f}"
    )
    for name, other in proof.alternatives.items():
        typer.echo(f"  not taken: merged into {name}, mean KL {other.mean_kl:.3g}")
    for task in proof.task:
        typer.echo(f"  {task.name}: {task.reference:.4g} before, {task.exported:.4g} after")
