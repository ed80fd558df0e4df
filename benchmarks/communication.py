"""What ranks send and hold in training steps: counted, as `bloomlm plan` computes it, and the least possible.

Each case runs under torchrun on gloo, one thread a rank, a BLOOM of 8 blocks with bloom-560m's width and half of its
vocabulary. Counted are the collectives' payloads, from which follows what each rank of a ring sends, and, where this
process may make a network namespace (unshare --net), the bytes that the kernel saw on its loopback device, packet
headers included. Memory is the rank's peak by the trainer's own meter, less what the process held before the model.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from common import memory_bytes, record

from bloomlm.adapters.base import Adapter, FullTuning, apply_adapter
from bloomlm.adapters.lora import LoraConfig
from bloomlm.data.example import Example
from bloomlm.data.loader import BatchLoader
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import PUBLISHED_SIZES
from bloomlm.parallel.data_parallel import shard_model
from bloomlm.parallel.launch import joined_ranks
from bloomlm.parallel.mesh import Degrees, Mesh
from bloomlm.parallel.plan import training_memory
from bloomlm.parallel.tensor_parallel import cut_adapter, cut_model
from bloomlm.parallel.traffic import Traffic, sent_bytes, step_traffic
from bloomlm.parallel.vocabulary_loss import MAX_CHUNK_BYTES
from bloomlm.parallel.workload import Workload
from bloomlm.training.loop import peak_memory_bytes
from bloomlm.training.meter import memory_by_kind
from bloomlm.training.optimizer import AdamWConfig, ScheduleConfig
from bloomlm.training.precision import Precision
from bloomlm.training.step import StepConfig, Trainer

CONFIG = replace(PUBLISHED_SIZES["560m"], n_layer=8, vocab_size=125_440)
EXAMPLES, SOURCE, TARGET = 4, 64, 65
"""Of a microbatch, of each copy of the model."""
FULL, LORA = FullTuning(), LoraConfig(r=8)
CASES: dict[str, tuple[Degrees, Adapter, bool]] = {
    "tp 2": (Degrees(tp=2), FULL, False),
    "tp 4": (Degrees(tp=4), FULL, False),
    "fsdp 2": (Degrees(dp_shard=2), FULL, False),
    "tp 2 x fsdp 2": (Degrees(tp=2, dp_shard=2), FULL, False),
    "tp 2, recompute": (Degrees(tp=2), FULL, True),
    "tp 2, LoRA r 8": (Degrees(tp=2), LORA, False),
}
OPERATIONS = {
    "all-reduce": ("all_reduce",),
    "all-gather": ("all_gather_single", "all_gather_into_tensor"),
    "reduce-scatter": ("reduce_scatter_single", "reduce_scatter_tensor"),
}
"""Operation -> its function in torch.distributed; the first that this PyTorch has."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=list(CASES), action="append", help="only these; may be repeated")
    parser.add_argument("--steps", type=int, default=2, help="counted, after one that is not")
    parser.add_argument("--rank-of", choices=list(CASES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        measure(arguments.rank_of, arguments.steps)
        return
    isolated = can_isolate()
    if not isolated:
        print("no network namespace can be made here: the kernel's count is left out", file=sys.stderr)
    print("| ranks | sent by a rank, MB a step | by the kernel | plan | least | counted / least | kB a token |")
    print("|---|---|---|---|---|---|---|")
    results = {name: launch(name, arguments.steps, isolated) for name in arguments.case or CASES}
    for name, result in results.items():
        kernel = "" if result["kernel_bytes"] is None else f"{result['kernel_bytes'] / 1e6:.2f}"
        print(
            f"| {name} | {result['sent_bytes'] / 1e6:.2f} | {kernel} | {result['planned_bytes'] / 1e6:.2f} | "
            f"{result['least_bytes'] / 1e6:.2f} | {result['sent_bytes'] / result['least_bytes']:.4f} | "
            f"{result['sent_bytes'] / result['tokens'] / 1e3:.1f} |"
        )
    print("\n| ranks | weights, gradients, optimizer: held | plan | peak measured | plan | plan / measured |")
    print("|---|---|---|---|---|---|")
    for name, result in results.items():
        print(
            f"| {name} | {result['state_bytes'] / 1e6:,.1f} MB | {result['planned_state_bytes'] / 1e6:,.1f} MB | "
            f"{result['peak_bytes'] / 1e6:,.0f} MB | {result['planned_peak_bytes'] / 1e6:,.0f} MB | "
            f"{result['planned_peak_bytes'] / result['peak_bytes']:.2f} |"
        )
    record({name: [in_megabytes(result)] for name, result in results.items()})


def in_megabytes(result: dict[str, Any]) -> dict[str, float]:
    """Every count of bytes, under a name with its unit."""
    return {
        f"{name.removesuffix('_bytes')}_mb": value / 1e6
        for name, value in result.items()
        if name.endswith("_bytes") and value is not None
    }


def can_isolate() -> bool:
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return False
    command = ["unshare", "--net", "ip", "link", "set", "lo", "up"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def launch(name: str, steps: int, isolated: bool) -> dict[str, Any]:
    ranks = CASES[name][0].world_size
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [__file__, "--rank-of", name, "--steps", str(steps)]
    # glibc otherwise keeps much of what was freed, and the peak would tell that too
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    if isolated:
        # a loopback device of its own, on which nothing else is sent
        command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]
        environment |= {"GLOO_SOCKET_IFNAME": "lo", "COUNT_LOOPBACK": "1"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(name: str, steps: int) -> None:
    degrees, adapter, recompute = CASES[name]
    torch.set_num_threads(1)
    with joined_ranks(degrees, "cpu") as mesh:
        held_before = memory_bytes()
        trainer = random_trainer(mesh, adapter, recompute)
        trainer.run_step()
        payloads = Payloads()
        dist.barrier()
        kernel_before = loopback_bytes()
        payloads.begin()
        results = [trainer.run_step() for _ in range(steps)]
        payloads.end()
        dist.barrier()
        kernel_bytes = loopback_bytes() - kernel_before
        peak = peak_memory_bytes(trainer.device)
        if not mesh.is_main:
            return
        with torch.device("meta"):
            model = BloomForCausalLM(CONFIG)
        apply_adapter(model, adapter)
        load = Workload(
            num_documents=EXAMPLES,
            num_tokens=results[0].num_tokens // degrees.dp,
            num_supervised_tokens=results[0].num_supervised_tokens // degrees.dp,
            compute_dtype=torch.float32,
            max_chunk_bytes=MAX_CHUNK_BYTES,
            recompute=recompute,
        )
        traffic, memory = step_traffic(model, degrees, load), training_memory(model, degrees, load)
        check_payloads(payloads.found, traffic, steps)
        counted = sum(sent_bytes(operation, count, size) for (operation, size), count in payloads.found.items())
        kinds = memory_by_kind(trainer, peak)
        values = {
            "tokens": load.num_tokens,
            "sent_bytes": counted / steps,
            "kernel_bytes": kernel_bytes / steps / degrees.world_size if "COUNT_LOOPBACK" in os.environ else None,
            "planned_bytes": sum(item.sent_bytes for item in traffic),
            "least_bytes": sum(item.least_sent_bytes for item in traffic),
            "state_bytes": kinds["weights"] + kinds["gradients"] + kinds["optimizer"],
            "planned_state_bytes": memory.weights + memory.gradients + memory.optimizer,
            "peak_bytes": peak - held_before,
            "planned_peak_bytes": memory.peak,
        }
        print(json.dumps(values), flush=True)


def random_trainer(mesh: Mesh, adapter: Adapter, recompute: bool) -> Trainer:
    with torch.device("meta"):
        model = BloomForCausalLM(CONFIG)
    cut_model(model, mesh)
    apply_adapter(model, adapter)
    cut_adapter(model, mesh)
    shard_model(model, mesh)
    model.to_empty(device="cpu")
    torch.manual_seed(mesh.tp_rank)
    with torch.no_grad():
        for parameter in model.parameters():
            part = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            part.normal_(0, 0.02) if part.dim() > 1 else part.fill_(0.5)
    model.transformer.recompute = recompute
    degrees = mesh.degrees
    return Trainer(
        model,
        BatchLoader(some_examples(8 * degrees.dp), EXAMPLES, shuffle=False, dp_degree=degrees.dp, dp_rank=mesh.dp_rank),
        optimizer=AdamWConfig(),
        schedule=ScheduleConfig(learning_rate=1e-5).over(100),
        precision=Precision(),
        config=StepConfig(),
        mesh=mesh,
    )


def some_examples(count: int) -> list[Example]:
    generator = np.random.default_rng(0)
    return [
        Example.pair(generator.integers(4, CONFIG.vocab_size, SOURCE + TARGET).astype(np.int32), SOURCE)
        for _ in range(count)
    ]


class Payloads:
    """Adds up the tensors that collectives make whole, by operation and number of ranks."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, int], int] = {}
        self._names = {operation: next(n for n in names if hasattr(dist, n)) for operation, names in OPERATIONS.items()}
        self._real = {operation: getattr(dist, name) for operation, name in self._names.items()}

    def begin(self) -> None:
        for operation, name in self._names.items():
            setattr(dist, name, self._counting(operation))

    def end(self) -> None:
        for operation, name in self._names.items():
            setattr(dist, name, self._real[operation])

    def _counting(self, operation: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            tensors = [value for value in (*arguments, *options.values()) if isinstance(value, torch.Tensor)]
            key = (operation, dist.get_world_size(options.get("group")))
            self.found[key] = self.found.get(key, 0) + max(tensor.nbytes for tensor in tensors)
            return self._real[operation](*arguments, **options)

        return call


def check_payloads(found: dict[tuple[str, int], int], traffic: list[Traffic], steps: int) -> None:
    planned: dict[tuple[str, int], int] = {}
    for item in traffic:
        key = (item.operation, item.num_ranks)
        planned[key] = planned.get(key, 0) + item.payload_bytes * steps
    if found != planned:
        raise SystemExit(f"counted {found}, planned {planned}")


def loopback_bytes() -> int:
    """Sent on lo in this network namespace so far."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        device, _, counts = line.partition(":")
        if device.strip() == "lo":
            return int(counts.split()[8])
    return 0


if __name__ == "__main__":
    main()
