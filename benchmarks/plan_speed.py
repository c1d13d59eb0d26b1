"""How long a plan takes: a 70B model by three methods, on this machine's CPU, without weights.

    python benchmarks/plan_speed.py [--rounds 5]

Medians over the rounds, in seconds of a clock and of the processor (which other work on the machine
changes less): the whole command in a new process; planning alone, in one that has imported what it
needs and planned nothing yet; and the same where the model was planned before, so that its layers'
programs are remembered.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.results import write
from tunefork.model.device import describe, pick_device
from tunefork.plan.shape import config_for

RECIPE = "model: model\ndata: {train: train.jsonl, max_length: 2048}\n"
OPTIONS = ["--gpu", "h100", "--examples", "10000", "--tokens", "3000000"]
INSIDE = """
import sys, time
from pathlib import Path
from tunefork.plan.batches import work_of
from tunefork.plan.catalogue import load_catalogue
from tunefork.plan.device import target_of
from tunefork.plan.plan import plan_recipe
from tunefork.recipe import Method
from tunefork.recipe_file import load
start, started = time.perf_counter(), time.process_time()
recipe = load(Path(sys.argv[1]))
work = work_of(recipe, examples=10_000, tokens=3_000_000)
target = target_of(load_catalogue().machine(["h100"]))
plan_recipe(recipe, target=target, methods=tuple(Method), work=work)
print(time.perf_counter() - start, time.process_time() - started)
"""


def _command(folder: Path, home: Path) -> tuple[float, float]:
    """Seconds and processor seconds of the whole command."""
    program = str(Path(sys.executable).parent / "tunefork")
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    _run([program, "plan", "recipe.yaml", *OPTIONS], folder, home)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _inside(folder: Path, home: Path) -> tuple[float, float]:
    """The same of planning alone."""
    said = _run([sys.executable, "-c", INSIDE, str(folder / "recipe.yaml")], folder, home)
    seconds, cpu = said.split()
    return float(seconds), float(cpu)


def _run(command: list[str], folder: Path, home: Path) -> str:
    environment = os.environ | {"TUNEFORK_HOME": str(home)}
    done = subprocess.run(
        command, check=True, cwd=folder, env=environment, capture_output=True, text=True
    )
    return done.stdout


def main() -> None:
    """Time both and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config = config_for(70.55e9)
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder / "model")
        (folder / "recipe.yaml").write_text(RECIPE)
        for at in range(rounds):
            whole, new = folder / f"whole-{at}", folder / f"new-{at}"
            found.setdefault("plan_70b_whole_command", []).append(_command(folder, whole))
            found.setdefault("plan_70b_after_imports", []).append(_inside(folder, new))
            found.setdefault("plan_70b_after_imports_again", []).append(_inside(folder, new))
    rows = [
        {
            "case": case,
            "median_s": round(statistics.median(seconds for seconds, _ in times), 2),
            "spread": [round(min(times)[0], 2), round(max(times)[0], 2)],
            "median_cpu_s": round(statistics.median(cpu for _, cpu in times), 2),
        }
        for case, times in found.items()
    ]
    device = describe(pick_device())
    print(rows, write("plan_speed", rows, device=f"{device['name']}, {device['threads']} threads"))


if __name__ == "__main__":
    main()
