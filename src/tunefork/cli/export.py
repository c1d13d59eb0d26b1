"""`tunefork export`: what was trained, for other programs."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from tunefork.cli.arguments import AsJson
from tunefork.cli.evaluate import Target
from tunefork.cli.merge import MaxKl, MaxMeanKl, MinTop1, Out, ProofRecipe, make_gate, print_proof

Form = Literal["peft", "merged", "gguf", "gguf-lora", "ollama", "vllm", "sglang"]


def export(
    target: Target,
    to: Annotated[Form, typer.Option(help="Who is to read it.")],
    out: Out,
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"] | None,
        typer.Option(help="peft, vllm, sglang: of the adapter's tensors.", show_default="as saved"),
    ] = None,
    kind: Annotated[
        Literal["f32", "f16", "bf16", "q8_0"] | None,
        typer.Option("--type", help="gguf, ollama: of the matrices.", show_default="f16"),
    ] = None,
    pad_rank: Annotated[
        int | None,
        typer.Option(min=0, help="Pad an adapter with zeros to this rank; 0: vLLM's next step."),
    ] = None,
    with_adapter: Annotated[
        bool, typer.Option("--with-adapter", help="ollama: base and adapter in two files.")
    ] = False,
    recipe: ProofRecipe = None,
    max_mean_kl: MaxMeanKl = None,
    max_kl: MaxKl = None,
    min_top1: MinTop1 = None,
    as_json: AsJson = False,
) -> None:
    """Export a run or an adapter, proven to answer as what was trained.

    Prints the command that runs it. What fails its proof is left under OUT.failed.
    """
    from tunefork.cli.arguments import load_recipe
    from tunefork.export.export import Options
    from tunefork.export.export import export as write

    made = write(
        target,
        to,
        out,
        options=Options(dtype=dtype, kind=kind, pad_rank=pad_rank, with_adapter=with_adapter),
        gate=make_gate(max_mean_kl, max_kl, min_top1),
        recipe=None if recipe is None else load_recipe(recipe, None),
    )
    if as_json:
        typer.echo(made.proof.model_dump_json(indent=2))
        return
    print_proof(made.proof)
    for note in made.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"{out}\nrun it: {made.command}")
