"""Weights count by name, shape and value, not by container; damaged files are refused by name."""

import json
import os
import tracemalloc
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save_file
from torch import Tensor

import tunefork.model.fingerprint_weights as weights
import tunefork.model.weight_files as weight_files_module
from tests.tiny import tiny_model
from tunefork.errors import ModelError
from tunefork.model.fingerprint_weights import read_header, weights_sha256
from tunefork.model.weight_files import INDEX, SINGLE, Located, find_files, weight_files
from tunefork.recipe import ModelSection

Tensors = dict[str, Tensor]

TIED = {"head": "embed"}


@pytest.fixture
def tensors() -> Tensors:
    """Values that bf16, fp16 and fp32 all hold exactly, of odd shapes."""
    torch.manual_seed(0)
    shapes = {"embed": (7, 5), "a.weight": (3, 11), "b.weight": (3, 11), "scalar": (), "no": (0, 4)}
    return {n: torch.randint(-128, 128, shape) / 64 for n, shape in shapes.items()}


def _digest(tensors: Tensors, folder: Path, aliases: dict[str, str] | None = None) -> str:
    file = folder / "some.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return weights_sha256([file], TIED if aliases is None else aliases, "model")


# What counts and what does not


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_that_holds_a_value_does_not_count(
    tensors: Tensors, tmp_path: Path, dtype: torch.dtype
) -> None:
    narrow = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    assert _digest(narrow, tmp_path) == _digest(tensors, tmp_path)


def test_fp16_values_that_bf16_cannot_hold_are_those_of_fp32(tmp_path: Path) -> None:
    half = torch.tensor([1 + 2**-10, 6e-8, -65504.0], dtype=torch.float16)
    assert _digest({"a": half}, tmp_path) == _digest({"a": half.float()}, tmp_path)
    assert _digest({"a": half}, tmp_path) != _digest({"a": half.bfloat16()}, tmp_path)


def test_fp8_values_are_those_of_bf16(tmp_path: Path) -> None:
    eighth = torch.tensor([0.5, -1.75, 240.0]).to(torch.float8_e4m3fn)
    assert _digest({"a": eighth}, tmp_path) == _digest({"a": eighth.bfloat16()}, tmp_path)


@pytest.mark.parametrize("chunk", [1, 4, 1 << 20])
def test_chunks_are_part_of_the_definition_and_containers_are_not(
    tensors: Tensors, tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors["a.weight"][0, 0] = 1 + 2**-20  # one chunk of fp32 among those of bf16
    monkeypatch.setattr(weights, "_CHUNK", chunk)
    monkeypatch.setattr(weights, "_PIECE", 3 * chunk)
    whole = _digest(tensors, tmp_path)
    wide = {**tensors, "b.weight": tensors["b.weight"].bfloat16()}
    assert _digest(wide, tmp_path) == whole
    tensors["a.weight"][0, 0] = 1
    assert _digest(tensors, tmp_path) != whole


def test_shards_and_their_order_do_not_count(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="8KB")
    files = [sorted((tmp_path / name).glob("*.safetensors")) for name in ("one", "many")]
    assert [len(files[0]), len(files[1]) > 2] == [1, True]
    one, many = (weights_sha256(each, {}, "model") for each in files)
    assert one == many == weights_sha256(files[1][::-1], {}, "model")


def test_a_tied_head_counts_once(tensors: Tensors, tmp_path: Path) -> None:
    alone = _digest(tensors, tmp_path)
    twice = tensors | {"head": tensors["embed"].clone()}
    assert _digest(twice, tmp_path) == alone
    only_head = {n: t for n, t in twice.items() if n != "embed"}
    assert _digest(only_head, tmp_path) == alone
    assert _digest(twice, tmp_path, {}) != alone  # not tied: a weight more
    assert _digest(twice | {"head": tensors["embed"] + 1}, tmp_path) != alone


def test_each_value_name_and_shape_counts(tensors: Tensors, tmp_path: Path) -> None:
    a, b = tensors["a.weight"], tensors["b.weight"]
    nudged = a.clone()
    nudged[2, 10] = torch.nextafter(a[2, 10], torch.tensor(9.0))
    zero, minus = torch.zeros(3, 11), torch.zeros(3, 11)
    minus[1, 1] = -0.0
    variants: list[Tensors] = [
        {},
        {"a.weight": nudged},
        {"a.weight": b, "b.weight": a},
        {"a.weight": a.reshape(11, 3)},
        {"c.weight": a.clone()},
        {"a.weight": zero},
        {"a.weight": minus},
        {"a.weight": a.double()},
        {"a.weight": zero.int()},
    ]
    digests = {_digest(tensors | change, tmp_path) for change in variants}
    assert len(digests) == len(variants)


def test_every_nan_is_one(tmp_path: Path) -> None:
    payloads = torch.tensor([0x7FC00000, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    digest = _digest({"a": payloads}, tmp_path)
    assert digest == _digest({"a": torch.full((3,), float("nan"))}, tmp_path)
    assert digest == _digest({"a": torch.full((3,), float("nan")).bfloat16()}, tmp_path)
    assert digest != _digest({"a": torch.full((3,), float("inf"))}, tmp_path)


def test_no_tensor_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    file = tmp_path / "some.safetensors"
    save_file({"a": torch.full((1 << 24,), 1.1)}, file)
    tracemalloc.start()
    weights_sha256([file], {}, "model")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < file.stat().st_size / 3


# Files


def _local(folder: Path) -> Located:
    return Located("model.id: m", folder, None)


def _write_index(folder: Path, *names: str) -> None:
    weight_map = {f"tensor.{n}": name for n, name in enumerate(names)}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_the_files_that_loading_reads_are_found(tensors: Tensors, tmp_path: Path) -> None:
    for name in ("b.safetensors", "a.safetensors", "consolidated.safetensors"):
        save_file(tensors, tmp_path / name)
    _write_index(tmp_path, "b.safetensors", "a.safetensors", "b.safetensors")
    assert [f.name for f in weight_files(_local(tmp_path))] == ["a.safetensors", "b.safetensors"]
    save_file(tensors, tmp_path / SINGLE)  # which transformers prefers
    assert [f.name for f in weight_files(_local(tmp_path))] == [SINGLE]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickle_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match=rf"in pickle \({name}\).*save_pretrained"):
        weight_files(_local(tmp_path))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("gone.safetensors",), "gone.safetensors, which .* names, is missing"),
        (("../x.safetensors",), "names '../x.safetensors', which is no safetensors file beside it"),
        (("/etc/x.safetensors",), "no safetensors file beside it"),
        (("x.bin",), "no safetensors file beside it"),
        ((), "has neither model.safetensors nor"),
    ],
)
def test_an_index_that_leads_nowhere_is_refused(
    tmp_path: Path, names: tuple[str, ...], message: str
) -> None:
    _write_index(tmp_path, *names)
    with pytest.raises(ModelError, match=message):
        weight_files(_local(tmp_path))


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": {"a": 1}}', "no json"])
def test_a_damaged_index_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ModelError, match="model.id: m cannot be read"):
        weight_files(_local(tmp_path))


def test_a_damaged_file_is_refused(tensors: Tensors, tmp_path: Path) -> None:
    file = tmp_path / "some.safetensors"
    save_file(tensors, file)
    whole = file.read_bytes()
    for content in (whole[:-1], whole[:20], b"", b"\xff" * 64):
        file.write_bytes(content)
        with pytest.raises(ModelError, match="model.id: m cannot be read"):
            weights_sha256([file], {}, "model.id: m")


def test_a_tensor_in_two_files_is_refused(tensors: Tensors, tmp_path: Path) -> None:
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        save_file({"embed": tensors["embed"]}, file)
    with pytest.raises(ModelError, match=r"b\.safetensors holds embed, as another file does"):
        weights_sha256(files, {}, "model")


def test_a_header_says_where_values_lie(tensors: Tensors, tmp_path: Path) -> None:
    file = tmp_path / "some.safetensors"
    save_file(tensors, file)
    found = next(stored for stored in read_header(file) if stored.name == "embed")
    assert (found.dtype, found.shape) == ("F32", (7, 5))
    raw = file.read_bytes()[found.start : found.start + 7 * 5 * 4]
    assert torch.equal(
        torch.frombuffer(bytearray(raw), dtype=torch.float32).view(7, 5), tensors["embed"]
    )


def test_of_a_hub_model_only_what_loading_needs_is_fetched(
    tensors: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    for name in ("a.safetensors", "b.safetensors", "consolidated.safetensors"):
        save_file(tensors, snapshot / name)
    (snapshot / "pytorch_model.bin").write_bytes(b"")
    _write_index(snapshot, "a.safetensors", "b.safetensors")
    asked: list[tuple[str, str]] = []

    def download(repository: str, name: str, *, revision: str) -> str:
        asked.append((name, revision))
        if not (snapshot / name).exists():
            raise EntryNotFoundError(name)
        return str(snapshot / name)

    monkeypatch.setattr(weight_files_module, "hf_hub_download", download)
    located = find_files(ModelSection(id="owner/name", revision="v1"))
    assert (located.folder, located.repository) == (snapshot, "owner/name")
    assert len(weight_files(located)) == 2
    assert asked[0] == ("config.json", "v1")
    names = [SINGLE, INDEX, "a.safetensors", "b.safetensors"]
    assert asked[1:] == [(name, "c0ffee") for name in names]
