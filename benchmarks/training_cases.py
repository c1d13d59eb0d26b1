"""What benchmarks/h200_training.py runs: issue 6's cases, and every tool's settings for them."""

from dataclasses import dataclass

from benchmarks.training_runs import Run

TOOLS = ("tunefork", "plain", "unsloth", "peft_liger", "peft")
"""`plain` is tunefork's own uncompiled bf16 path, whose losses ours are compared with."""

_LONG, _SHORT = (8, 2048), (8, 64)
_FULL = {"method": "full", "full.weights": "bf16", "full.optimizer": "adamw_bf16"}
_PLAIN = {"train.activation_checkpointing": "full", "train.compile": "never"}
_PLAIN_LORA = {"train.precision": "bf16", **_PLAIN}
_COMPILED = {"train.compile": "always"}


def _runs() -> dict[str, Run]:
    """Every run by name. Peers' are shared by the cases that compare with them."""
    ours = [
        Run("int8", "tunefork", *_LONG, {"method": "lora", "train.precision": "int8", **_COMPILED}),
        Run("bf16", "tunefork", *_LONG, {"method": "lora", "train.precision": "bf16", **_COMPILED}),
        Run(
            "int8_20gib",
            "tunefork",
            *_LONG,
            {
                "method": "lora",
                "train.precision": "int8",
                "train.activation_checkpointing": "full",
                **_COMPILED,
            },
        ),
        Run(
            "qlora",
            "tunefork",
            *_LONG,
            {
                "method": "qlora",
                "train.precision": "int8",
                "train.activation_checkpointing": "offload",
                **_COMPILED,
            },
        ),
        Run(
            "qlora_bf16",
            "tunefork",
            *_LONG,
            {
                "method": "qlora",
                "train.precision": "bf16",
                "train.activation_checkpointing": "offload",
                **_COMPILED,
            },
        ),
        Run("full", "tunefork", *_LONG, {**_FULL, **_COMPILED}),
        Run(
            "int8_short",
            "tunefork",
            *_SHORT,
            {"method": "lora", "train.precision": "int8", **_COMPILED},
        ),
        Run("plain_lora", "tunefork", *_LONG, {"method": "lora", **_PLAIN_LORA}),
        Run("plain_qlora", "tunefork", *_LONG, {"method": "qlora", **_PLAIN_LORA}),
        Run("plain_full", "tunefork", *_LONG, {**_FULL, **_PLAIN}),
        Run("plain_short", "tunefork", *_SHORT, {"method": "lora", **_PLAIN_LORA}),
    ]
    peers = [
        Run("unsloth", "unsloth", *_LONG),
        Run("unsloth_ckpt", "unsloth", *_LONG, {"checkpointing": True}),
        Run("unsloth_qlora", "unsloth", *_LONG, {"checkpointing": True, "nf4": True}),
        Run("unsloth_short", "unsloth", *_SHORT),
        Run("peft_liger_full", "peft_liger", *_LONG, {"checkpointing": True, "full": True}),
    ]
    for defaults in (False, True):
        of, end = {"defaults": defaults}, "_defaults" if defaults else ""
        ckpt = {"checkpointing": True, **of}
        peers += [
            Run(f"peft_liger{end}", "peft_liger", *_LONG, of),
            Run(f"peft_liger_ckpt{end}", "peft_liger", *_LONG, ckpt),
            Run(f"peft_liger_qlora{end}", "peft_liger", *_LONG, {"nf4": True, **ckpt}),
            Run(f"peft_liger_short{end}", "peft_liger", *_SHORT, of),
            Run(f"peft{end}", "peft", *_LONG, of),
            Run(f"peft_ckpt{end}", "peft", *_LONG, ckpt),
            Run(f"peft_short{end}", "peft", *_SHORT, of),
        ]
    return {run.name: run for run in [*ours, *peers]}


RUNS = _runs()


@dataclass(frozen=True, slots=True)
class Case:
    """A row of the table: our run, the plain path on the same data, the peers' runs."""

    ours: str
    plain: str
    peers: tuple[str, ...]
    tokens_per_s: float | None = None
    """What issue 6 asks for at least."""
    ratio: tuple[str, float] | None = None
    """The tool, and how many times its speed at least."""
    peak_gib: float | None = None
    """The most memory it may take."""


_PEERS = ("unsloth", "peft_liger", "peft_liger_defaults", "peft", "peft_defaults")
_QLORA_PEERS = ("unsloth_qlora", "peft_liger_qlora", "peft_liger_qlora_defaults")
CASES: dict[str, Case] = {
    "lora_8x2048_fp8": Case("int8", "plain_lora", _PEERS, 26_000, ("unsloth", 1.6)),
    "lora_8x2048_bf16": Case("bf16", "plain_lora", _PEERS, 17_600, ("unsloth", 1.08)),
    "lora_8x2048_20gib": Case(
        "int8_20gib",
        "plain_lora",
        (
            "unsloth_ckpt",
            "peft_liger_ckpt",
            "peft_liger_ckpt_defaults",
            "peft_ckpt",
            "peft_ckpt_defaults",
        ),
        ratio=("unsloth", 1.5),
        peak_gib=20.0,
    ),
    "qlora_8x2048": Case(
        "qlora",
        "plain_qlora",
        _QLORA_PEERS,
        ratio=("unsloth", 1.5),
        peak_gib=10.5,
    ),
    "qlora_8x2048_bf16": Case(
        "qlora_bf16",
        "plain_qlora",
        _QLORA_PEERS,
        ratio=("unsloth", 1.5),
        peak_gib=10.5,
    ),
    "full_8x2048": Case("full", "plain_full", ("peft_liger_full",), 11_700, ("peft_liger", 1.15)),
    "lora_8x64": Case(
        "int8_short",
        "plain_short",
        (
            "unsloth_short",
            "peft_liger_short",
            "peft_liger_short_defaults",
            "peft_short",
            "peft_short_defaults",
        ),
        ratio=("unsloth", 3.0),
    ),
}
"""The names and least figures of issue 6, whose 8-bit products were to be FP8's: ours are int8.
`qlora_8x2048_bf16` is beside them: what QLoRA does with the products that no gate is asked of."""


def chosen_runs(cases: list[str], tools: list[str]) -> list[Run]:
    """The runs of `cases` by `tools`, each once, in an order in which a case's end close by."""
    names: dict[str, None] = {}
    for case in cases:
        of = CASES[case]
        names |= dict.fromkeys([of.ours, *of.peers, of.plain])
    wanted = [RUNS[name] for name in names]
    return [
        run
        for run in wanted
        if run.tool in tools and not (run.name.startswith("plain") and "plain" not in tools)
    ]


def setting(run: Run) -> str:
    """The run's own settings in words; what all share is in `training_runs.py`."""
    if run.tool == "tunefork":
        return ", ".join(f"{key}: {value}" for key, value in run.options.items())
    checkpointing = run.options.get("checkpointing", False)
    said = "activation checkpointing" if checkpointing else "no activation checkpointing"
    if run.tool == "unsloth":
        said = f"use_gradient_checkpointing={'unsloth' if checkpointing else False!r}, autocast"
    elif run.options.get("full"):
        said += ", every weight trained in bf16, AdamW with bf16 moments"
    elif run.options.get("defaults"):
        said += ", PEFT's defaults: fp32 adapters under autocast"
    else:
        said += ", autocast_adapter_dtype=False: bf16 adapters, no autocast"
    return said + (", NF4 with double quantisation" if run.options.get("nf4") else "")
