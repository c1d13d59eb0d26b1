"""An adapter's files for vLLM: looked at first, then in a folder that outlives the store's."""

import json
import os
import shutil
from pathlib import Path

from tunefork.errors import AdapterError
from tunefork.export.servers import complaints
from tunefork.serve.engine import ServedAdapter


def check_config(adapter: ServedAdapter, rank_step: int) -> None:
    """Raises AdapterError where vLLM, as it was started, will not compute what was trained."""
    try:
        config = json.loads((adapter.folder / "adapter_config.json").read_text())
    except (OSError, ValueError) as error:
        raise AdapterError(f"{adapter.id}: its adapter_config.json cannot be read") from error
    if not isinstance(config, dict) or not isinstance(config.get("r"), int):
        raise AdapterError(f"{adapter.id}: its adapter_config.json gives no rank (r)")
    found = complaints(config, "vllm")
    if found:
        raise AdapterError(f"{adapter.id}: " + "; ".join(found))
    if config["r"] > rank_step:
        raise AdapterError(
            f"{adapter.id}: its rank {config['r']} is above {rank_step}, with which vLLM was "
            f"started; start it with vllm.max_rank={config['r']}"
        )


def link_folder(source: Path, target: Path) -> None:
    """`target` gets the files of `source`: links where the file system can, else copies."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        made = target / file.name
        if not file.is_file() or made.exists():
            continue
        try:
            os.link(file.resolve(), made)
        except OSError:  # another file system, or one without links
            shutil.copyfile(file, made)
