"""Will vLLM or SGLang take this adapter, and will it compute what was trained?

What each server refuses is data, read from its source at the version named. Asked before an export,
and before training too (`lora.serve_with`): a rank or a method that the server will not take is
cheaper to change then.

vLLM: config/lora.py (MaxLoRARanks) and lora/peft_helper.py (_validate_features). Its legal ranks
are those of --max-lora-rank, which all of a server's adapters share: an adapter of another rank
below it is accepted and takes the room of the next step.

SGLang: srt/lora/lora_config.py and lora.py. It reads `lora_alpha / r` as the scale and does not
look at `use_rslora`, so that an rsLoRA adapter would run at the wrong scale in silence: the export
writes the same scale as a plain alpha.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

ServerName = Literal["vllm", "sglang"]
SERVERS: tuple[ServerName, ...] = get_args(ServerName)


@dataclass(frozen=True, slots=True)
class Server:
    """What one server accepts."""

    title: str
    version: str
    """The one that the facts below were read from."""
    ranks: tuple[int, ...] | None
    """Legal values of --max-lora-rank; None: any."""
    refused: dict[str, str]
    """Setting of adapter_config.json -> what the server lacks."""
    knows_rslora: bool
    command: str
    """What runs it; {base}, {name}, {folder} and {rank} are filled in."""


_BOTH = {
    "use_dora": "DoRA",
    "lora_bias": "biases of the deltas",
    "modules_to_save": "whole modules saved beside the deltas",
    "trainable_token_indices": "trained token vectors",
    "target_parameters": "deltas on parameters",
    "rank_pattern": "ranks that differ by layer",
    "alpha_pattern": "scales that differ by layer",
}
TABLE: dict[ServerName, Server] = {
    "vllm": Server(
        title="vLLM",
        version="0.32.0",
        ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
        refused=_BOTH,
        knows_rslora=True,
        command="vllm serve {base} --enable-lora --max-lora-rank {rank} "
        "--lora-modules {name}={folder}",
    ),
    "sglang": Server(
        title="SGLang",
        version="0.5 (main, read in November 2026)",
        ranks=None,
        refused=_BOTH,
        knows_rslora=False,
        command="python -m sglang.launch_server --model-path {base} --enable-lora "
        "--max-lora-rank {rank} --lora-paths {name}={folder}",
    ),
}
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq")
"""Initialisations that change the base's weights: on the base as it is, the deltas are off."""


def complaints(config: dict[str, Any], name: ServerName) -> list[str]:
    """Why server `name` will not take an adapter of this adapter_config.json; empty: it will."""
    server = TABLE[name]
    found = []
    for setting, what in server.refused.items():
        if config.get(setting):
            found.append(f"{server.title} has no {what} ({setting})")
    if config.get("bias") not in (None, "none"):
        found.append(f"{server.title} has no trained biases (bias={config['bias']!r})")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        found.append(
            f"{server.title} runs the base as it is, but init_lora_weights={start!r} trained over "
            "changed weights; convert the adapter to plain LoRA first (PEFT does when it saves "
            "with path_initial_model_for_weight_conversion)"
        )
    if server.ranks is not None and config["r"] > server.ranks[-1]:
        found.append(
            f"rank {config['r']} is above {server.title}'s highest, {server.ranks[-1]}; train with "
            "a lower lora.rank, or merge"
        )
    return found


def step_above(rank: int, name: ServerName) -> int:
    """The lowest --max-lora-rank of server `name` that has room for `rank`."""
    ranks = TABLE[name].ranks
    return rank if ranks is None else next(step for step in ranks if step >= rank)


def plain_scale(config: dict[str, Any], name: ServerName) -> dict[str, Any]:
    """`config` with a scale that server `name` reads rightly."""
    if TABLE[name].knows_rslora or not config.get("use_rslora"):
        return config
    return {**config, "use_rslora": False, "lora_alpha": config["lora_alpha"] * config["r"] ** 0.5}


def command(name: ServerName, *, base: str, adapter: str, folder: str, rank: int) -> str:
    """What starts server `name` with this adapter."""
    return TABLE[name].command.format(
        base=base, name=adapter, folder=folder, rank=step_above(rank, name)
    )
