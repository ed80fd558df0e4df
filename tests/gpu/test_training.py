"""Training steps on the GPU against the CPU's."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._dynamo

from bloomlm.adapters.base import Adapter, FullTuning, apply_adapter
from bloomlm.adapters.dora import DoraConfig
from bloomlm.adapters.lora import BLOCK_LINEARS, LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.checkpoint.reader import load_model
from bloomlm.model import flex
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.documents import Documents
from bloomlm.model.quantized import INT8
from bloomlm.training.objectives.cross_entropy import evaluate_loss
from bloomlm.training.precision import Precision
from tests.gpu.models import CONFIG, GPU, losses, on_gpu, random_model, relative_error, trainer
from tests.tiny_bloom import write_bloom

ADAPTERS = [
    FullTuning(),
    LoraConfig(r=3, target_modules=BLOCK_LINEARS),
    DoraConfig(r=3),
    PrefixConfig(num_prefix_tokens=5),
    PrefixConfig(num_prefix_tokens=5, prefix_projection=True),
]
LEARNING_RATES = (5e-3, 2e-2, 2e-2, 0.4, 3e-2)
FP32 = Precision()
HALF = [
    Precision(compute_dtype=dtype, half_weights=half_weights)
    for dtype in (torch.bfloat16, torch.float16)
    for half_weights in (False, True)
]
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 4e-3}
"""A few times what the CPU's own losses in 16 bits differ from those in fp32 by."""


def name_of(value: Adapter | Precision) -> str:
    if isinstance(value, Precision):
        return f"{value.compute_dtype}".removeprefix("torch.") + ("-O2" if value.half_weights else "")
    return f"{value.kind}{'-projection' if getattr(value, 'prefix_projection', False) else ''}"


@pytest.fixture(autouse=True)
def no_fallback() -> Iterator[None]:
    """Where torch.compile gives up, which it says in a warning only, the tests fail."""
    # the limit is for the precisions and adapters of all tests in one process
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=64):
        yield


@pytest.mark.parametrize(
    ("adapter", "learning_rate"), list(zip(ADAPTERS, LEARNING_RATES, strict=True)), ids=list(map(name_of, ADAPTERS))
)
@pytest.mark.parametrize("precision", [FP32, *HALF], ids=name_of)
def test_losses_equal_the_cpus(adapter: Adapter, learning_rate: float, precision: Precision) -> None:
    model = random_model(adapter).to(precision.weights_dtype)
    found = losses(on_gpu(model), precision, learning_rate)
    exact = losses(random_model(adapter), learning_rate=learning_rate)
    assert exact[0] - exact[-1] > 4 * TOLERANCE[precision.compute_dtype] * exact[0], "a wrong update would show"
    assert found == pytest.approx(exact, rel=TOLERANCE[precision.compute_dtype])


@pytest.mark.parametrize("precision", [FP32, *HALF[:2]], ids=name_of)
def test_an_update_within_the_backward_pass_gives_the_same(precision: Precision) -> None:
    found = []
    for fuses_update in (False, True):
        model = on_gpu(random_model().to(precision.weights_dtype))
        step = {"gradient_accumulation_steps": 1, "max_grad_norm": 0.0, "fuses_update": fuses_update}
        found.append(losses(model, precision, LEARNING_RATES[0], **step))
    assert found[1] == pytest.approx(found[0], rel=1e-5)  # products of some rows of the head may round otherwise


def test_an_overflow_halves_the_loss_scale() -> None:
    precision = Precision(compute_dtype=torch.float16, initial_loss_scale=2.0**40)
    run = trainer(on_gpu(random_model()), precision)
    before = [p.detach().clone() for p in run.model.parameters()]
    result = run.run_step()
    assert result.skipped is not None
    assert run.loss_scale is not None and run.loss_scale.value == 2.0**39
    assert all(torch.equal(p, old) for p, old in zip(run.model.parameters(), before, strict=True))


@pytest.mark.parametrize("precision", [FP32, HALF[0]], ids=name_of)
def test_recompute_takes_less_memory_and_gives_the_same(precision: Precision) -> None:
    peaks, found = [], []
    for recompute in (False, True):
        model = on_gpu(random_model())
        model.transformer.recompute = recompute
        losses(on_gpu(model), precision)  # compiles
        torch.cuda.reset_peak_memory_stats()
        found.append(losses(model, precision))
        peaks.append(torch.cuda.max_memory_allocated())
    assert found[1] == pytest.approx(found[0], rel=1e-5 if precision is FP32 else 4e-3)
    assert peaks[1] < peaks[0]


@pytest.mark.parametrize("precision", [FP32, HALF[0], HALF[1]], ids=name_of)
def test_an_int8_base_equals_the_cpus(tmp_path: Path, precision: Precision) -> None:
    base, found = write_bloom(tmp_path / "base"), {}
    for device in ("cpu", "cuda"):
        model = load_model(base, quantization=INT8, dtype=precision.weights_dtype, device="cpu")
        apply_adapter(model, LoraConfig(r=3), torch.Generator().manual_seed(1))
        found[device] = losses(model.to(device), precision)
    assert found["cuda"] == pytest.approx(found["cpu"], rel=TOLERANCE[precision.compute_dtype])


@torch._dynamo.config.patch(recompile_limit=8)  # the default
def test_packed_documents_of_many_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the block-sparse kernel against one document at a time, for lengths that change with every batch."""
    assert flex.is_available(GPU)
    torch._dynamo.reset()
    draw = torch.Generator().manual_seed(6)
    model, calls = on_gpu(random_model(PrefixConfig(num_prefix_tokens=5))).train(), []
    kernel = flex.attend_documents
    monkeypatch.setattr(flex, "attend_documents", lambda *args: calls.append(1) or kernel(*args))
    for number in range(12):
        lengths = (*torch.randint(1, 200, (2 + number % 4,), generator=draw).tolist(), number + 1)
        tokens = torch.randint(0, CONFIG.vocab_size, (sum(lengths),), generator=draw).to(GPU)
        packed = model.transformer(tokens, Documents.packed(lengths))
        alone = torch.cat([model.transformer(part, Documents.packed([len(part)])) for part in tokens.split(lengths)])
        assert relative_error(packed, alone) < 1e-5, lengths
    assert len(calls) == 12 * CONFIG.n_layer


def test_evaluation_equals_the_cpus() -> None:
    model = random_model()
    batches = list(trainer(model).batches)
    expected, found = evaluate_loss(model, batches, FP32), evaluate_loss(on_gpu(model), batches, FP32)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert (found.token_accuracy, found.num_supervised_tokens) == (
        expected.token_accuracy,
        expected.num_supervised_tokens,
    )


@pytest.mark.parametrize("adapter", ADAPTERS[:2], ids=name_of)
def test_torch_compile_gives_the_same_losses(adapter: Adapter) -> None:
    torch._dynamo.reset()

    def compiled(precision: Precision) -> tuple[list[float], list[float]]:
        model: BloomForCausalLM = on_gpu(random_model(adapter))
        model.transformer.compile_blocks()
        return losses(model, precision), losses(on_gpu(random_model(adapter)), precision)

    found, expected = compiled(FP32)
    assert found == pytest.approx(expected, rel=1e-4)
    found, expected = compiled(HALF[0])
    assert found == pytest.approx(expected, rel=4e-3)


def test_a_step_waits_for_the_gpu_a_bounded_number_of_times() -> None:
    """PyTorch's own count of calls that wait, in steps of two microbatches after the first ones."""
    run = trainer(on_gpu(random_model()))
    for _ in range(3):
        run.run_step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="called a synchronizing CUDA operation") as waits:
            run.run_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) <= 1 + 2 * 6, [str(wait.message) for wait in waits]
