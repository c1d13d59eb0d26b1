"""Many adapters in one pass on a CPU: tokens/s of a tunefork group beside PEFT runs in turn.

SmolLM2-135M, 8 adapters (ranks 8, 16, 32 and 64, twice) on all linear layers, a step of 4 x 64
tokens of each, every token supervised, bf16, the same threads. The group trains all eight in one
pass of 2,048 tokens; PEFT trains them one after the other, each in passes of its own 256. A figure
is tokens over time: for the group of the median step, for PEFT of the sum of each adapter's median
step (`cpu_turns.py`). Both start from the same adapter files and see the same batches, so the first
20 losses of every adapter must agree: a fast wrong kernel would show there. `peak_gib` is the most
memory held from the first step on.

    python -m benchmarks.cpu_together [--rounds 2] [--steps 12]
"""

import time
from pathlib import Path

import torch

from benchmarks.cpu_turns import CPU, LEARNING_RATE, MODEL, Figures, compare, peft_base, train_peft
from tunefork.data.example import Encoded
from tunefork.model.add_bank import add_bank
from tunefork.model.bank import BankAdapter
from tunefork.model.device import reset_peak
from tunefork.model.load import load_model
from tunefork.recipe import LoraSection
from tunefork.registry.peft_save import save_deltas
from tunefork.train.member import Member, MemberStep
from tunefork.train.together import Group, GroupSettings

RANKS = (8, 16, 32, 64, 8, 16, 32, 64)
BATCH, LENGTH = 4, 64
TOKENS = len(RANKS) * BATCH * LENGTH


def adapters() -> list[BankAdapter]:
    """The eight."""
    return [BankAdapter(LoraSection(rank=rank), seed) for seed, rank in enumerate(RANKS)]


def batches(adapter: int, steps: int) -> torch.Tensor:
    """(steps, BATCH, LENGTH) token ids of one adapter, the same for every tool."""
    generator = torch.Generator().manual_seed(adapter)
    return torch.randint(3, 40_000, (steps, BATCH, LENGTH), generator=generator)


def member(adapter: int, steps: int) -> Member:
    """One adapter's run."""
    rows = batches(adapter, steps).reshape(-1, LENGTH).int().numpy()
    supervised = torch.ones(LENGTH, dtype=torch.bool).numpy()
    known = adapters()[adapter]
    return Member(
        f"adapter-{adapter}",
        known.lora,
        known.seed,
        [Encoded(f"row {i}", row, supervised) for i, row in enumerate(rows)],
        [list(range(i * BATCH, (i + 1) * BATCH)) for i in range(steps)],
        [LEARNING_RATE] * steps,
    )


def run_tunefork(steps: int) -> Figures:
    """All in one pass."""
    bank = add_bank(load_model(MODEL, dtype=torch.bfloat16, device=CPU), adapters())
    settings = GroupSettings(micro_batch_tokens=TOKENS)
    group = Group(bank, [member(at, steps) for at in range(len(RANKS))], settings)
    losses: dict[str, list[float]] = {f"adapter-{at}": [] for at in range(len(RANKS))}
    seconds = []
    reset_peak(CPU)
    while group.is_at_work:
        start = time.perf_counter()
        events = group.step()
        seconds.append(time.perf_counter() - start)
        for event in events:
            if isinstance(event, MemberStep):
                losses[event.name].append(event.record.loss)
    return Figures(list(losses.values()), [seconds])


def run(tool: str, steps: int, folder: Path) -> Figures:
    """One tool's steps of all adapters."""
    if tool == "tunefork":
        return run_tunefork(steps)
    figures = Figures()
    base = peft_base()
    reset_peak(CPU)
    for at in range(len(RANKS)):
        base = train_peft(base, folder / str(at), batches(at, steps), tool, figures).unload()
    return figures


def prepare(folder: Path) -> None:
    """The adapters that both start from."""
    model = load_model(MODEL, dtype=torch.bfloat16, device=CPU)
    bank = add_bank(model, adapters())
    for at, adapter in enumerate(adapters()):
        save_deltas(model, folder / str(at), adapter.lora, bank.adapter(at), base=MODEL.id)


if __name__ == "__main__":
    case = f"together_{len(RANKS)}x{BATCH}x{LENGTH}"
    compare(
        "cpu_together",
        case,
        tokens=TOKENS,
        prepare=prepare,
        run=run,
        rounds=2,
        more={"ranks": RANKS},
    )
