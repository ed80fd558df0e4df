"""`bloomlm doctor`: right numbers pass, wrong ones fail, and advice follows from facts."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bloomlm.cli import doctor as verb
from bloomlm.cli.main import main
from bloomlm.diagnosis import machine
from bloomlm.diagnosis.self_test import Check, self_test
from bloomlm.kernels import compiled
from bloomlm.kernels.compiled import load_operators
from bloomlm.model import attention, decoding

CPU = torch.device("cpu")


def failed() -> dict[str, Check]:
    return {check.name: check for check in self_test(CPU) if not check.passed}


def test_this_cpu_passes() -> None:
    checks = list(self_test(CPU))
    assert len(checks) == 8 and all(check.passed for check in checks), checks
    errors = {check.name: check.error for check in checks}
    assert 1e-8 < errors["logits in fp32"] < 1e-6 < errors["logits in fp16"] < errors["logits in bf16"]


def test_attention_that_is_slightly_wrong_in_one_precision_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel: Callable[..., Tensor] = attention._fused_kernel

    def wrong(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
        off = 1.0 if query.dtype is torch.float64 else 1.001
        return kernel(query, key, value * off, *rest, **options)

    monkeypatch.setattr(attention, "_fused_kernel", wrong)
    monkeypatch.setattr(attention, "_is_faster_in_blocks", lambda query: False)
    monkeypatch.setattr(compiled, "_loaded", None)
    names = set(failed())
    assert {"logits in fp32", "loss and gradients in fp32", "LoRA: losses of 3 steps in fp32"} <= names
    assert not names & {"logits in bf16", "logits in fp16", "packed documents equal single ones"}


def test_an_operator_that_is_slightly_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    load_operators()
    loaded = compiled.operators()
    if loaded is None or loaded.causal is None:
        pytest.skip("there is no C++ compiler, no AVX2, or an old PyTorch")
    causal = loaded.causal

    def wrong(*arguments: Tensor) -> None:
        causal.forward(*arguments)
        arguments[4].mul_(1.001)

    monkeypatch.setattr(compiled, "_loaded", replace(loaded, causal=replace(causal, forward=wrong)))
    assert {"logits in fp32", "loss and gradients in fp32", "LoRA: losses of 3 steps in fp32"} <= set(failed())


def test_a_cache_that_forgets_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = decoding.BloomRows.decode_step

    def forgets(rows: decoding.BloomRows, numbers: Any, tokens: Tensor) -> Tensor:
        rows.cache.tensor[:, :, :, :, 1:3] = 0
        return real(rows, numbers, tokens)

    monkeypatch.setattr(decoding.BloomRows, "decode_step", forgets)
    assert set(failed()) == {"generation equals passes without a cache"}


def test_a_check_that_cannot_run_is_reported_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("no kernel image is available\nand more")

    monkeypatch.setattr(decoding.BloomRows, "decode_step", broken)
    (check,) = failed().values()
    assert check.error is None and check.problem == "RuntimeError: no kernel image is available"


def checks(*errors: float | None) -> list[Check]:
    return [Check(name=f"check {i}", error=e, limit=1e-5, seconds=0.1, problem="why") for i, e in enumerate(errors)]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verb, "self_test", lambda device: checks(1e-6))
    rates = {f"{name}_flops_per_second": 10**12 for name in ("fp32", "bf16", "fp16")}
    monkeypatch.setattr(machine, "speed", lambda device: {**rates, "copy_bytes_per_second": 10**10})


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--device", "cpu", *words])
    return int(ended.value.code or 0), capsys.readouterr().out


def test_the_report_for_people_and_programs(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = run(capsys)
    assert status == 0 and "ok      check 0: relative error 1.0e-06, limit 1e-05" in text
    assert f"torch: {torch.__version__}" in text and "all 1 checks passed on cpu" in text
    status, text = run(capsys, "--json")
    report = json.loads(text)
    assert status == 0 and report["checks"][0]["passed"] is True
    assert report["software"]["torch"] == torch.__version__
    assert report["processor"]["memory_bytes"] > 10**8


def test_a_failed_check_is_the_exit_status(
    quick: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "self_test", lambda device: checks(1e-6, 1e-3, None, float("nan")))
    status, text = run(capsys)
    assert status == 1 and "3 of 4 checks FAILED" in text and "FAILED  check 2: why" in text
    status, text = run(capsys, "--json")
    assert status == 1 and [check["passed"] for check in json.loads(text)["checks"]] == [True, False, False, False]


def test_the_report_names_no_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_PATH", "/home/someone/cuda")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    environment = machine.software()["environment"]
    assert environment["CUDA_PATH"] == "set" and environment["OMP_NUM_THREADS"] == "3"


GPU = {
    "name": "a GPU",
    "compute_capability": "9.0",
    "memory_bytes": 80e9,
    "free_bytes": 79e9,
    "block_sparse_attention": True,
}
GPUS = {"driver": "580.1", "torch_built_for_cuda": "13.0", "devices": [GPU], "nccl": "2.28.9", "tf32_products": False}
PROCESSOR = {
    "cores": 4,
    "threads": 4,
    "instruction_sets": ["avx2", "avx512f"],
    "onednn": True,
    "memory_bytes": 32e9,
    "memory_limit_bytes": None,
}
SPEED = {"fp32_flops_per_second": 100, "bf16_flops_per_second": 200, "fp16_flops_per_second": 100}
NO_GPU = {"driver": None, "torch_built_for_cuda": None, "devices": []}


def test_a_good_machine_gets_no_advice() -> None:
    assert list(machine.advice(PROCESSOR, GPUS, SPEED)) == []
    assert list(machine.advice(PROCESSOR, NO_GPU, SPEED)) == []


@pytest.mark.parametrize(
    ("processor", "gpus", "speed", "words"),
    [
        ({}, {**GPUS, "devices": [], "torch_built_for_cuda": None}, {}, "a CPU build, finds no GPU"),
        ({}, {**GPUS, "devices": [{**GPU, "block_sparse_attention": False}]}, {}, "compute capability 8.0 and triton"),
        ({}, {**GPUS, "devices": [{**GPU, "free_bytes": 20e9}]}, {}, "60.0 GB of 80.0 GB are in use"),
        ({}, {**GPUS, "tf32_products": True}, {}, "TF32"),
        ({}, {**GPUS, "devices": [GPU, GPU], "nccl": None}, {}, "no NCCL"),
        ({"threads": 8}, NO_GPU, {}, "OMP_NUM_THREADS=4"),
        ({"memory_limit_bytes": 8e9}, NO_GPU, {}, "allows 8.0 GB"),
        ({}, NO_GPU, {"bf16_flops_per_second": 25}, "4.0 times slower than fp32"),
        ({}, NO_GPU, {"fp16_flops_per_second": 1}, "fp16 products are more than 20 times slower"),
    ],
)
def test_advice(processor: dict[str, Any], gpus: dict[str, Any], speed: dict[str, Any], words: str) -> None:
    (found,) = machine.advice({**PROCESSOR, **processor}, gpus, {**SPEED, **speed})
    assert words in found
