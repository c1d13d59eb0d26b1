"""A model folder or an adapter as a GGUF file, and such a file read back.

Tensors pass through one at a time, so that memory stays that of the largest. Reading back serves
the proof: what is measured is what lies on the disk.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from tunefork.errors import ModelError
from tunefork.export.adapter import Adapter
from tunefork.export.gguf_layout import Layout
from tunefork.export.gguf_tokenizer import write_tokenizer

_TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_BLOCK = 32
"""Values that share a scale in Q8_0."""


def write_model(folder: Path, config: Any, tokenizer: Any, file: Path, *, kind: str) -> None:
    """Write the model in the Hugging Face `folder` to `file`, matrices as `kind` (of _TYPES).

    Vectors (norms, biases) stay fp32, as llama.cpp wants them. Raises ModelError.
    """
    layout = Layout(config)
    writer = _Writer(file, layout, name=folder.name)
    writer.out.add_type(gguf.GGUFType.MODEL)
    writer.out.add_file_type(_TYPES[kind][1])
    if kind == "q8_0":
        writer.out.add_quantization_version(gguf.GGML_QUANT_VERSION)
    layout.write_metadata(writer.out)
    write_tokenizer(writer.out, tokenizer, vocabulary=config.vocab_size)
    is_tied = config.tie_word_embeddings
    paths = [path for path, _ in _shapes(folder) if not (is_tied and path == "lm_head.weight")]
    shapes = dict(_shapes(folder))
    extra = layout.extra_tensors()
    for name, tensor in extra.items():
        writer.announce(name, tuple(tensor.shape), "f32")
    for path in paths:
        writer.announce(layout.name(path), shapes[path], kind)
    with writer:
        for tensor in extra.values():
            writer.write(tensor, "f32")
        for _, tensor in ((p, layout.to_gguf(p, t)) for p, t in _tensors(folder, paths)):
            writer.write(tensor, kind)


def write_lora(adapter: Adapter, config: Any, file: Path, *, kind: str) -> None:
    """Write `adapter` as llama.cpp's LoRA file, for a base of `config`.

    llama.cpp scales by adapter.lora.alpha / rank. B's rows are permuted with those of its base.
    """
    layout = Layout(config)
    writer = _Writer(file, layout, name="adapter")
    writer.out.add_type(gguf.GGUFType.ADAPTER)
    writer.out.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.out.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter.scale * adapter.rank)
    tensors = [
        (f"{layout.name(f'{path}.weight')}.lora_{which}", tensor)
        for path, (a_rd, b_or) in adapter.deltas.items()
        for which, tensor in (("a", a_rd), ("b", layout.to_gguf(path, b_or)))
    ]
    for name, tensor in tensors:
        writer.announce(name, tuple(tensor.shape), kind)
    with writer:
        for _, tensor in tensors:
            writer.write(tensor, kind)


def read_model(file: Path, config: Any, paths: list[str]) -> dict[str, Tensor]:
    """The fp32 tensors of `file` under the Hugging Face names `paths`, but for a tied head.

    Raises ModelError for one that the file lacks.
    """
    layout, stored = Layout(config), {t.name: t for t in gguf.GGUFReader(file).tensors}
    names = {path: layout.name(path) for path in paths}
    if config.tie_word_embeddings:
        names.pop("lm_head.weight", None)
    if missing := [path for path, name in names.items() if name not in stored]:
        raise ModelError(f"{file}: lacks {', '.join(missing[:3])}")
    return {path: layout.from_gguf(path, _read(stored[name])) for path, name in names.items()}


def read_lora(file: Path, config: Any, like: Adapter) -> Adapter:
    """The deltas of `file`, on the layers that `like` has."""
    layout, stored = Layout(config), {t.name: t for t in gguf.GGUFReader(file).tensors}
    deltas = {}
    for path in like.deltas:
        name = layout.name(f"{path}.weight")
        a_rd, b_or = (_read(stored[f"{name}.lora_{which}"]) for which in "ab")
        deltas[path] = (a_rd, layout.from_gguf(path, b_or))
    return Adapter(like.config, deltas)


class _Writer:
    """gguf's writer: every tensor announced first, then each written and let go."""

    def __init__(self, file: Path, layout: Layout, *, name: str) -> None:
        self.out = gguf.GGUFWriter(file, layout.arch)
        self.out.add_name(name)

    def announce(self, name: str, shape: tuple[int, ...], kind: str) -> None:
        as_type = _type_of(shape, kind)
        num_bytes = int(np.prod(gguf.quant_shape_to_byte_shape(shape, as_type)))
        stored = gguf.quant_shape_to_byte_shape(shape, as_type)
        dtype: Any = np.dtype(np.uint8)
        if as_type in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            dtype = np.dtype(np.float32 if as_type == gguf.GGMLQuantizationType.F32 else np.float16)
            self.out.add_tensor_info(name, shape, dtype, num_bytes)
            return
        self.out.add_tensor_info(name, stored, dtype, num_bytes, raw_dtype=as_type)

    def write(self, tensor: Tensor, kind: str) -> None:
        as_type = _type_of(tuple(tensor.shape), kind)
        values: NDArray[Any] = quantize(tensor.float().contiguous().numpy(), as_type)
        self.out.write_tensor_data(values)

    def __enter__(self) -> None:
        self.out.write_header_to_file()
        self.out.write_kv_data_to_file()
        self.out.write_ti_data_to_file()

    def __exit__(self, *_: object) -> None:
        self.out.close()


def _type_of(shape: tuple[int, ...], kind: str) -> Any:
    """What a tensor is stored as: vectors in fp32, rows that Q8_0 cannot cut into blocks in f16."""
    if len(shape) < 2:
        return gguf.GGMLQuantizationType.F32
    if kind == "q8_0" and shape[-1] % _BLOCK:
        return gguf.GGMLQuantizationType.F16
    return _TYPES[kind][0]


def _read(stored: Any) -> Tensor:
    return torch.from_numpy(np.array(dequantize(stored.data, stored.tensor_type), np.float32))


def _shapes(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    for file in _files(folder):
        with safe_open(file, "pt") as stored:
            for path in stored.keys():  # noqa: SIM118 (a safe_open is no dict)
                yield path, tuple(stored.get_slice(path).get_shape())


def _tensors(folder: Path, paths: list[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors named, in that order."""
    where = {path: file for file in _files(folder) for path in _keys(file)}
    for path in paths:
        with safe_open(where[path], "pt") as stored:
            yield path, stored.get_tensor(path)


def _keys(file: Path) -> list[str]:
    with safe_open(file, "pt") as stored:
        return list(stored.keys())


def _files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"gguf: {folder} holds no .safetensors file")
    return files
