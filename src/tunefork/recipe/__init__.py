"""What a run is: one YAML file, typed, frozen and documented field by field.

Every default lives here and nowhere else; the docstring under a field is its documentation (it
becomes the JSON schema and docs/recipe.md) and names the source of a default that has one.
Unknown keys are errors that name the nearest right one. Config stops at the builders: the modules
below them take plain ints, floats and tensors.

Sources named below:
- LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685
- QLoRA: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314
- rsLoRA: Kalajdzievski 2023, https://arxiv.org/abs/2312.03732
- DoRA: Liu et al. 2024, https://arxiv.org/abs/2402.09353
- LoRA Without Regret: Schulman et al. 2025, https://thinkingmachines.ai/blog/lora/
"""

from tunefork.recipe.compare import CompareSection, EvaluateSection
from tunefork.recipe.data import DataSection, ModelSection
from tunefork.recipe.faults import FaultSection
from tunefork.recipe.method import FullSection, LoraSection
from tunefork.recipe.recipe import Recipe
from tunefork.recipe.section import (
    Checkpointing,
    CheckpointingChoice,
    Compile,
    Method,
    Metric,
    PositiveFloat,
    PositiveInt,
    Section,
)
from tunefork.recipe.sweep import HalvingSection, SweepSection
from tunefork.recipe.train import TrainSection

__all__ = [
    "Checkpointing",
    "CheckpointingChoice",
    "CompareSection",
    "Compile",
    "DataSection",
    "EvaluateSection",
    "FaultSection",
    "FullSection",
    "HalvingSection",
    "LoraSection",
    "Method",
    "Metric",
    "ModelSection",
    "PositiveFloat",
    "PositiveInt",
    "Recipe",
    "Section",
    "SweepSection",
    "TrainSection",
]
