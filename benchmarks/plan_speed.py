"""How long a plan takes: a 70B model by three methods, on this machine's CPU, without weights.

    python benchmarks/plan_speed.py [--rounds 5]

Two rows, medians over the rounds: the whole command in a new process, and planning alone, in one
that has imported what it needs and planned nothing yet.
"""

import argparse
import os
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
start = time.perf_counter()
recipe = load(Path(sys.argv[1]))
work = work_of(recipe, examples=10_000, tokens=3_000_000)
target = target_of(load_catalogue().machine(["h100"]))
plan_recipe(recipe, target=target, methods=tuple(Method), work=work)
print(time.perf_counter() - start)
"""


def main() -> None:
    """Time both and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    program = str(Path(sys.executable).parent / "tunefork")
    whole, planning = [], []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config = config_for(70.55e9)
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder / "model")
        (folder / "recipe.yaml").write_text(RECIPE)
        environment = os.environ | {"TUNEFORK_HOME": scratch}
        for _ in range(rounds):
            start = time.perf_counter()
            command = [program, "plan", "recipe.yaml", *OPTIONS]
            subprocess.run(command, check=True, cwd=folder, env=environment, capture_output=True)
            whole.append(time.perf_counter() - start)
            command = [sys.executable, "-c", INSIDE, str(folder / "recipe.yaml")]
            done = subprocess.run(
                command, check=True, env=environment, capture_output=True, text=True
            )
            planning.append(float(done.stdout))
    rows = [
        {
            "case": case,
            "median_s": round(statistics.median(times), 2),
            "spread": [round(min(times), 2), round(max(times), 2)],
        }
        for case, times in (("plan_70b_whole_command", whole), ("plan_70b_after_imports", planning))
    ]
    device = describe(pick_device())
    print(rows, write("plan_speed", rows, device=f"{device['name']}, {device['threads']} threads"))


if __name__ == "__main__":
    main()
