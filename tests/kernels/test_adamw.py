"""AdamW in bf16: its noise is noise, its rounding has no bias, and it follows AdamW in fp32."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tunefork.kernels import adamw
from tunefork.kernels.adamw import (
    Keys,
    adamw_bf16_,
    adamw_wide_,
    factors_of,
    key,
    keys_of,
    mix,
    noise,
    prepare,
    prepare_wide,
    rounded,
    update_bf16_,
    update_wide_,
    write_rounded_,
)

BETAS = (0.9, 0.999)


def _keys(weight: int = 1, step: int = 2) -> Keys:
    return key("w", weight), key("s", step)


def _factors(step: int, **changed: Any) -> list[float]:
    options = {"learning_rate": 1e-2, "weight_decay": 0.1, "gradient_scale": 1.0} | changed
    return factors_of(step, betas=BETAS, **options)


def test_mix_is_the_published_function() -> None:
    """Against arithmetic on whole numbers; sign and overflow included."""

    def published(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
        return x ^ (x >> 16)

    wanted = [0, 1, 2, 65_535, 2**31 - 1, 2**31, 2**32 - 1, 0xDEADBEEF]
    signed = [x - 2**32 if x >= 2**31 else x for x in wanted]
    found = mix(torch.tensor(signed, dtype=torch.int32)).tolist()
    assert [x % 2**32 for x in found] == [published(x) for x in wanted]


@pytest.mark.parametrize("which", ["low", "high", "mixed"])
def test_noise_is_uniform_and_neighbours_steps_and_weights_are_independent(which: str) -> None:
    count = 2**20

    def drawn(keys: Keys) -> Tensor:
        bits = noise(torch.empty(count), keys)
        if which == "mixed":
            bits = mix(bits)
        return ((bits >> 16 if which == "high" else bits) & 0xFFFF).double()

    values = drawn(_keys())
    bins = torch.histc(values, bins=256, min=0, max=65_536)
    expected = count / 256
    chi2 = float(((bins - expected) ** 2 / expected).sum())
    assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)
    others = [values[1:], values[64:], drawn(_keys(step=3)), drawn(_keys(weight=2))]
    for other in others:
        both = torch.stack([values[: len(other)], other])
        assert abs(float(torch.corrcoef(both)[0, 1])) < 5 / math.sqrt(count)


def test_the_streams_of_one_element_are_independent() -> None:
    bits = noise(torch.empty(2**20), _keys())
    streams = torch.stack([bits & 0xFFFF, (bits >> 16) & 0xFFFF, mix(bits) & 0xFFFF]).double()
    off_diagonal = torch.corrcoef(streams) - torch.eye(3)
    assert float(off_diagonal.abs().max()) < 5 / 2**10


def test_rounding_has_no_bias_and_goes_to_a_neighbour() -> None:
    for share in (0.001, 0.3, 0.9):
        wide = torch.full((2**20,), 1.0 + share * 2**-7)
        for sign in (1.0, -1.0):
            found = rounded(sign * wide, noise(wide, _keys()) & 0xFFFF).float() * sign
            assert set(found.unique().tolist()) == {1.0, 1.0 + 2**-7}
            error = 2**-7 * math.sqrt(share * (1 - share)) / 2**10
            assert float(found.double().mean()) == pytest.approx(float(wide[0]), abs=4 * error)


def test_what_bf16_holds_is_left_and_so_are_infinity_and_every_nan() -> None:
    most = torch.tensor(0xFFFF, dtype=torch.int32)
    exact = torch.tensor([0.0, -0.0, 1.5, -3.0, math.inf, -math.inf, 2.0**-130])
    found = rounded(exact, most)
    assert torch.equal(found.float().view(torch.int32), exact.view(torch.int32))
    # CUDA's NaN has all bits set: with any noise it would carry over into -0.0.
    nans = torch.tensor([2**31 - 1, 0x7FC00000, 0x7F800001, -1], dtype=torch.int32)
    assert rounded(nans.view(torch.float32), most).isnan().all()


def test_it_follows_adamw_in_fp32() -> None:
    """Over 200 steps, means of 64 x 64 elements that all have the same gradients."""
    torch.manual_seed(0)
    exact = torch.nn.Parameter(torch.full((64, 64), 0.7))
    reference = torch.optim.AdamW([exact], lr=1e-3, betas=BETAS, weight_decay=0.1)
    p = exact.detach().bfloat16()
    exact.data.copy_(p)
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for step in range(1, 201):
        gradient = torch.full_like(p, 0.3 + 0.2 * math.sin(step / 7))
        exact.grad = gradient.float() * 0.5
        reference.step()
        factors = _factors(step, learning_rate=1e-3, gradient_scale=0.5)
        update_bf16_(p, gradient, m, v, factors, _keys(step=step))
    state = reference.state[exact]
    for found, wanted in ((p, exact), (m, state["exp_avg"]), (v, state["exp_avg_sq"])):
        mean = float(wanted.detach().mean())
        assert float(found.double().mean()) == pytest.approx(mean, rel=3e-3)
        # A walk of 200 roundings, each at most between two values that are 1/128 apart.
        spread = float((found.double() / mean - 1).std())
        assert 0 < spread < math.sqrt(200) / 128 / 2
    nearest = torch.zeros_like(v)
    for _ in range(200):
        nearest.lerp_(torch.full_like(v, 0.0225), 0.001)
    assert float(nearest[0, 0]) < 0.8 * float(state["exp_avg_sq"].mean())  # what it is for


def test_one_step_is_adamws_to_one_bf16_value() -> None:
    torch.manual_seed(1)
    p = torch.randn(100, 3).bfloat16()
    gradient, m, v = torch.randn_like(p), torch.randn_like(p) * 0.1, torch.rand_like(p) * 0.1
    exact = torch.nn.Parameter(p.float())
    reference = torch.optim.AdamW([exact], lr=1e-2, betas=BETAS, weight_decay=0.1)
    reference.state[exact] = {
        "step": torch.tensor(4.0),
        "exp_avg": m.float(),
        "exp_avg_sq": v.float(),
    }
    exact.grad = gradient.float()
    reference.step()
    wide = p.float()
    update_bf16_(wide, gradient, m.clone(), v.clone(), _factors(5), _keys())
    torch.testing.assert_close(wide, exact.detach(), rtol=1e-5, atol=1e-6)  # fp32: not rounded
    update_bf16_(p, gradient, m, v, _factors(5), _keys())
    torch.testing.assert_close(p.float(), exact.detach(), rtol=2**-7, atol=0)
    torch.testing.assert_close(m.float(), reference.state[exact]["exp_avg"], rtol=2**-7, atol=0)
    torch.testing.assert_close(v.float(), reference.state[exact]["exp_avg_sq"], rtol=2**-7, atol=0)


def test_pieces_give_what_the_whole_does(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    start = [torch.rand(50, 64).bfloat16() for _ in range(4)]
    ends = []
    for size in (2**17, 640, 100):
        monkeypatch.setattr(adamw, "_PIECE", size)
        p, g, m, v = (tensor.clone() for tensor in start)
        update_bf16_(p, g, m, v, _factors(3), _keys())
        ends.append(torch.stack([p, m, v]))
    p, g, m, v = start
    adamw_bf16_(p, g, m, v, _factors(3), _keys())
    assert all(torch.equal(ends[0], end) for end in ends[1:])
    assert torch.equal(ends[0], torch.stack([p, m, v]))


@pytest.mark.parametrize("keeps_shadow", [True, False])
def test_with_fp32_moments_it_is_pytorchs_adamw_and_the_rounding_of_what_that_gives(
    keeps_shadow: bool,
) -> None:
    torch.manual_seed(1)
    p, m, v = torch.randn(100, 3).bfloat16(), torch.randn(100, 3) * 0.1, torch.rand(100, 3)
    gradient = torch.randn_like(p)
    shadow = p + torch.randn(100, 3) * 1e-4 if keeps_shadow else None
    exact = torch.nn.Parameter(p.float() if shadow is None else shadow.clone())
    reference = torch.optim.AdamW([exact], lr=1e-2, betas=BETAS, weight_decay=0.1)
    state = {"step": torch.tensor(4.0), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    reference.state[exact] = state
    exact.grad = gradient.float() * 0.5
    reference.step()
    update_wide_(p, gradient, m, v, _factors(5, gradient_scale=0.5), _keys(), shadow)
    torch.testing.assert_close(m, state["exp_avg"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(v, state["exp_avg_sq"], rtol=1e-6, atol=1e-7)
    expected = torch.empty_like(p)
    if shadow is None:
        write_rounded_(expected, exact.detach(), _keys())
    else:
        torch.testing.assert_close(shadow, exact.detach(), rtol=1e-6, atol=1e-7)
        expected.copy_(shadow)
    assert torch.equal(p, expected)  # in 300 places no rounding falls between the two


def test_pieces_of_fp32_moments_give_what_the_whole_does(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(adamw, "_PIECE", 100)
    p, m, v, shadow = torch.rand(50, 64).bfloat16(), *torch.rand(3, 50, 64)
    for kept in (None, shadow):
        ends = []
        for update in (adamw_wide_, update_wide_):
            after = [p.clone(), m.clone(), v.clone()]
            after += [] if kept is None else [kept.clone()]
            p_n, m_n, v_n, *shadow_n = after
            update(p_n, p, m_n, v_n, _factors(3), _keys(), *shadow_n)
            ends.append(after)
        assert all(map(torch.equal, *ends))


def test_bits_hang_on_seed_weight_step_and_element_and_stay_what_they_were() -> None:
    """A run that an earlier version saved goes on with the bits that it would have drawn."""
    [keys] = keys_of(7, {3: 11}).values()
    assert keys == (key(7, "weight", 3), key(7, "step", 11))
    bits = noise(torch.empty(5), keys)
    assert bits.tolist() == [1385940458, 818071390, 407636429, 281008840, -2045992857]
    assert noise(torch.empty(2), keys, first=3).equal(bits[3:])
    assert noise(torch.empty(2), keys, first=2**32 + 3).equal(bits[3:])
    across = noise(torch.empty(2), keys, first=2**31 - 1)
    assert across[1:].equal(noise(torch.empty(1), keys, first=-(2**31)))


def test_a_weight_that_would_not_be_updated_is_refused() -> None:
    """Its elements are taken as they lie, by pieces of a flat tensor, which would be a copy."""
    prepare([torch.zeros(4, 3), torch.zeros(5)])
    prepare_wide([torch.zeros(4, 3), torch.zeros(5)], keeps_shadows=True)
    with pytest.raises(ValueError, match=r"shape \(3, 4\) has strides \(1, 3\): not"):
        prepare([torch.zeros(5), torch.zeros(4, 3).t()])
