"""Small artefacts for the store, without a model."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tunefork.registry.objects import StoredFile, is_intact
from tunefork.registry.store import Store

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


def save_artefact(folder: Path, *, seed: int = 0, rank: int = 2, alpha: float = 4.0) -> Path:
    """A folder like an adapter's, of random tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(seed)
    tensors = {
        f"{LAYER}.lora_A.weight": torch.randn(rank, 12, generator=random),
        f"{LAYER}.lora_B.weight": torch.randn(8, rank, generator=random),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "owner/name",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": ["q_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def check_store(store: Store) -> int:
    """Every file of every version is there with its hash, in the objects and in the view.

    Returns how many versions there are.
    """
    assert store.database.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    assert not store.database.execute("PRAGMA foreign_key_check").fetchall()
    versions = store.list()
    for version in versions:
        files: tuple[StoredFile, ...] = store.show(version).files
        assert files and sum(file.bytes for file in files) == version.bytes
        for file in files:
            assert is_intact(store.objects.at(file.sha256), file), (version, file)
            assert is_intact(version.folder() / file.path, file), (version, file)
    return len(versions)
