"""What an engine checks on its device when it starts, and what it does without because of it.

Kernels and ways to call them are compared with their definitions, on a few random numbers in the
sizes of the model. What raises, or says something else, is not used: a warning says why, once, the
engine's `info()` names it under `without`, and something slower takes its place:

    the kernel that draws tokens        sorting (`kernels/draw.py`), or the definition itself
    attention of decoding rows apart    one call for all rows of a pass with prompts (`flash.py`)
    adapters of few tokens              tiles, as among many (`kernels/bank_mixed.py`)
    both of these, compiled, captured   passes with prompts are captured anew, without them
    trials in the passes of prompts     passes of their own (`trial.py`)
    a CPU's kernel for adapters         PyTorch's operations (`kernels/bank_stretches.py`)

No check finds kernels that race; one that never ends holds up the start, and one that reads what is
not its own may leave the GPU of no use to this process.

Shape legend as in `kernels/draw.py` and `kernels/bank_read.py`.
"""

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from tunefork.kernels.bank_mixed import Mixed, add_mixed, add_mixed_reference
from tunefork.kernels.bank_read import cut
from tunefork.kernels.bank_stretches import Stretch, add_stretches, add_stretches_reference, lay_out
from tunefork.kernels.bank_tables import Matrices
from tunefork.kernels.draw import Draw, draw, draw_by_sorting, draw_reference
from tunefork.model.bank import Bank
from tunefork.model.fused import FusedLinear
from tunefork.serve.engines.cache import Cache, LayerShape
from tunefork.serve.engines.flash import flash_agrees
from tunefork.serve.engines.layout import BASE, Part
from tunefork.serve.engines.passes import Passes
from tunefork.serve.engines.trial import ROOM, TRIED, rows_of

_WAYS = [*product((0.7, 1.5), (0, 50), (1.0, 0.9), (0.3, 0.8))]
"""Temperature, top-k, top-p and a number in [0, 1) of the rows that are drawn."""
_MOST_OTHERS = 1
"""Rows whose token may be the definition's neighbour: where a number lies between two tokens by
less than the exponential's rounding. The kernel's tests allow one of 64."""
_LEAST_COSINE = 0.9
"""Of a row's logits, captured and launched: rounding leaves 0.99, what is wrong next to nothing."""
_SLOTS, _SICK = 4, 3
"""Slots of a check of adapters, and the one that holds no numbers."""
_PROMPTS = (70, 5, 12)
"""Tokens, by slot, of its prompts."""


class Checks:
    """Of one engine on `device`, in `dtype`."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.without: list[str] = []
        """What is not used."""

    def draw(self, vocabulary: int) -> Draw:
        """What draws tokens of logits in `dtype` or fp32."""
        if self._holds(
            "the kernel that draws tokens",
            lambda: self._draws(draw, vocabulary),
            "PyTorch sorts logits for it",
        ):
            return draw
        if self._holds(
            "drawing by sorting",
            lambda: self._draws(draw_by_sorting, vocabulary),
            "tokens are drawn row by row, for which the host waits",
        ):
            return draw_by_sorting
        return draw_reference

    def reads_apart(self, layers: Sequence[LayerShape], groups: Collection[int]) -> bool:
        """Attention may read rows that decode by themselves, beside prompts; `groups` as `Passes`
        has them."""
        kinds = {
            (la.query_heads, la.kv_heads, la.key_features)
            for la in layers
            if la.groups in groups and la.window is None
        }
        return self._holds(
            "attention of decoding rows apart",
            lambda: all(
                flash_agrees(*kind, self.dtype, apart=True, device=str(self.device))
                for kind in kinds
            ),
            "one call reads all rows of a pass with prompts",
        )

    def mixes(self, bank: Bank, rows: int) -> bool:
        """Adapters of few tokens may be added row by row, up to `rows`, and by tiles behind."""
        kinds = {_added_at_once(bank, path) for path in bank.layers}
        ranks = {max(layer.ranks) for layer in bank.layers.values()}
        return self._holds(
            "adapters of few tokens",
            lambda: all(self._adds(*kind, rows) for kind in product(kinds, ranks)),
            "they are read by tiles, as among many tokens",
        )

    def rows(self, bank: Bank) -> None:
        """Have a `bank` in a CPU's memory do without the kernel where that is not right; where it
        is not there, the log has told why."""
        kept = [layer.kept[0] for layer in bank.layers.values() if layer.kept is not None]
        what, shapes = "the kernel for adapters", {m.shape for m in kept if m.kernel is not None}
        if kept and not shapes:
            self.without.append(what)
        elif not self._holds(
            what, lambda: all(map(self._adds_rows, shapes)), "PyTorch's operations add them"
        ):
            for matrices in kept:
                matrices.kernel = None

    def captured(self, passes: Passes, cache: Cache, *, has_slots: bool) -> None:
        """Have `passes`, which are warm, do without what their captured form is not right with."""

        def check() -> bool:
            return _say_the_same(passes, cache)

        if passes.apart or passes.layout.few:
            what = "decoding rows apart and adapters of few tokens, captured"
            if self._holds(what, check, "such passes are captured anew without"):
                return
            passes.read_as_one()
            passes.warm(has_slots=has_slots)
        what = "captured passes with prompts"
        if not self._holds(what, check, "they are launched kernel by kernel"):
            assert passes.graphs is not None
            passes.graphs.forget_prompts()
            passes.graphs.sizes = []

    def rows_are_alike(self, passes: Passes, cache: Cache) -> bool:
        """Trials may be in captured passes with prompts; the slots of `passes` are empty."""
        return self._holds(
            "trials in the passes of prompts",
            lambda: _trials_show_nothing(passes, cache),
            "each has a pass of its own",
        )

    def _holds(self, what: str, check: Callable[[], bool], instead: str) -> bool:
        """What `check` says; it is told where that is no."""
        why = "it does not say what its definition says"
        try:
            if check():
                return True
        except Exception as error:
            told = (str(error).splitlines() or [""])[0][:200]
            why = f"{type(error).__name__}: {told}"
        self.without.append(what)
        warnings.warn(
            f"{what} cannot be used on {self.device} ({why}); {instead}, which is slower",
            stacklevel=3,
        )
        return False

    def _draws(self, by: Draw, vocabulary: int) -> bool:
        """Whether `by` draws what the definition draws, and leaves greedy rows alone."""
        made = torch.Generator(self.device).manual_seed(0)
        rows = len(_WAYS) + 2  # a greedy one, and one whose logits are not finite
        logits_rv = torch.randn(rows, vocabulary, generator=made, device=self.device)
        logits_rv *= torch.linspace(1.0, 4.0, rows, device=self.device)[:, None]
        told = [(row, *way) for row, way in enumerate([*_WAYS, _WAYS[0]])]
        told_s5 = torch.tensor(told, dtype=torch.float64)
        told_s5[-1, 0] = rows - 1
        for given_rv in (logits_rv.to(self.dtype), logits_rv):
            expected_r = given_rv.argmax(-1)
            expected_r[-1] = -1
            found_r = expected_r.clone()
            draw_reference(given_rv, expected_r, told_s5)
            by(given_rv, found_r, told_s5)
            is_other_r = found_r != expected_r
            if int(is_other_r.sum()) > _MOST_OTHERS or bool(is_other_r[-2:].any()):
                return False
        return True

    def _adds_rows(self, shape: tuple[int, ...]) -> bool:
        """Whether tokens of two slots are added to as defined, in blocks of each size, beside a
        slot without numbers and a token of none: in bf16 to 2^-6 of values of size one, which are
        rounded to 2^-8 thrice, in fp32 as far as sums in another order are."""
        _, rank, features_in, *sizes = shape
        made = torch.Generator().manual_seed(0)

        def randn(*shape: int, by: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=made) * by).to(self.dtype)

        matrices = Matrices(3, rank, features_in, sizes, self.dtype)
        for table, by in ((matrices.a_ncde, features_in**-0.5), (matrices.b_ncto, rank**-0.5)):
            table[:2], table[2] = randn(*table[:2].shape, by=by), torch.nan
        told, at = list[Stretch](), 1
        for number, length in enumerate((1, 2, 3, 4, 11)):
            told.append(Stretch(number % 2, at, at + length))
            at += length
        layout, x_sd = lay_out(told, [rank] * len(told)), randn(at, features_in)
        y_so = randn(at, sum(sizes))
        expected_so, base_o = y_so.clone(), y_so[0].clone()
        add_stretches_reference(expected_so, x_sd, matrices, layout)
        add_stretches(y_so, x_sd, matrices, layout)
        within = 2**-6 if self.dtype == torch.bfloat16 else 1e-4
        is_close = torch.allclose(y_so.float(), expected_so.float(), rtol=within, atol=within)
        return is_close and torch.equal(y_so[0], base_o)

    def _adds(self, sizes: Sequence[int], rank: int, rows: int) -> bool:
        """Whether rows that decode and prompts are added to as defined, beside a slot without
        numbers: to 2^-6 of values of size one, which are rounded to 2^-8 twice."""
        made = torch.Generator(self.device).manual_seed(0)

        def randn(*shape: int) -> Tensor:
            drawn = torch.randn(*shape, generator=made, device=self.device)
            return drawn.to(self.dtype)

        out, tokens = sum(sizes), rows + sum(_PROMPTS)
        both_sk = randn(tokens, out + len(sizes) * _SLOTS * rank)
        y_so, u_sk = both_sk[:, :out], both_sk[:, out:]
        u_sk.view(tokens, len(sizes), _SLOTS, rank)[:, :, _SICK] = torch.nan
        b = randn(_SLOTS * rank * out) / rank**0.5
        for part, size in zip(b.split([_SLOTS * rank * one for one in sizes]), sizes, strict=True):
            part.view(_SLOTS, rank, size)[_SICK] = torch.nan
        decoding = rows // 2
        slots = [at % (_SICK + 1) - 1 for at in range(decoding)]  # -1: the base's
        told, at = [], decoding
        for slot, new in enumerate(_PROMPTS):
            told.append(Stretch(slot, at, at + new))
            at += new
        tiles = [tile for tile in cut(told, tokens) if tile[0] != BASE]
        alone = [(slot, row, 1) for row, slot in enumerate(slots) if slot != BASE]

        def numbers(values: Sequence[int | tuple[int, int, int]]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self.device)

        slot_m = numbers(slots + [BASE] * (rows - decoding))
        mixed = Mixed(slot_m, numbers([*tiles, *[(BASE, 0, 0)] * rows]))
        expected_so, before_so = y_so.clone(), y_so.clone()
        by_tiles = Mixed(slot_m[:0], numbers([*alone, *tiles]))
        add_mixed_reference(expected_so, u_sk, by_tiles, b, sizes, rank)
        add_mixed(y_so, u_sk, mixed, b, sizes, rank)
        is_base_s = torch.ones(tokens, dtype=torch.bool, device=self.device)
        for _, first, count in (*alone, *tiles):
            is_base_s[first : first + count] = False
        is_close = torch.allclose(y_so.float(), expected_so.float(), rtol=2**-6, atol=2**-6)
        return is_close and torch.equal(y_so[is_base_s], before_so[is_base_s])


def _added_at_once(bank: Bank, path: str) -> tuple[int, ...]:
    """The features of the layers whose deltas are added together with those of one layer."""
    layer = bank.layers[path]
    joint = layer.base.group.joint if isinstance(layer.base, FusedLinear) else None
    if joint is not None and joint.features_out:
        return tuple(joint.sizes)
    return (layer.out_features,)


def _say_the_same(passes: Passes, cache: Cache) -> bool:
    """Whether captured passes with prompts give what launched ones give, but for rounding."""
    graphs, cosines = passes.graphs, []
    for parts in _with_prompts(passes, cache):
        found_rv = passes.run(parts).logits_rv.float()
        passes.graphs = None
        try:
            exact_rv = passes.run(parts).logits_rv.float()
        finally:
            passes.graphs = graphs
        cosines.append(float(torch.cosine_similarity(found_rv, exact_rv).min()))
    return all(cosine > _LEAST_COSINE for cosine in cosines)


def _trials_show_nothing(passes: Passes, cache: Cache) -> bool:
    """Whether, in captured passes with prompts, an empty slot changes no bit of the logits."""
    rows = (passes.run(parts).logits_rv[-TRIED:] for parts in _with_prompts(passes, cache))
    return all(torch.equal(own_v, base_v) for own_v, base_v in rows)


def _with_prompts(passes: Passes, cache: Cache) -> Iterator[list[Part]]:
    """Passes that fill captured ones of few tokens, and of more (`Layout.few`): a prompt alone, and
    one behind rows that decode; behind either the trial of an empty slot, where there are slots.
    The cache is empty."""
    assert passes.graphs is not None
    tried = rows_of(0, cache.trial_start) if passes.tries else []
    sizes, few = passes.graphs.sizes, passes.layout.few
    for size in sorted({sizes[0], next((size for size in sizes if size > few), sizes[0])}):
        tokens = min(size - ROOM, cache.total, passes.max_model_len)
        region = cache.regions.take(tokens)
        assert region is not None, "the cache is not empty"
        ids = [(3 * at + 1) % 64 for at in range(tokens)]
        try:
            for rows in (0, max(0, min(passes.max_rows - 1, tokens - 8))):
                # Of one text, in one place: each row sees those before it.
                decoding = [Part([ids[at]], at, region.start, BASE, True) for at in range(rows)]
                prompt = Part(ids[rows:], 0, region.start + rows, BASE, True)
                yield [*decoding, prompt, *tried]
        finally:
            cache.regions.give(region)
