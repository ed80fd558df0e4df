"""Losses of fixed runs on builtin:tiny, committed as text: a refactoring leaves them as they are.

To accept new ones after a change of the mathematics: BLOOMLM_WRITE_GOLDEN=1 pytest tests/golden, and say why.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from bloomlm.adapters.base import Adapter, FullTuning, apply_adapter
from bloomlm.adapters.lora import BLOCK_LINEARS, LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.checkpoint.reader import load_model
from bloomlm.checkpoint.source import resolve_source
from bloomlm.data.examples import load_examples
from bloomlm.data.loader import Batch, BatchLoader
from bloomlm.data.splits import open_dataset
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.training.objectives.base import Objective
from bloomlm.training.objectives.cross_entropy import CrossEntropy
from bloomlm.training.optimizer import AdamWConfig, ScheduleConfig
from bloomlm.training.precision import Precision
from bloomlm.training.step import StepConfig, Trainer

GOLDEN = Path(__file__).with_name("losses.json")
NUM_STEPS = 6
# Another processor or torch adds up in another order; six steps amplify that to a few 1e-6.
RELATIVE = 2e-5

RUNS: dict[str, tuple[Adapter, StepConfig, Objective[Batch]]] = {
    "full": (FullTuning(), StepConfig(gradient_accumulation_steps=2), CrossEntropy()),
    "full_label_smoothing": (FullTuning(), StepConfig(), CrossEntropy(label_smoothing=0.1)),
    "lora": (LoraConfig(r=4, target_modules=BLOCK_LINEARS), StepConfig(), CrossEntropy()),
    "prefix": (PrefixConfig(num_prefix_tokens=5, prefix_projection=True), StepConfig(), CrossEntropy()),
}


def losses_of(name: str, cache_dir: Path) -> list[float]:
    adapter, step_config, objective = RUNS[name]
    tokenizer = Tokenizer.from_directory(resolve_source("builtin:tiny").directory)
    rows = open_dataset("builtin:dates").train
    assert rows is not None
    examples = load_examples(rows, tokenizer, src_length=64, tgt_length=16, cache_dir=cache_dir, show_progress=False)
    model = load_model("builtin:tiny", dtype=torch.float32)
    apply_adapter(model, adapter, torch.Generator().manual_seed(0))
    trainer = Trainer(
        model,
        BatchLoader(examples, 8, shuffle=True, seed=0),
        optimizer=AdamWConfig(weight_decay=0.1),
        schedule=ScheduleConfig(learning_rate=1e-3).over(NUM_STEPS),
        precision=Precision(),
        config=step_config,
        objective=objective,
    )
    return [trainer.run_step().loss for _ in range(NUM_STEPS)]


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_committed(name: str, tmp_path: Path) -> None:
    losses = losses_of(name, tmp_path)
    golden = json.loads(GOLDEN.read_text())
    if os.environ.get("BLOOMLM_WRITE_GOLDEN") == "1":
        GOLDEN.write_text(json.dumps({**golden, name: losses}, indent=1) + "\n")
        pytest.skip("wrote new golden losses")
    assert losses == pytest.approx(golden[name], rel=RELATIVE)
