"""The plan as a whole: sanity rows, what fits, what to change, what was measured."""

import re
from pathlib import Path
from typing import Any

import pytest

from tunefork.plan.batches import Work
from tunefork.plan.catalogue import load_catalogue
from tunefork.plan.device import target_of
from tunefork.plan.measured import Factor, Measurement, correction, recall, remember
from tunefork.plan.plan import plan_numbers
from tunefork.plan.schema import MethodPlan, Plan
from tunefork.recipe import CheckpointingChoice, FullSection, LoraSection, Method
from tunefork.train import precision

GB = 1e9


def _plan(
    params: float,
    gpus: list[str],
    length: int = 512,
    method: Method | None = None,
    tokens: int | None = None,
    has_details: bool = False,
    **full: Any,
) -> Plan:
    return plan_numbers(
        model=params,
        work=Work(1000, 1000 * length, 1000 * length, 1.0, length, 8),
        lora=LoraSection(),
        full=FullSection(**full),
        methods=tuple(Method) if method is None else (method,),
        machine=load_catalogue().machine(gpus),
        checkpointing="auto",
        micro_batch_tokens=tokens,
        has_details=has_details,
    )


def _of(plan: Plan, method: Method) -> MethodPlan:
    return plan.methods[method.value]


def test_full_mixed_precision_70b_never_fits_eight_80_gb_gpus() -> None:
    full = _of(_plan(70.55e9, ["h100"] * 8, method=Method.FULL, has_details=True), Method.FULL)
    states = full.phases["optimizer"].parts
    a_gpu = states["weights"] + states["gradients"] + states["optimizer"]
    assert 8 * a_gpu / GB == pytest.approx(1129, rel=0.01)  # 16 bytes a parameter
    assert not full.may_fit and full.margin_bytes < -50e9
    assert full.next_option is not None and "full.weights: bf16" in full.next_option


def test_full_8_bit_70b_fits_eight_80_gb_gpus_with_a_margin() -> None:
    plan = _plan(70.55e9, ["h100"] * 8, method=Method.FULL, weights="bf16", optimizer="adamw_8bit")
    full = _of(plan, Method.FULL)
    states = full.phases["optimizer"].parts
    a_gpu = states["weights"] + states["gradients"] + states["optimizer"]
    assert 8 * a_gpu / GB == pytest.approx(425, rel=0.01)  # 6 bytes a parameter and the scales
    assert full.fits and full.margin_bytes > 10e9
    assert any("shards" in note for note in plan.notes)


def test_full_70b_with_bf16_moments_just_fits_eight_80_gb_gpus() -> None:
    plan = _plan(70.55e9, ["h100"] * 8, method=Method.FULL, weights="bf16", optimizer="adamw_bf16")
    full = _of(plan, Method.FULL)
    states = full.phases["optimizer"].parts
    a_gpu = states["weights"] + states["gradients"] + states["optimizer"]
    assert 8 * a_gpu / GB == pytest.approx(564, rel=0.01)  # 8 bytes a parameter
    assert full.fits and 0.0 < full.margin_bytes < 6e9


def test_full_bf16_70b_with_fp32_moments_needs_more_than_eight_80_gb_gpus() -> None:
    plan = _plan(70.55e9, ["h100"] * 8, method=Method.FULL, has_details=True, weights="bf16")
    full = _of(plan, Method.FULL)
    states = full.phases["optimizer"].parts
    a_gpu = states["weights"] + states["gradients"] + states["optimizer"]
    assert 8 * a_gpu / GB == pytest.approx(847, rel=0.01)  # 12 bytes a parameter
    assert not full.may_fit
    assert full.next_option is not None and "full.optimizer: adamw_8bit" in full.next_option


def test_without_details_the_figures_are_the_same_and_nothing_else_is_looked_for() -> None:
    work = Work(1000, 512_000, 512_000, 1.0, 512, 8)
    plans = [
        plan_numbers(
            model=0.1345e9,
            work=work,
            lora=LoraSection(),
            full=FullSection(),
            methods=(Method.LORA,),
            machine=load_catalogue().machine(["l4"]),
            has_details=has_details,
        )
        for has_details in (True, False)
    ]
    whole, short = (_of(plan, Method.LORA) for plan in plans)
    assert whole.largest_length is not None and short.largest_length is None
    limits = ("largest_length", "largest_micro_batch_tokens")
    assert short == whole.model_copy(update=dict.fromkeys(limits))


def test_qlora_70b_fits_48_gb_at_a_short_sequence_and_not_24() -> None:
    for length in (128, 1024):  # at the high end of the interval
        plan = _plan(70.55e9, ["l40s"], length=length, method=Method.QLORA, tokens=length)
        qlora = _of(plan, Method.QLORA)
        assert qlora.fits and qlora.activation_checkpointing in ("full", "offload")
        assert qlora.peak_process_bytes.high / GB < 47.8
    assert not _of(_plan(70.55e9, ["rtx4090"], method=Method.QLORA), Method.QLORA).may_fit


def test_shorter_rows_or_one_larger_gpu_are_proposed_where_whole_rows_do_not_fit() -> None:
    plan = _plan(70.55e9, ["l40s"], length=4096, method=Method.QLORA, has_details=True)
    qlora = _of(plan, Method.QLORA)
    assert not qlora.fits and qlora.largest_length is not None
    length = qlora.largest_length // 64 * 64
    rows = f"train.micro_batch_tokens: {length} and data.max_length: {length}"
    assert qlora.next_option is not None and qlora.next_option.startswith(rows)
    # One that tunefork can use, although four small GPUs cost less.
    assert ", or with 1 x " in qlora.next_option


@pytest.mark.parametrize(
    ("gpu", "steps", "num_told"), [("h100", 100, 1), ("h100", 99, 0), ("l40s", 100, 0)]
)
def test_a_plan_in_bf16_says_that_auto_will_try_int8(
    gpu: str, steps: int, num_told: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = {"passed": True, "pays": True}
    pays = [verdict.model_copy(update=passed) for verdict in precision.verdicts()]
    lora_pays = tuple(verdict for verdict in pays if verdict.method is Method.LORA)
    monkeypatch.setattr(precision, "verdicts", lambda: lora_pays)
    plan = plan_numbers(
        model=0.1345e9,
        work=Work(8 * steps, 80 * steps, 80 * steps, 1.0, 10, 8),
        lora=LoraSection(),
        full=FullSection(),
        methods=(Method.LORA, Method.QLORA),
        machine=load_catalogue().machine([gpu]),
        precision="auto",
        compile="never",
        has_details=False,
    )
    assert sum("train.precision: auto" in note for note in plan.notes) == num_told


@pytest.mark.parametrize(
    ("gpu", "method", "is_told"),
    [("l40s", Method.QLORA, 1), ("l40s", Method.FULL, 0), ("h100", Method.QLORA, 0)],
)
def test_a_plan_in_int8_says_where_it_was_never_timed(
    gpu: str, method: Method, is_told: int
) -> None:
    plan = plan_numbers(
        model=0.1345e9,
        work=Work(80, 800, 800, 1.0, 10, 8),
        lora=LoraSection(),
        full=FullSection(),
        methods=(method,),
        machine=load_catalogue().machine([gpu]),
        precision="int8",
        compile="never",
        has_details=False,
    )
    assert sum("never timed" in note for note in plan.notes) == is_told


@pytest.mark.parametrize(("checkpointing", "is_told"), [("selective", 1), ("full", 0)])
def test_a_plan_for_another_machine_says_that_selective_is_its_compilers_choice(
    checkpointing: CheckpointingChoice, is_told: int
) -> None:
    plan = plan_numbers(
        model=0.1345e9,
        work=Work(80, 800, 800, 1.0, 10, 8),
        lora=LoraSection(),
        full=FullSection(),
        methods=(Method.LORA,),
        machine=load_catalogue().machine(["h200"]),
        checkpointing=checkpointing,
        compile="never",
        has_details=False,
    )
    assert sum("selective checkpointing" in note for note in plan.notes) == is_told


@pytest.mark.slow
def test_24_gb_hold_qlora_of_13b() -> None:
    plan = _plan(13.02e9, ["rtx4090"], length=1024, has_details=True)
    assert _of(plan, Method.QLORA).fits
    assert not _of(plan, Method.LORA).may_fit
    assert _of(plan, Method.LORA).next_option == "method: qlora"


def test_a_base_of_half_the_bytes_is_proposed_where_there_is_a_kernel_for_it() -> None:
    lora = _of(_plan(70.55e9, ["h100"], method=Method.LORA, has_details=True), Method.LORA)
    assert not lora.may_fit and lora.next_option == "train.precision: int8"


@pytest.mark.slow
def test_the_peak_is_the_highest_phase() -> None:
    for method in _plan(1.236e9, ["h200"]).methods.values():
        highest = max(phase.tensor_bytes for phase in method.phases.values())
        assert method.peak_tensor_bytes.mid == highest
        assert all(sum(p.parts.values()) == p.tensor_bytes for p in method.phases.values())
        low, mid, high = method.step_s_interval[0], method.step_s, method.step_s_interval[1]
        assert low < mid < high
        assert method.total_s == pytest.approx(125 * mid)


def test_the_largest_pass_fits_and_twice_that_does_not() -> None:
    machine = load_catalogue().machine(["rtx4090"])
    plan = _plan(13.02e9, ["rtx4090"], length=1024, method=Method.QLORA, has_details=True)
    small = _of(plan, Method.QLORA)
    assert small.largest_micro_batch_tokens is not None and small.largest_length is not None
    rows = small.largest_micro_batch_tokens // 1024

    def fits(rows: int) -> bool:
        plan = plan_numbers(
            model=13.02e9,
            work=Work(10**6, 1024 * 10**6, 1024 * 10**6, 1.0, 1024, rows),
            lora=LoraSection(),
            full=FullSection(),
            methods=(Method.QLORA,),
            machine=machine,
            checkpointing="auto",
            micro_batch_tokens=rows * 1024,
            has_details=False,
        )
        return _of(plan, Method.QLORA).fits

    assert fits(rows) and not fits(2 * rows)


def test_adapters_of_70b_are_under_a_gigabyte() -> None:
    for method, size in ((Method.LORA, 4 * 207_093_760), (Method.FULL, 141e9)):
        found = _of(_plan(70.55e9, ["b200"], method=method), method).artifact_bytes
        assert found == pytest.approx(size, rel=0.01 if method is Method.FULL else 0)


@pytest.mark.slow
def test_more_gpus_never_take_more_memory_each() -> None:
    one, eight = _plan(8.03e9, ["h100"]), _plan(8.03e9, ["h100"] * 8)
    for method in Method:
        assert (
            _of(eight, method).peak_tensor_bytes.mid
            <= 1.05 * _of(one, method).peak_tensor_bytes.mid
        )


def test_a_devices_own_runs_correct_its_plans() -> None:
    gpu = load_catalogue().machine(["l4"])
    before = target_of(gpu)
    runs = [
        Measurement(
            device="NVIDIA L4",
            case=f"a run {ratio}",
            date="2026-11-25",
            predicted_step_s=1.0,
            measured_step_s=ratio,
            predicted_process_bytes=1e9,
            measured_process_bytes=1.1e9,
        )
        for ratio in (1.9, 2.0, 2.1)
    ]
    for run in runs:  # predicted by other constants
        remember(run)
    assert target_of(gpu) == before
    for run in runs:
        remember(run.model_copy(update={"fit": before.fit.id}))
    after = target_of(gpu)
    assert after.trust.time_factor.ratio == 2.0
    assert after.trust.process_factor.ratio == pytest.approx(1.1)
    assert after.trust.time < before.trust.time
    assert after.trust.process_more < before.trust.process_more
    assert 0 < after.trust.process_more_bytes < before.trust.process_more_bytes
    assert "3 runs measured on this device" in after.note
    assert target_of(load_catalogue().machine(["l40s"])).trust.time_factor == Factor()


def test_a_small_run_says_little_of_a_large_one() -> None:
    """Of a toy, which takes 160 MB and 20 ms more than predicted, a third and two thirds."""
    toy = Measurement(
        device="NVIDIA L4",
        case="a toy",
        date="2026-11-25",
        predicted_step_s=0.03,
        measured_step_s=0.05,
        predicted_process_bytes=0.48e9,
        measured_process_bytes=0.64e9,
    )
    found = correction([toy])
    assert found.process.of(0.48e9) == pytest.approx(0.64e9)
    assert found.time.of(0.03) == pytest.approx(0.05)
    assert found.process.of(21e9) == pytest.approx(21.16e9)
    assert found.time.of(3.0) == pytest.approx(3.08)
    for factor in (Factor(1.3, 2.0), Factor(0.7, 2.0), Factor()):
        for raw in (1.0, 6.5, 100.0):
            assert factor.undone(factor.of(raw)) == pytest.approx(raw)


def test_a_line_of_another_version_is_passed_over(home: Path) -> None:
    (home / "measurements.jsonl").write_text('{"device": "x"}\nnot json\n')
    assert recall(lambda _: True) == []
    assert correction([]).time == Factor()


@pytest.mark.slow
def test_one_row_that_cannot_fit_is_not_said_to() -> None:
    plan = plan_numbers(
        model=8.03e9,
        work=Work(1000, 1000 * 100_000, 10**8, 1.0, 131_072, 1),
        lora=LoraSection(),
        full=FullSection(),
        methods=(Method.LORA,),
        machine=load_catalogue().machine(["l4"]),
    )
    lora = _of(plan, Method.LORA)
    assert not lora.may_fit and lora.largest_micro_batch_tokens is None
    shorter = r"train.micro_batch_tokens: (\d+) and data.max_length: \1 and "  # rows, not batches
    assert lora.next_option is not None and re.match(shorter, lora.next_option)


def test_alike_runs_count_once() -> None:
    def row(case: str, measured_s: float) -> Measurement:
        return Measurement(
            device="NVIDIA L4",
            case=case,
            date="2026-11-25",
            predicted_step_s=1.0,
            measured_step_s=measured_s,
            predicted_process_bytes=1.0,
            measured_process_bytes=1.0,
        )

    for measured_s in (1.0, 1.1, 3.0):
        remember(row("the same", measured_s))
    assert [r.measured_step_s for r in recall(lambda _: True)] == [3.0]
    assert correction(recall(lambda _: True)).time_error is None
