"""200 seeded mutations of a valid adapter: refused by name, or harmless, and nothing else."""

import copy
import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import tiny_model
from tunefork.errors import AdapterError
from tunefork.model.build import add_deltas
from tunefork.recipe import LoraSection
from tunefork.registry.peft_format import CONFIG, WEIGHTS, load_adapter, save_adapter

NUM_MUTATIONS = 200
IDS = torch.arange(3, 20)[None]
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    2**63,
    10**40,
    1.5,
    "",
    "x",
    [],
    [1],
    {},
    {"a": 1},
]


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes, torch.Tensor]:
    """Weights, configuration and logits of an adapter with every kind of tensor."""
    folder = tmp_path_factory.mktemp("valid")
    lora = LoraSection(rank=2, dora=True, targets=("q_proj",), modules_to_save=("model.norm",))
    model = tiny_model("llama")
    add_deltas(model, lora, seed=0, new_ids=(5, 7))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    save_adapter(model, folder, lora, base="tiny")
    return (folder / WEIGHTS).read_bytes(), (folder / CONFIG).read_bytes(), _logits(model)


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(IDS).logits
    return logits


def _mutated_json(value: Any, draw: random.Random) -> Any:
    """`value` with one of its parts, at any depth, replaced, removed or doubled."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(sorted(value))
        kind = draw.randrange(4)
        if kind == 0:
            return {k: v for k, v in value.items() if k != key}
        if kind == 1:
            return {("x" + k if k == key else k): v for k, v in value.items()}
        return value | {key: _mutated_json(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        return [*value[:at], _mutated_json(value[at], draw), *value[at + 1 :]]
    if type(value) is int and draw.random() < 0.5:
        return value + draw.choice([-1, 1, 7, -value, value])
    return draw.choice(ODD)


def _mutated_weights(content: bytes, draw: random.Random) -> bytes:
    length = struct.unpack("<Q", content[:8])[0]
    header, data = content[8 : 8 + length], content[8 + length :]
    match draw.randrange(5):
        case 0:  # a byte of the header, or of its length
            at = draw.randrange(8 + length)
            return content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :]
        case 1:
            return content[: draw.randrange(len(content))]
        case 2:
            return content + draw.randbytes(draw.randrange(1, 64))
        case 3:
            exponent_bytes = bytearray(data)
            exponent_bytes[4 * draw.randrange(len(data) // 4) + 3] = 0x7F
            exponent_bytes[2::4] = b"\xff" * len(exponent_bytes[2::4])
            return content[: 8 + length] + bytes(exponent_bytes)
        case _:
            text = json.dumps(_mutated_json(json.loads(header), draw)).encode()
            return struct.pack("<Q", len(text)) + text + data


def _mutated_config(content: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.3:
        at = draw.randrange(len(content))
        return content[:at] + draw.randbytes(draw.randrange(1, 4)) + content[at + 1 :]
    return json.dumps(_mutated_json(json.loads(content), draw)).encode()


_MEANS_ANOTHER_BASE = {"r", "lora_alpha", "use_rslora"}
"""Configurations that are valid, and of another adapter: their logits differ as they must."""


def test_mutations_crash_nothing(valid: tuple[bytes, bytes, torch.Tensor], tmp_path: Path) -> None:
    weights, config, expected = valid
    base = tiny_model("llama")
    draw, refused, harmless, other = random.Random(0), 0, 0, 0
    for number in range(NUM_MUTATIONS):
        folder = tmp_path / str(number)
        folder.mkdir()
        of_weights = number % 2 == 0
        changed = _mutated_weights(weights, draw) if of_weights else _mutated_config(config, draw)
        (folder / WEIGHTS).write_bytes(changed if of_weights else weights)
        (folder / CONFIG).write_bytes(config if of_weights else changed)
        model = copy.deepcopy(base)
        try:
            load_adapter(model, folder)
        except AdapterError as error:
            assert str(folder) in str(error)
            refused += 1
            continue
        if torch.equal(_logits(model), expected):
            harmless += 1
            continue
        fields, was = json.loads(changed), json.loads(config)
        differing = {k for k in {*fields, *was} if fields.get(k) != was.get(k)}
        assert differing & (_MEANS_ANOTHER_BASE | {"trainable_token_indices"}), differing
        other += 1
    assert refused >= NUM_MUTATIONS / 2 and harmless > 0, (refused, harmless, other)
