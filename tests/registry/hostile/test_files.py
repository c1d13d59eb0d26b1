"""Adapter folders made to crash, exhaust or mislead: each is refused by name, and soon."""

import contextlib
import json
import os
import pickle
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import tiny_model
from tunefork.errors import AdapterError
from tunefork.model.build import add_deltas
from tunefork.model.linear import LoraLinear
from tunefork.recipe import LoraSection
from tunefork.registry import safe_read, safe_tensors
from tunefork.registry.peft_deltas import read_deltas
from tunefork.registry.peft_format import (
    CONFIG,
    WEIGHTS,
    base_section,
    load_adapter,
    save_adapter,
)

_KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    lora = LoraSection(rank=2, targets=("q_proj",))
    model = tiny_model("llama")
    add_deltas(model, lora, seed=0)
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.lora_b.data.normal_(std=0.1)
    save_adapter(model, tmp_path / "adapter", lora, base="tiny")
    return tmp_path / "adapter"


def _refusal(folder: Path) -> str:
    start = time.thread_time()
    with pytest.raises(AdapterError) as caught:
        load_adapter(tiny_model("llama"), folder)
    assert time.thread_time() - start < 2.0
    assert len(str(caught.value)) < 1500
    return str(caught.value)


def _with_header(folder: Path, change: Callable[[dict[str, Any]], Any], tail: bytes = b"") -> None:
    content = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    changed = change(header)
    text = changed if isinstance(changed, bytes) else json.dumps(header).encode()
    data = content[8 + length :]
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data + tail)


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "overlap": (lambda h: h[_KEY].update(data_offsets=[8, 264]), "overlap, or leave gaps"),
    "beyond": (lambda h: h[_KEY].update(data_offsets=[10**9, 10**9 + 256]), "overlap"),
    "negative": (lambda h: h[_KEY].update(data_offsets=[-256, 0]), "no two byte positions"),
    "huge shape": (lambda h: h[_KEY].update(shape=[2**40, 2**40]), "its shape is no list"),
    "float shape": (lambda h: h[_KEY].update(shape=[2.0, 32.0]), "its shape is no list"),
    "truth shape": (lambda h: h[_KEY].update(shape=[True, 32]), "its shape is no list"),
    "dimensions": (lambda h: h[_KEY].update(shape=[1] * 99), "its shape is no list"),
    "dtype": (lambda h: h[_KEY].update(dtype="I8"), "dtype is none of"),
    "dtype type": (lambda h: h[_KEY].update(dtype=["F32"]), "dtype is none of"),
    "entry": (lambda h: h.update({_KEY: 7}), "has not dtype, shape"),
    "list": (lambda h: b"[]", "must hold a JSON object"),
    "deep": (lambda h: b"[" * 200_000, "nested too deeply|cannot be read"),
    "digits": (lambda h: b'{"a":' + b"9" * 5000 + b"}", "cannot be read"),
    "nan": (lambda h: b'{"a":NaN}', "NaN is no JSON number"),
    "bytes": (lambda h: b"\xff\xfe{}", "cannot be read"),
    "twice": (
        lambda h: json.dumps(h).encode()[:-1] + b',"' + _KEY.encode() + b'":{}}',
        "a key is there twice",
    ),
    "name": (
        lambda h: h.update({"../../etc/passwd": h.pop(_KEY)}),
        "no tensors for model.layers.0.self_attn.q_proj.lora_A",
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers(case: str, saved: Path) -> None:
    change, message = HEADERS[case]
    _with_header(saved, change)
    refusal = _refusal(saved)
    assert any(part in refusal for part in message.split("|")), refusal


def test_lengths(saved: Path) -> None:
    content = (saved / WEIGHTS).read_bytes()
    for start in (2**63, len(content), safe_read.MOST_HEADER_BYTES + 1, 0):
        (saved / WEIGHTS).write_bytes(struct.pack("<Q", start) + content[8:])
        assert "no safetensors file, or cut short" in _refusal(saved)
    for cut in (b"", content[:5], content[:100]):
        (saved / WEIGHTS).write_bytes(cut)
        assert "no safetensors file, or cut short" in _refusal(saved)
    (saved / WEIGHTS).write_bytes(content + b"more")
    assert "its header asks for" in _refusal(saved)


def test_a_header_that_claims_much_is_refused_before_it_is_read(saved: Path) -> None:
    (saved / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 40))
    os.truncate(saved / WEIGHTS, 1 << 42)  # a sparse file of 4 TiB
    assert "at most" in _refusal(saved)


def test_large_tensors_are_refused_before_they_are_read(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safe_tensors, "_content", None)  # reading any would fail otherwise
    text = json.dumps({"x": {"dtype": "F32", "shape": [1 << 36], "data_offsets": [0, 1 << 38]}})
    (saved / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text.encode())
    os.truncate(saved / WEIGHTS, 8 + len(text) + (1 << 38))
    assert "no tensors for" in _refusal(saved)


def test_tensors_of_several_dtypes_where_no_element_begins(tmp_path: Path) -> None:
    """Three runs, the last of them at an odd element: read as they are, and looked at each."""
    file = tmp_path / "mixed.safetensors"
    torch.manual_seed(0)
    sizes = {"a": ("BF16", (3,)), "b": ("F32", (2, 5)), "c": ("BF16", ()), "d": ("F64", (0, 4))}
    tensors = {k: torch.randn(s).to(safe_read._DTYPES[d]) for k, (d, s) in sizes.items()}

    def write() -> safe_read.Header:
        header, content = {}, b""
        for key, (dtype, shape) in sizes.items():
            own = tensors[key].reshape(-1).view(torch.uint8).numpy().tobytes()
            offsets = [len(content), len(content) + len(own)]
            header[key] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
            content += own
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + content)
        return safe_read.read_header(file)

    found = safe_tensors.read_tensors(file, write())
    assert all(torch.equal(found[key], one) for key, one in tensors.items())
    for key, bad in (("a", torch.nan), ("b", -torch.inf), ("c", torch.inf)):
        tensors[key].view(-1)[-1], before = bad, tensors[key].view(-1)[-1].clone()
        with pytest.raises(AdapterError, match=f"{key} holds NaN or infinite values"):
            safe_tensors.read_tensors(file, write())
        tensors[key].view(-1)[-1] = before
    header = write()
    for changed in (file.read_bytes() + b"\0", file.read_bytes().replace(b'"a"', b'"e"')):
        file.write_bytes(changed)
        with pytest.raises(AdapterError, match="changed while it was read"):
            safe_tensors.read_tensors(file, header)
    tensors["b"][1, 1] = -9.0
    assert len(safe_tensors.read_tensors(file, write(), most=9.0)) == 4
    with pytest.raises(AdapterError, match="b holds NaN, or values above 8"):
        safe_tensors.read_tensors(file, write(), most=8.0)


def test_nothing_is_hidden_behind_a_tensor_of_no_bytes(tmp_path: Path) -> None:
    """Which begins where another does, and ends there."""
    file = tmp_path / "x"
    header = {
        "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "none": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},
    }
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + struct.pack("<f", float("nan")))
    with pytest.raises(AdapterError, match="a holds NaN"):
        safe_tensors.read_tensors(file, safe_read.read_header(file))


def test_values_are_limited_times_the_scale(saved: Path) -> None:
    found = read_deltas(tiny_model("llama"), saved)
    scale = next(iter(found.values())).scale
    assert scale > 1
    largest = scale * max(float(m.abs().max()) for d in found.values() for m in d[:2])
    assert len(read_deltas(tiny_model("llama"), saved, most=1.001 * largest)) == len(found)
    with pytest.raises(AdapterError, match="or values above"):
        read_deltas(tiny_model("llama"), saved, most=0.999 * largest)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_links_and_what_is_no_file_are_refused(name: str, saved: Path) -> None:
    outside = saved.parent / "outside"
    (saved / name).rename(outside)
    (saved / name).symlink_to(outside)
    assert "symbolic link" in _refusal(saved)
    (saved / name).unlink()
    os.mkfifo(saved / name)
    assert "no plain file" in _refusal(saved)


class _Planted:
    def __reduce__(self) -> Any:
        return (os.mkdir, (os.environ["TUNEFORK_PLANTED"],))


def test_a_pickle_is_refused_by_name_and_not_read(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = saved.parent / "planted"
    monkeypatch.setenv("TUNEFORK_PLANTED", str(planted))
    pickled = pickle.dumps(_Planted())
    (saved / WEIGHTS).unlink()
    (saved / "adapter_model.bin").write_bytes(pickled)
    refusal = _refusal(saved)
    assert "adapter_model.bin: is a pickle" in refusal and "save_pretrained" in refusal
    (saved / WEIGHTS).write_bytes(pickled)  # under another's name
    assert "no safetensors file" in _refusal(saved)
    assert not planted.exists()


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "rank text": ({"r": "4"}, "r: Input should be a valid integer"),
    "rank truth": ({"r": True}, "r: Input should be a valid integer"),
    "rank huge": ({"r": 10**30}, "r: "),
    "alpha list": ({"lora_alpha": [1]}, "lora_alpha: "),
    "alpha negative": ({"lora_alpha": -1.0}, "lora_alpha: "),
    "targets number": ({"target_modules": 5}, "target_modules"),
    "targets nested": ({"target_modules": [["q_proj"]]}, "target_modules"),
    "targets huge": ({"target_modules": "a" * 5000}, "target_modules"),
    "pattern": ({"rank_pattern": {"q_proj": "x"}}, "rank_pattern.q_proj"),
    "dora": ({"use_dora": "yes"}, "use_dora"),
    "whole": ({"modules_to_save": "lm_head"}, "modules_to_save"),
    "rows": ({"trainable_token_indices": [2**40]}, "trainable_token_indices"),
    "rows far": ({"trainable_token_indices": [2**23]}, "it belongs to another base"),
    "rows twice": ({"trainable_token_indices": [3, 3]}, "an index twice"),
    "rows elsewhere": ({"trainable_token_indices": {"q_proj": [3]}}, "only the embedding"),
    "layers": ({"layers_to_transform": [-1]}, "layers_to_transform"),
    "layers regex": (
        {"layers_to_transform": [1], "layers_pattern": "(a+)+"},
        "plain names only",
    ),
    "regex": ({"target_modules": "(" * 1000}, "no regular expression"),
    "look-around": ({"target_modules": "(?=.*q_proj).*"}, "not supported"),
    "back reference": ({"target_modules": r"(.*)\1"}, "not supported"),
    "revision": ({"revision": 5}, "revision"),
    "base": ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path"),
    "unknown": ({"target_parameters": ["x"]}, "target_parameters=['x'] is not supported"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations(case: str, saved: Path) -> None:
    fields, message = CONFIGS[case]
    config = json.loads((saved / CONFIG).read_text()) | fields
    (saved / CONFIG).write_text(json.dumps(config))
    refusal = _refusal(saved)
    assert (message in refusal and CONFIG in refusal) or case == "rows far", refusal


@pytest.mark.parametrize(
    "expression",
    [
        "(.*)*" * 8 + "x",
        "(a|m|o|d|e|l|[.]|.)+" * 5 + "!",
        "(((((.*)*)*)*)*)*!",
        "((.?){900}){900}!",
    ],
)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern"])
def test_expressions_that_backtrack_for_ever_do_not(
    expression: str, field: str, saved: Path
) -> None:
    value: Any = {expression: 2} if field == "rank_pattern" else expression
    config = json.loads((saved / CONFIG).read_text()) | {field: value}
    (saved / CONFIG).write_text(json.dumps(config))
    start = time.thread_time()
    with contextlib.suppress(AdapterError):
        load_adapter(tiny_model("llama"), saved)
    assert time.thread_time() - start < 5.0


def test_a_configuration_is_small_and_says_where_its_base_is(saved: Path) -> None:
    text = (saved / CONFIG).read_text()
    (saved / CONFIG).write_text(text + " " * safe_read.MOST_JSON_BYTES)
    assert "are read as a configuration" in _refusal(saved)
    for base in ("../../secrets", "/models/../../etc", "a\0b"):
        (saved / CONFIG).write_text(
            json.dumps(json.loads(text) | {"base_model_name_or_path": base})
        )
        with pytest.raises(AdapterError, match="climbs out of a folder"):
            base_section(saved)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    assert "is no folder" in _refusal(tmp_path / "absent")
