"""A GPU is found by the name that its driver gives it, and a fit by its device and software."""

from dataclasses import replace

import pytest

from tunefork.plan.catalogue import load_catalogue
from tunefork.plan.device import _is, target_of
from tunefork.plan.fits import Software, fit_for, load_fits

REPORTED = {
    "NVIDIA GeForce RTX 4090": ["rtx4090"],
    "NVIDIA A10G": ["a10g"],
    "NVIDIA L4": ["l4"],
    "NVIDIA L40S": ["l40s"],
    "NVIDIA A100-SXM4-40GB": ["a100-40"],
    "NVIDIA A100-SXM4-80GB": ["a100-80"],
    "NVIDIA H100 80GB HBM3": ["h100"],
    "NVIDIA H200": ["h200"],
    "NVIDIA B200": ["b200"],
    "NVIDIA T4": [],
}


@pytest.mark.parametrize("reported", REPORTED)
def test_a_drivers_name_finds_its_entry(reported: str) -> None:
    found = [gpu.id for gpu in load_catalogue().gpus if _is(gpu.name, reported)]
    assert found == REPORTED[reported]


def test_a_fit_is_found_by_device_then_torch_attention_and_quantiser() -> None:
    (base,) = (fit for fit in load_fits() if fit.device == "h200")
    fits = tuple(
        base.model_copy(update={"device": d, "torch": t, "attention": a, "quantizer": q, "runs": n})
        for n, (d, t, a, q) in enumerate(
            (
                ("h200", "2.11", "sdpa", "bitsandbytes 0.50"),
                ("h200", "2.13", "cudnn", "bitsandbytes 0.50"),
                ("h200", "2.13", "cudnn", "bitsandbytes 0.49"),
                ("b200", "2.9", "sdpa", "bitsandbytes 0.50"),
            )
        )
    )
    wanted = Software("2.13", "sdpa", "bitsandbytes 0.50")
    found = fit_for("h200", wanted, fits)
    assert (found.fit.runs, found.is_own) == (1, True), "the version of torch weighs most"
    assert found.differs == ("attention cudnn there, attention sdpa here",)
    exact = fit_for("h200", Software("2.11", "sdpa", "bitsandbytes 0.50"), fits)
    assert (exact.fit.runs, exact.differs) == (0, ())
    assert fit_for("b200", wanted, fits).fit.runs == 3, "the device weighs more than its software"
    other = fit_for("l4", wanted, fits)
    assert (other.fit.device, other.is_own) == ("h200", False)


def test_a_plan_says_that_its_fit_had_other_software(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = load_catalogue().machine(["h200"])
    (fit,) = (fit for fit in load_fits() if fit.device == "h200")
    same = Software(fit.torch, fit.attention, fit.quantizer)
    monkeypatch.setattr("tunefork.plan.device.installed", lambda _: same)
    assert "other software" not in target_of(machine).note
    newer = replace(same, torch="3.1")
    monkeypatch.setattr("tunefork.plan.device.installed", lambda _: newer)
    said = f"other software (torch {fit.torch} there, torch 3.1 here)"
    assert said in target_of(machine).note
