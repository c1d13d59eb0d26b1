"""`tunefork export`: what was trained, in the form that another program reads.

Whatever the form, the order is one: load what was trained and let it read real prompts; write the
artefact beside its place; read it back from the disk; hold it against the first; publish or mark as
failed. The gate is the same for a rounding as for a conversion.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors.torch import save_file

from tunefork.errors import AdapterError, BadInputError, RunFolderError
from tunefork.export import servers
from tunefork.export.adapter import Adapter, pad_rank, read_adapter, write_adapter
from tunefork.export.card import write_card
from tunefork.export.gguf_file import read_lora, read_model, write_lora, write_model
from tunefork.export.merge import (
    Subject,
    load_folder,
    load_reference,
    open_subject,
    prove_merged,
    write_merged,
)
from tunefork.export.ollama import modelfile, recognise
from tunefork.export.origin import write_origin
from tunefork.export.proof import Agreement, Gate, Proof
from tunefork.export.publish import publish, staged
from tunefork.model.load import find, load_config
from tunefork.recipe import ModelSection, Recipe
from tunefork.registry.peft_format import CONFIG, WEIGHTS
from tunefork.registry.safe_read import read_header, read_json
from tunefork.registry.safe_tensors import read_tensors

Form = Literal["peft", "merged", "gguf", "gguf-lora", "ollama", "vllm", "sglang"]
FORMS: tuple[Form, ...] = get_args(Form)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_ON_ORIGINAL = ", over the original base as it will be run"
"""Of a QLoRA adapter: the client's base is not the one in NF4 that it was trained on."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a form may be asked for; None is its default. Refused where it means nothing."""

    dtype: str | None = None
    """peft, vllm, sglang: fp32 (as saved), bf16 or fp16."""
    kind: str | None = None
    """gguf, gguf-lora, ollama: f32, f16 (default), bf16 or q8_0."""
    pad_rank: int | None = None
    """peft, vllm, sglang: the rank to pad to with zeros; 0 is the server's next step."""
    with_adapter: bool = False
    """ollama: the base and the adapter in two files instead of one merged."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What was made."""

    proof: Proof
    command: str
    """Runs it."""
    notes: tuple[str, ...] = ()


def export(
    target: str,
    form: Form,
    out: Path,
    *,
    options: Options,
    gate: Gate,
    recipe: Recipe | None = None,
) -> Exported:
    """Write `target` as `form` to the folder `out`, with its card and proof.

    Raises BadInputError for what cannot be exported so, ExportFailedError where the proof fails.
    """
    _check_options(form, options)
    with staged(out) as folder:
        subject = open_subject(target, gate, recipe)
        made = _MAKERS[form](subject, folder, form, options, out)
        kind = "gguf" if form in ("gguf", "gguf-lora", "ollama") else "peft"
        kind = "merged" if form == "merged" else kind
        whole = subject.tokenizer if form == "merged" else None
        write_origin(folder, subject.parts, whole=whole)
        write_card(folder, subject.parts, target, kind=kind, proof=made.proof)
        publish(folder, out, made.proof)
    return made


def _merged(subject: Subject, folder: Path, form: Form, options: Options, out: Path) -> Exported:
    return Exported(prove_merged(subject, folder), f"tunefork chat {out}")


def _peft(subject: Subject, folder: Path, form: Form, options: Options, out: Path) -> Exported:
    if form == "peft" and options.pad_rank is None:
        return _peft_as_it_is(subject, folder, options, out)
    if form != "peft":  # asked first: these say more than that a key cannot be rearranged
        _check_server(subject, form)
    adapter, notes = _adapter_of(subject, form), list[str]()
    if form == "vllm" or form == "sglang":
        plain = servers.plain_scale(adapter.config, form)
        if plain is not adapter.config:
            notes.append("rsLoRA's scale was written as a plain lora_alpha, which the server reads")
        adapter = replace(adapter, config=plain)
    if options.pad_rank is not None:
        rank = options.pad_rank or _next_step(adapter.rank, form)
        adapter = pad_rank(adapter, rank)
        notes.append(f"padded with zeros to rank {rank}")
    write_adapter(adapter, folder, dtype=_DTYPES[options.dtype] if options.dtype else None)
    subject.tokenizer.save_pretrained(folder)
    as_run = subject.parts if form == "peft" else replace(subject.parts, is_nf4=False)
    model = load_reference(replace(as_run, adapter=folder))
    where = "" if as_run.is_nf4 == subject.parts.is_nf4 else _ON_ORIGINAL
    proof = subject.reference.prove(model, name=f"the adapter as exported for {form}{where}")
    base = find(subject.parts.section).location
    if form == "vllm" or form == "sglang":
        run = servers.command(form, base=base, adapter=out.name, folder=str(out), rank=adapter.rank)
    else:
        run = f"tunefork chat {out}"
    return Exported(proof, run, tuple(notes))


def _peft_as_it_is(subject: Subject, folder: Path, options: Options, out: Path) -> Exported:
    """Every tensor under its own key, whatever it is: DoRA, trained rows, modules saved whole."""
    adapter = _adapter_folder(subject, "peft")
    file = adapter / WEIGHTS
    dtype = _DTYPES[options.dtype] if options.dtype else None
    tensors = read_tensors(file, read_header(file))
    save_file(
        {key: tensor.to(dtype or tensor.dtype).contiguous() for key, tensor in tensors.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    shutil.copyfile(adapter / CONFIG, folder / CONFIG)
    subject.tokenizer.save_pretrained(folder)
    model = load_reference(replace(subject.parts, adapter=folder))
    proof = subject.reference.prove(model, name="the adapter as exported for peft")
    return Exported(proof, f"tunefork chat {out}")


def _check_server(subject: Subject, form: Form) -> None:
    config = read_json(_adapter_folder(subject, form) / CONFIG)
    assert form == "vllm" or form == "sglang"
    if found := servers.complaints(config, form):
        raise AdapterError(f"{subject.target}: {'; '.join(found)}")


def _gguf(subject: Subject, folder: Path, form: Form, options: Options, out: Path) -> Exported:
    kind = options.kind or "f16"
    if form == "ollama":
        recognise(subject.tokenizer)  # refused before hours of writing
    merged = folder / "merged"
    whole, name, others = _whole_folder(subject, merged)
    config = load_config(ModelSection(id=str(whole)))
    file = folder / f"model-{kind}.gguf"
    write_model(whole, config, subject.tokenizer, file, kind=kind)
    model = load_folder(whole)
    paths = list(model.state_dict())
    model.load_state_dict(read_model(file, config, paths), strict=False)
    model.tie_weights()
    proof = subject.reference.prove(model, name=f"{name}, as GGUF ({kind})", alternatives=others)
    if merged.exists():
        shutil.rmtree(merged)
    if form == "ollama":
        text = modelfile(subject.tokenizer, gguf=file.name)
        (folder / "Modelfile").write_text(text, encoding="utf-8")
        return Exported(proof, _ollama_command(out))
    return Exported(proof, f"llama-server -m {out / file.name} --jinja")


def _gguf_lora(subject: Subject, folder: Path, form: Form, options: Options, out: Path) -> Exported:
    kind = options.kind or "f16"
    adapter = _adapter_of(subject, form)
    if form == "ollama":
        recognise(subject.tokenizer)
    config = load_config(subject.parts.section)
    file = folder / f"lora-{kind}.gguf"
    write_lora(adapter, config, file, kind=kind)
    back = folder / "back"
    write_adapter(read_lora(file, config, adapter), back)
    model = load_reference(replace(subject.parts, adapter=back, is_nf4=False))
    shutil.rmtree(back)
    where = _ON_ORIGINAL if subject.parts.is_nf4 else ""
    proof = subject.reference.prove(model, name=f"the adapter as GGUF ({kind}){where}")
    base = folder / f"base-{kind}.gguf"
    source = Path(find(subject.parts.section).location)
    notes = []
    if source.is_dir():
        write_model(source, config, subject.tokenizer, base, kind=kind)
    elif form == "ollama":
        raise RunFolderError(f"ollama: {subject.parts.section.id} is not in a local folder")
    else:
        notes.append("the base is not in a local folder, so that no base GGUF was written")
    if form == "ollama":
        text = modelfile(subject.tokenizer, gguf=base.name, adapter=file.name)
        (folder / "Modelfile").write_text(text, encoding="utf-8")
        return Exported(proof, _ollama_command(out), tuple(notes))
    run = f"llama-server -m {out / base.name} --lora {out / file.name} --jinja"
    return Exported(proof, run, tuple(notes))


def _ollama(subject: Subject, folder: Path, form: Form, options: Options, out: Path) -> Exported:
    maker = _gguf_lora if options.with_adapter else _gguf
    return maker(subject, folder, form, options, out)


_Maker = Callable[[Subject, Path, Form, Options, Path], Exported]
_MAKERS: dict[Form, _Maker] = {
    "peft": _peft,
    "merged": _merged,
    "gguf": _gguf,
    "gguf-lora": _gguf_lora,
    "ollama": _ollama,
    "vllm": _peft,
    "sglang": _peft,
}


def _check_options(form: Form, options: Options) -> None:
    if form not in FORMS:
        raise BadInputError(f"--to: {form} is none of {', '.join(FORMS)}")
    given = {
        "--dtype": (options.dtype, ("peft", "vllm", "sglang")),
        "--type": (options.kind, ("gguf", "gguf-lora", "ollama")),
        "--pad-rank": (options.pad_rank, ("peft", "vllm", "sglang")),
        "--with-adapter": (options.with_adapter or None, ("ollama",)),
    }
    for flag, (value, forms) in given.items():
        if value is not None and form not in forms:
            raise BadInputError(f"{flag}: means nothing for {form}, only for {', '.join(forms)}")
    if options.kind == "q8_0" and (form == "gguf-lora" or options.with_adapter):
        raise BadInputError("--type: a LoRA file is f32, f16 or bf16: it is small as it is")


def _adapter_of(subject: Subject, form: Form) -> Adapter:
    return read_adapter(_adapter_folder(subject, form))


def _adapter_folder(subject: Subject, form: Form) -> Path:
    if subject.parts.adapter is None:
        raise RunFolderError(
            f"{subject.target}: has no adapter, which {form} needs; use --to gguf, or serve its "
            "folder as it is"
        )
    return subject.parts.adapter


def _next_step(rank: int, form: Form) -> int:
    return servers.step_above(rank, "sglang" if form == "sglang" else "vllm")


def _whole_folder(subject: Subject, merged: Path) -> tuple[Path, str, dict[str, Agreement]]:
    """A model folder, what it is, other ways: full fine-tuning's own, or the adapter's, merged."""
    if subject.parts.adapter is not None:
        merged.mkdir()
        return merged, *write_merged(subject, merged)
    return Path(find(subject.parts.section).location), "the model", {}


def _ollama_command(out: Path) -> str:
    return f"cd {out} && ollama create {out.name.lower()} && ollama run {out.name.lower()}"
