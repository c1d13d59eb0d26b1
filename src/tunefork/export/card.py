"""The model card: a README.md that says what an artefact is, in the Hugging Face hub's form.

The YAML at its head is what the hub reads (base_model, license, library_name, tags); the text below
says what an engineer asks: from what it was made, how, with which measured result, and how far that
result can be trusted. What is not known is said to be unknown rather than left out.
"""

import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from tunefork.errors import ModelError
from tunefork.export.origin import origin_of
from tunefork.export.proof import Proof
from tunefork.model.load import find
from tunefork.model.packaged import PACKAGED
from tunefork.recipe import Method, ModelSection, Recipe
from tunefork.recipe_file import load_of_run
from tunefork.registry.opening import Parts
from tunefork.registry.provenance import Provenance
from tunefork.registry.run import RECIPE, RunRecord, read_record

CARD = "README.md"
_LIBRARY = {"peft": "peft", "gguf": "gguf", "merged": "transformers"}
_WHAT = {
    "peft": "A LoRA adapter in the PEFT format",
    "merged": "A language model with its fine-tuning in its weights",
    "gguf": "A GGUF file for llama.cpp and what is built on it",
}


def write_card(
    folder: Path, parts: Parts, target: str, *, kind: str, proof: Proof | None = None
) -> None:
    """Write README.md to `folder`; `kind` is peft, merged or gguf."""
    record = read_record(parts.run) if parts.run is not None else None
    text = render(parts, Path(target).name, kind=kind, record=record, proof=proof)
    (folder / CARD).write_text(text, encoding="utf-8")


def render(
    parts: Parts, name: str, *, kind: str, record: RunRecord | None, proof: Proof | None
) -> str:
    """The card's text."""
    base = _base_of(parts, record)
    origin = origin_of(parts)
    method = record.method if record else origin.method if origin else None
    metrics = record.metrics if record else origin.metrics if origin else {}
    head: dict[str, Any] = {
        "base_model": base,
        "base_model_relation": "adapter" if kind == "peft" else "finetune",
        "library_name": _LIBRARY[kind],
        "pipeline_tag": "text-generation",
        "tags": ["tunefork", *([str(method)] if method else [])],
    }
    licence = licence_of(ModelSection(id=base) if record else parts.section)
    if licence is not None:
        head["license"] = licence
    sections = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {name}",
        f"{_WHAT[kind]}, made with tunefork.",
        _origin(parts, base, licence, record, origin),
        _measured(metrics, record),
        _proven(proof),
        _limits(record, method, kind, proof),
        _recipe(parts, origin),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def licence_of(section: ModelSection) -> str | None:
    """The base's licence as its package, card or configuration says; None where none does."""
    if section.id in PACKAGED:
        return PACKAGED[section.id].note.partition(";")[0].lower()
    try:
        folder = Path(find(section).location)
    except ModelError:
        return None
    card = folder / CARD
    if card.is_file() and (text := _head(card)).startswith("---\n"):
        try:
            head = yaml.safe_load(text[4:].partition("\n---")[0])
        except yaml.YAMLError:
            head = None
        if isinstance(head, dict) and isinstance(head.get("license"), str):
            return str(head["license"])
    config = folder / "config.json"
    if config.is_file():
        found = json.loads(config.read_text(encoding="utf-8")).get("license")
        return found if isinstance(found, str) else None
    return None


def _head(card: Path) -> str:
    """The part of a stranger's card that holds its YAML."""
    with card.open("rb") as stream:
        return stream.read(1 << 16).decode("utf-8", errors="replace")


def _base_of(parts: Parts, record: RunRecord | None) -> str:
    return parts.section.id if record is None else record.model_id


def _origin(
    parts: Parts,
    base: str,
    licence: str | None,
    record: RunRecord | None,
    origin: Provenance | None,
) -> str:
    lines = [
        f"- Base: `{base}`" + (f" at revision `{r}`" if (r := parts.section.revision) else ""),
        f"- Licence of the base: {licence or 'not known; look it up before you pass this on'}",
    ]
    if origin is not None:
        lines.insert(1, f"- The base's weights: sha256 `{origin.identity.weights_sha256}`")
    if record is None and origin is not None and origin.method is not None:
        made_from = [f"- Made from: {origin.parent}"] if origin.parent else []
        lines += [
            f"- Method: {origin.method}",
            *made_from,
            f"- Data: sha256 `{origin.data_sha256 or 'not recorded'}` (of the token ids)",
            f"- Made {origin.created}, with " + _listed(origin.versions),
        ]
    elif record is None:
        lines.append("- Trained elsewhere: nothing more is known")
    if record is None:
        return "## Origin\n\n" + "\n".join(lines)
    lines += [
        f"- Method: {record.method}, seed {record.seed}, {record.num_steps} steps, "
        f"{record.tokens:,} tokens, peak learning rate {record.learning_rate:g}",
        f"- Data: sha256 `{_data_hash(parts) or 'not recorded'}` (of the token ids)",
        f"- Trained on {record.device['name']}, {record.created}, with " + _listed(record.versions),
    ]
    return "## Origin\n\n" + "\n".join(lines)


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _data_hash(parts: Parts) -> str | None:
    for folder in (parts.run, *(parts.run.parents[:2] if parts.run else ())):
        if folder is not None and (folder / "claim.json").is_file():
            claim = json.loads((folder / "claim.json").read_text(encoding="utf-8"))
            return str(claim.get("data_sha256")) if claim.get("data_sha256") else None
    return None


def _measured(metrics: dict[str, tuple[float, float, float]], record: RunRecord | None) -> str:
    if not metrics:
        return "## Measured\n\nNothing was measured on held-out examples."
    rows = [
        f"| {name} | {value:.4g} | {low:.4g} to {high:.4g} |"
        for name, (value, low, high) in metrics.items()
    ]
    text = "## Measured\n\n| metric | value | 95 % interval |\n|---|---|---|\n" + "\n".join(rows)
    if record is not None and record.majority_share is not None:
        text += f"\n\nAlways giving the most frequent label: {record.majority_share:.4g}."
    if "forgetting_loss" in metrics:
        text += (
            "\n\n`forgetting_loss` is the loss on general text that is not the training domain; "
            "hold it against the base's."
        )
    return text


def _proven(proof: Proof | None) -> str:
    if proof is None:
        return ""
    found = proof.agreement
    lines = [
        f"{proof.exported} against {proof.reference}, on {found.num_tokens:,} tokens of "
        f"{proof.prompts}:",
        "",
        "| | mean KL, nats a token | largest KL | same likeliest token |",
        "|---|---|---|---|",
        f"| {proof.exported} | {found.mean_kl:.3g} | {found.max_kl:.3g} | {found.top1:.4f} |",
    ]
    for name, other in proof.alternatives.items():
        lines.append(
            f"| not taken: merged into {name} | {other.mean_kl:.3g} | {other.max_kl:.3g} | "
            f"{other.top1:.4f} |"
        )
    for task in proof.task:
        lines += ["", f"{task.name}: {task.reference:.4g} before, {task.exported:.4g} after."]
    return "## Proof of the export\n\n" + "\n".join(lines)


def _limits(record: RunRecord | None, method: Method | None, kind: str, proof: Proof | None) -> str:
    lines = ["- Figures hold for the evaluation data named here, and for no other."]
    if record is not None and record.status == "interrupted":
        lines.append("- Training was interrupted, and what it left was not evaluated.")
    if kind == "peft":
        lines.append("- An adapter belongs to this exact base, and to no other version of it.")
    if method is Method.QLORA and kind == "peft":
        lines.append("- It was trained over its base in NF4; over the original, answers differ.")
    if proof is None and record is None:
        lines.append("- No proof was made that this answers as any of what it was made from.")
    return "## Limits\n\n" + "\n".join(lines)


def _recipe(parts: Parts, origin: Provenance | None) -> str:
    recipe = _recipe_of(parts, origin)
    if recipe is None:
        return ""
    fields = recipe.model_dump(mode="json", exclude_defaults=True)
    fields.pop("compare", None)
    for field in ("train", "eval"):  # the folders of whoever trained it concern nobody
        if (where := fields["data"].get(field)) is not None and Path(where).is_absolute():
            fields["data"][field] = Path(where).name
    if Path(fields["model"]["id"]).is_absolute():
        fields["model"]["id"] = Path(fields["model"]["id"]).name
    return f"## Recipe\n\n```yaml\n{yaml.safe_dump(fields, sort_keys=False)}```"


def _recipe_of(parts: Parts, origin: Provenance | None) -> Recipe | None:
    for folder in (parts.run, *(parts.run.parents[:2] if parts.run else ())):
        if folder is not None and (folder / RECIPE).is_file():
            return load_of_run(folder / RECIPE)
    try:
        return Recipe.model_validate(origin.recipe) if origin and origin.recipe else None
    except ValidationError:  # of another version of tunefork
        return None
