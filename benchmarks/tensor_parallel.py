"""Training steps at tensor_parallel_degree 1 and 2 on the shape of bloom-560m, one thread a rank, full tuning in fp32.

Prints the time of a step, and what each rank holds of weights, gradients and optimizer. What ranks send is counted by
communication.py.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch
from common import record

from bloomlm.adapters.base import FullTuning, apply_adapter
from bloomlm.allocator import keep_freed_memory
from bloomlm.data.example import Example
from bloomlm.data.loader import BatchLoader
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import PUBLISHED_SIZES
from bloomlm.parallel.launch import joined_ranks
from bloomlm.parallel.mesh import Degrees
from bloomlm.parallel.tensor_parallel import cut_model
from bloomlm.training.loop import peak_memory_bytes
from bloomlm.training.optimizer import AdamWConfig, ScheduleConfig
from bloomlm.training.precision import Precision
from bloomlm.training.step import StepConfig, Trainer

EXAMPLES, SOURCE, TARGET = 8, 64, 65
"""Of a step."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3, help="timed, after one that is not")
    parser.add_argument("--rank-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        measure(arguments.rank_of, arguments.steps)
        return
    one, two = (launch(degree, arguments.steps) for degree in (1, 2))
    for result in (one, two):
        print(
            f"tp {result['degree']}: {result['seconds']:.2f} s a step, {result['state_bytes'] / 1e9:.2f} GB of "
            f"weights, gradients and optimizer a rank, peak {result['peak_bytes'] / 1e9:.2f} GB"
        )
    print(f"2 ranks are {one['seconds'] / two['seconds']:.2f} times as fast as 1 (wanted: at least 1.7)")
    print(f"a rank of 2 holds {two['state_bytes'] / one['state_bytes']:.3f} of what 1 holds (wanted: at most 0.55)")
    record(
        {
            f"tp {result['degree']}": [
                {
                    "seconds": result["seconds"],
                    "state_gb": result["state_bytes"] / 1e9,
                    "peak_memory_gb": result["peak_bytes"] / 1e9,
                }
            ]
            for result in (one, two)
        }
    )


def launch(degree: int, steps: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(degree)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = [__file__, "--rank-of", str(degree), "--steps", str(steps)]
    done = subprocess.run([*command, *script], env=environment, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(degree: int, steps: int) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()  # as every command does
    with joined_ranks(Degrees(tp=degree), "cpu") as mesh:
        config = PUBLISHED_SIZES["560m"]
        with torch.device("meta"):
            model = BloomForCausalLM(config)
        cut_model(model, mesh)
        model.to_empty(device="cpu")
        torch.manual_seed(mesh.rank)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.fill_(0.0 if name.endswith("bias") else 1.0) if parameter.dim() == 1 else parameter.normal_(
                    0, 0.02
                )
        apply_adapter(model, FullTuning())
        trainer = Trainer(
            model,
            BatchLoader(some_examples(config.vocab_size), EXAMPLES, shuffle=False),
            optimizer=AdamWConfig(),
            schedule=ScheduleConfig(learning_rate=1e-5).over(100),
            precision=Precision(),
            config=StepConfig(),
            mesh=mesh,
        )
        trainer.run_step()
        results = [trainer.run_step() for _ in range(steps)]
        if mesh.is_main:
            state = sum(p.nbytes for p in model.parameters()) * 4  # weight, gradient and AdamW's two moments
            values = {
                "degree": degree,
                "seconds": statistics.median(result.step_seconds for result in results),
                "state_bytes": state,
                "peak_bytes": peak_memory_bytes(trainer.device),
            }
            print(json.dumps(values), flush=True)
        time.sleep(0.5)


def some_examples(vocab_size: int) -> list[Example]:
    generator = np.random.default_rng(0)
    return [
        Example.pair(generator.integers(4, vocab_size, SOURCE + TARGET).astype(np.int32), SOURCE)
        for _ in range(EXAMPLES)
    ]


if __name__ == "__main__":
    main()
