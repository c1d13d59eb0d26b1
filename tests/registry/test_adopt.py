"""An adapter made elsewhere: what is recorded of it, and what is not adopted."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.folders import save_model
from tests.registry.conftest import LORA, trained
from tunefork.errors import AdapterError, IdentityError
from tunefork.model.fingerprint import identify
from tunefork.model.load import load_model
from tunefork.recipe import Method, ModelSection
from tunefork.registry.adopt import adopt
from tunefork.registry.opening import open_model
from tunefork.registry.peft_format import WEIGHTS, save_adapter
from tunefork.registry.provenance import FILE, read_provenance
from tunefork.registry.store import Store


@pytest.fixture
def section(base: Path) -> ModelSection:
    return ModelSection(id=str(base))


@pytest.fixture
def adapter(section: ModelSection, tmp_path: Path) -> Path:
    """An adapter without a record."""
    model = load_model(section, dtype=torch.float32, device=torch.device("cpu"))
    save_adapter(trained(model, Method.LORA), tmp_path / "adapter", LORA, base=section.id)
    return tmp_path / "adapter"


def _edit(adapter: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    tensors = load_file(adapter / WEIGHTS)
    save_file({name: change(name, t) for name, t in tensors.items()}, adapter / WEIGHTS)


def test_what_works_on_its_base_is_recorded(
    adapter: Path, section: ModelSection, capsys: pytest.CaptureFixture[str]
) -> None:
    open_model(str(adapter))
    assert f"tunefork adapters adopt {adapter}" in capsys.readouterr().err
    said: list[str] = []
    provenance = adopt(adapter, section, say=said.append)
    assert read_provenance(adapter) == provenance
    assert provenance.identity == identify(section)
    assert (provenance.method, provenance.recipe) == (None, None)
    assert len(said) == 1 and "changes the logits" in said[0]
    open_model(str(adapter))
    assert capsys.readouterr().err == ""
    assert adopt(adapter, section, say=said.append) == provenance  # once more: as it was


def test_prompts_may_be_given(adapter: Path, section: ModelSection) -> None:
    adopt(adapter, section, prompts=["the quick brown fox"], say=lambda _: None)
    with pytest.raises(AdapterError, match="prompts: give at least one"):
        adopt(adapter, section, prompts=[])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n, t: torch.zeros_like(t) if "lora_B" in n else t, "every lora_B is zero"),
        (lambda n, t: torch.zeros_like(t) if "lora_A" in n else t, "changes no logit"),
        (lambda n, t: t * 1e-9, "changes no logit .* where torch.float32 rounds by"),
        (lambda n, t: t * float("nan"), "NaN or infinite"),
        (lambda n, t: t * 1e30, "makes logits NaN or infinite"),
        (lambda n, t: t[:, :-1].contiguous() if "lora_A" in n else t, "has shape"),
    ],
)
def test_a_dead_or_broken_adapter_is_not_adopted(
    adapter: Path, section: ModelSection, change: Callable[[str, Tensor], Tensor], message: str
) -> None:
    _edit(adapter, change)
    with pytest.raises(AdapterError, match=message):
        adopt(adapter, section, say=lambda _: None)
    assert not (adapter / FILE).exists()


def test_a_weak_adapter_is_told_from_rounding(adapter: Path, section: ModelSection) -> None:
    _edit(adapter, lambda name, tensor: tensor * 0.1)
    adopt(adapter, section, say=lambda _: None)


def test_what_records_another_base_is_not_adopted_again(
    adapter: Path, section: ModelSection, tmp_path: Path
) -> None:
    adopt(adapter, section, say=lambda _: None)
    save_model(tmp_path / "other", seed=1)
    with pytest.raises(IdentityError, match=r"adapter: does not belong to .*other"):
        adopt(adapter, ModelSection(id=str(tmp_path / "other")))


def test_a_tokenizer_that_renders_otherwise_is_not_adopted(
    adapter: Path, section: ModelSection, base: Path
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (adapter / name).write_bytes((base / name).read_bytes())
    template = (base / "chat_template.jinja").read_text()
    (adapter / "chat_template.jinja").write_text(template.replace("Be helpful", "Be kind"))
    with pytest.raises(IdentityError, match="render other ids"):
        adopt(adapter, section)
    assert not (adapter / FILE).exists()


def test_what_lies_in_the_store_is_not_written_to(adapter: Path, section: ModelSection) -> None:
    with Store.open() as store:
        folder = store.publish(adapter, "some/name").folder()
    with pytest.raises(AdapterError, match="lies in the store"):
        adopt(folder, section)
    assert not (folder / FILE).exists()
