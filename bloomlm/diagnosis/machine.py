"""Facts about this machine that decide how fast and how exactly bloomlm computes, and advice that follows from them.

Facts are plain values under short names, fit for a bug report: no paths, names of hosts or users.
"""

import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bloomlm.errors import format_bytes
from bloomlm.kernels.processor import instruction_sets
from bloomlm.model import flex
from bloomlm.system_memory import free_bytes, limit_bytes, total_bytes
from bloomlm.training.meter import measure_peak_flops
from bloomlm.version import __version__

PACKAGES = (
    "torch",
    "triton",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "numpy",
    "click",
    "rich",
    "pyyaml",
    "transformers",
    "peft",
    "datasets",
    "lm_eval",
    "bitsandbytes",
    "starlette",
    "uvicorn",
    "onnxruntime",
    "openvino",
    "llama-cpp-python",
)
"""Packages that bloomlm needs or can use, and those whose files it exchanges."""
_FLAGS = ("avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")
_ENVIRONMENT = re.compile(r"^(CUDA_|NCCL_|OMP_|MKL_|KMP_|ONEDNN_|TORCH|PYTORCH_|BLOOMLM_)")
_LAUNCHES = 500
Facts = dict[str, Any]


def software() -> Facts:
    """Versions; packages that are not installed are left out."""
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "bloomlm": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        **{name: version for name, version in versions.items() if version},
        "environment": {
            name: "set" if "PATH" in name or "DIR" in name else value
            for name, value in sorted(os.environ.items())
            if _ENVIRONMENT.match(name)
        },
    }


def processor() -> Facts:
    """The CPU as PyTorch uses it, and memory."""
    lines = _lines("/proc/cpuinfo")
    have = instruction_sets()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "name": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_sets": [flag for flag in _FLAGS if flag in have],
        "torch_kernels": torch.backends.cpu.get_cpu_capability(),
        "onednn": torch.backends.mkldnn.is_available(),
        "memory_bytes": total_bytes(),
        "available_bytes": free_bytes(),
        "memory_limit_bytes": limit_bytes(),
    }


def gpus() -> Facts:
    """What PyTorch finds, and the driver's version even where PyTorch finds nothing."""
    driver = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", " ".join(_lines("/proc/driver/nvidia/version")[:1]))
    facts: Facts = {
        "driver": driver.group(1) if driver else None,
        "torch_built_for_cuda": torch.version.cuda,
        "devices": [],
    }
    if not torch.cuda.is_available():
        return facts
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        facts["devices"].append(
            {
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory_bytes": total,
                "free_bytes": free,
                "block_sparse_attention": flex.is_available(torch.device("cuda", number)),
            }
        )
    facts["cudnn"] = torch.backends.cudnn.version()
    facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None
    facts["tf32_products"] = torch.backends.cuda.matmul.allow_tf32
    return facts


def speed(device: torch.device) -> Facts:
    """The rates of large products and of a large copy, and, on a GPU, the time of starting a small operation."""
    size = 2048 if device.type == "cpu" else 8192
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    facts: Facts = {
        f"{name}_flops_per_second": round(measure_peak_flops(device, dtype, size=size // 2, repeats=3))
        for name, dtype in dtypes.items()
    }
    source = torch.ones(size * size, device=device)
    target = torch.empty_like(source)
    seconds = min(_seconds(device, lambda: target.copy_(source)) for _ in range(5))
    facts["copy_bytes_per_second"] = round(2 * source.nbytes / seconds)
    if device.type == "cuda":
        small = torch.ones(8, device=device)

        def launch() -> None:
            for _ in range(_LAUNCHES):
                small.add_(1.0)

        facts["small_operation_seconds"] = min(_seconds(device, launch) for _ in range(3)) / _LAUNCHES
    return facts


def advice(processor: Mapping[str, Any], gpus: Mapping[str, Any], speed: Mapping[str, Any]) -> Iterator[str]:
    """What is slower or less exact on this machine than it could be, why, and what helps."""
    devices = gpus["devices"]
    if gpus["driver"] and not devices:
        build = f"built for CUDA {gpus['torch_built_for_cuda']}" if gpus["torch_built_for_cuda"] else "a CPU build"
        yield (
            f"There is an NVIDIA driver ({gpus['driver']}), but PyTorch, {build}, finds no GPU: install a PyTorch for "
            "a CUDA version that the driver supports (pytorch.org), and check CUDA_VISIBLE_DEVICES."
        )
    for number, device in enumerate(devices):
        if not device["block_sparse_attention"]:
            yield (
                f"GPU {number} has no block-sparse attention (it needs compute capability 8.0 and triton): in "
                "training, documents of different lengths are computed in several calls instead of one."
            )
        if device["free_bytes"] < 0.9 * device["memory_bytes"]:
            yield (
                f"GPU {number}: {format_bytes(device['memory_bytes'] - device['free_bytes'])} of "
                f"{format_bytes(device['memory_bytes'])} are in use, by this or another program."
            )
    if gpus.get("tf32_products"):
        yield "fp32 products go through TF32 with its 10 bits: faster, but results differ from the 4th digit on."
    if len(devices) > 1 and gpus["nccl"] is None:
        yield "PyTorch has no NCCL, so several processes cannot share these GPUs."
    yield from _cpu_advice(processor, has_gpu=bool(devices))
    if not devices and speed["bf16_flops_per_second"] < speed["fp32_flops_per_second"]:
        ratio = speed["fp32_flops_per_second"] / speed["bf16_flops_per_second"]
        yield (
            f"bf16 products are {ratio:.1f} times slower than fp32 here: use --dtype float32 and train without --bf16, "
            "unless memory is short."
        )
    if not devices and 20 * speed["fp16_flops_per_second"] < speed["fp32_flops_per_second"]:
        yield "fp16 products are more than 20 times slower than fp32: use fp32 or bf16 on this CPU."


def _cpu_advice(processor: Mapping[str, Any], *, has_gpu: bool) -> Iterator[str]:
    if processor["threads"] > processor["cores"]:
        yield (
            f"PyTorch uses {processor['threads']} threads on {processor['cores']} cores, which is slow: set "
            f"OMP_NUM_THREADS={processor['cores']}."
        )
    limit = processor["memory_limit_bytes"]
    if limit is not None and limit < 0.9 * processor["memory_bytes"]:
        yield f"A limit on this process (cgroup) allows {format_bytes(limit)} of memory; beyond it the system ends it."
    if has_gpu or platform.machine() not in ("x86_64", "AMD64"):
        return
    if not processor["onednn"]:
        yield "PyTorch has no oneDNN: products with few rows (decoding) read weights slowly."
    if "avx512f" not in processor["instruction_sets"]:
        yield "The processor has no AVX-512: products in fp32 take about twice the time that they take with it."


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
