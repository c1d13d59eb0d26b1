"""`tunefork bench-serve`: a load on an OpenAI server, and how it bore it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tunefork.cli.arguments import AsJson, KeyVariable, check_server, read_key

if TYPE_CHECKING:
    from tunefork.serve.bench_report import BenchReport, Spread


def bench_serve(
    server: Annotated[str, typer.Option(metavar="URL", help="Where the server is.")],
    model: Annotated[
        list[str], typer.Option(metavar="NAME", help="Repeat it: requests are spread over all.")
    ],
    requests: Annotated[int, typer.Option(min=1)] = 64,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests at the same time; 16 without --rate.")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(min=0.001, help="Poisson arrivals a second, instead of --concurrency."),
    ] = None,
    prompt_tokens: Annotated[
        str, typer.Option(metavar="N|MIN-MAX", help="Length of prompts, drawn evenly.")
    ] = "128",
    answer_tokens: Annotated[
        str, typer.Option(metavar="N|MIN-MAX", help="Length of answers, drawn evenly.")
    ] = "128",
    skew: Annotated[
        float, typer.Option(min=0.0, help="Zipf: the n-th model gets 1/n^SKEW; 0: all the same.")
    ] = 0.0,
    vocab_size: Annotated[
        int, typer.Option(min=101, help="Prompts are random ids between 100 and this.")
    ] = 4096,
    stop_at_eos: Annotated[
        bool, typer.Option("--stop-at-eos", help="Let answers end by themselves.")
    ] = False,
    seed: Annotated[int, typer.Option(help="The same seed sends the same.")] = 0,
    key_env: KeyVariable = None,
    as_json: AsJson = False,
) -> None:
    """Load an OpenAI server with a mix of models; print throughput and times."""
    import asyncio
    import json

    from tunefork.errors import BadInputError
    from tunefork.serve.bench import Load, run
    from tunefork.serve.bench_report import report

    if rate is not None and concurrency is not None:
        raise BadInputError(
            "--concurrency: has no use with --rate, by which requests come; give one"
        )
    load = Load(
        models=tuple(model),
        requests=requests,
        concurrency=concurrency or 16,
        rate=rate,
        prompt_tokens=_range("--prompt-tokens", prompt_tokens),
        answer_tokens=_range("--answer-tokens", answer_tokens),
        skew=skew,
        vocab_size=vocab_size,
        ignore_eos=not stop_at_eos,
        seed=seed,
    )
    outcome = asyncio.run(run(check_server(server), read_key(key_env), load))
    told = report(server, load, outcome)
    if as_json:
        typer.echo(json.dumps(told.fields(), indent=2))
    else:
        _print(told)
    if not told.answered:
        raise typer.Exit(1)


def _range(option: str, text: str) -> tuple[int, int]:
    from tunefork.errors import BadInputError

    low, _, high = text.partition("-")
    try:
        found = int(low), int(high or low)
    except ValueError:
        found = (0, 0)
    if not 1 <= found[0] <= found[1] <= 1_000_000:
        raise BadInputError(f"{option}: {text!r} is no length; give 128, or 64-256")
    return found


def _print(told: BenchReport) -> None:
    from tunefork.page.units import counted

    asked = counted(told.load.requests, "request")
    typer.echo(f"{told.answered} of {asked} answered in {told.wall_s:.2f} s")
    for kind, count in sorted(told.errors.items()):
        typer.echo(f"  {count} x {kind}")
    if not told.answered:
        return
    typer.echo(
        f"output {told.output_tokens_per_s:,.1f} tokens/s, with prompts "
        f"{told.total_tokens_per_s:,.1f} tokens/s, {told.requests_per_s:.2f} requests/s"
    )
    typer.echo(f"{'milliseconds':<22}{'p50':>10}{'p95':>10}{'p99':>10}")
    _print_spread("to the first token", told.first_token_s)
    _print_spread("per token after it", told.token_s)
    _print_spread("per request", told.request_s)
    busy = "; it may have slowed the server's answers" if told.generator_was_busy else ""
    late = told.generator_late_s.p99 * 1e3 if told.generator_late_s else 0.0
    typer.echo(
        f"this generator: {told.generator_cpu:.0%} of a core, up to {late:.1f} ms late (p99){busy}"
    )


def _print_spread(name: str, spread: Spread | None) -> None:
    values = [] if spread is None else [spread.p50, spread.p95, spread.p99]
    typer.echo(f"{name:<22}" + "".join(f"{value * 1e3:>10.1f}" for value in values))
