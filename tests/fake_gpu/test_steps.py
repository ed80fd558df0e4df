"""Every device path on fake CUDA tensors: nothing stays on the CPU, precisions fit, and the host waits seldom."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_leaves

from bloomlm.adapters.base import Adapter, FullTuning, apply_adapter
from bloomlm.adapters.dora import DoraConfig
from bloomlm.adapters.lora import BLOCK_LINEARS, LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.checkpoint.reader import load_model
from bloomlm.generation.config import BeamSearch, GenerationConfig, Sampling
from bloomlm.generation.session import DecodeSession
from bloomlm.model import flex
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.embedding import GradientParts, _add_to_grad, _Lookup
from bloomlm.model.linear import _QuantizedLinear
from bloomlm.model.quantized import INT8, Quantization
from bloomlm.training.objectives.cross_entropy import evaluate_loss
from bloomlm.training.precision import Precision
from bloomlm.training.update import FusedUpdate
from tests.fake_gpu.device import fake_gpu, made_up_gradients, to_fake_gpu
from tests.gpu.models import random_model, trainer
from tests.tiny_bloom import write_bloom

ADAPTERS = [
    FullTuning(),
    LoraConfig(r=3, target_modules=BLOCK_LINEARS, lora_dropout=0.1),
    DoraConfig(r=3),
    PrefixConfig(num_prefix_tokens=5),
    PrefixConfig(num_prefix_tokens=5, prefix_projection=True),
]
PRECISIONS = [
    Precision(),
    *(
        Precision(compute_dtype=dtype, half_weights=half_weights)
        for dtype in (torch.bfloat16, torch.float16)
        for half_weights in (False, True)
    ),
]


BF16_O2 = Precision(compute_dtype=torch.bfloat16, half_weights=True)


def fake_model(adapter: Adapter, dtype: torch.dtype = torch.float32) -> BloomForCausalLM:
    """A model with an adapter, on the fake GPU; called within fake_gpu."""
    with unset_fake_temporarily():
        model = random_model(adapter)
    to_fake_gpu(model, dtype)
    return model


class Calls:
    """Calls of the attention kernels."""

    block_sparse = 0
    plain = 0
    with_cudnn = 0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    counts, kernel = Calls(), F.scaled_dot_product_attention

    def plain(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        counts.plain += 1
        counts.with_cudnn += torch.backends.cuda.cudnn_sdp_enabled()
        return kernel(*tensors, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", plain)
    return counts


@pytest.fixture(params=[True, False], ids=["block-sparse", "plain"])
def block_sparse(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, calls: Calls) -> bool:
    """Whether packed documents go through FlexAttention, whose compiled kernel is replaced by its shapes."""

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, block_mask: object, scale: float):
        assert {tensor.device.type for tensor in (query, key, value)} == {"cuda"}
        assert query.dtype == key.dtype == value.dtype
        calls.block_sparse += 1
        return query + (key.sum() + value.sum()) * scale

    monkeypatch.setattr(flex, "is_available", lambda device: request.param and device.type == "cuda")
    monkeypatch.setattr(flex, "_compiled_kernel", lambda: kernel)
    monkeypatch.setattr(flex, "document_mask", lambda *_: None)
    return request.param


@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: f"{p.compute_dtype}{'-O2' if p.half_weights else ''}")
@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.kind)
def test_a_step(adapter: Adapter, precision: Precision, block_sparse: bool, calls: Calls) -> None:
    with fake_gpu() as waits:
        model = fake_model(adapter, precision.weights_dtype)
        model.transformer.recompute = block_sparse  # with every adapter and precision, too
        run = trainer(model, precision)
        waits.clear()
        with made_up_gradients(model):
            run.run_step()
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        moments = [
            t for t in tree_leaves(list(run.optimizer.state.values())) if isinstance(t, torch.Tensor) and t.dim()
        ]
        assert {tensor.device.type for tensor in [*state.values(), *moments]} == {"cuda"}
        assert moments and {tensor.dtype for tensor in moments} == {torch.float32}
    # every block of both microbatches, the first one of prefix tuning too, whose queries do not learn
    assert calls.block_sparse == (2 * model.config.n_layer if block_sparse else 0)
    assert (calls.plain == 0) == block_sparse
    # two microbatches: where the labels are, the slopes, and places of documents; a step: the loss with the norm
    assert waits.count("nonzero") == 2
    assert waits.count("copy from the GPU") + waits.count("item") <= 2, waits
    assert waits.count("copy to the GPU") <= 2 * 2, waits


@pytest.mark.parametrize("precision", [Precision(), BF16_O2], ids=["fp32", "bf16 O2"])
def test_updates_within_the_backward_pass_do_not_wait(precision: Precision) -> None:
    step = {"gradient_accumulation_steps": 1, "max_grad_norm": 0.0, "fuses_update": True}
    with fake_gpu() as waits:
        run = trainer(fake_model(FullTuning(), precision.weights_dtype), precision, **step)
        update = run._update
        assert isinstance(update, FusedUpdate)
        waits.clear()
        for name, parameter in run.model.named_parameters():
            gradient = torch.empty_like(run.learned.optimized[name])
            update._update(name, parameter, [(slice(None), gradient)])
        assert update.norm().device.type == "cuda"
    assert not waits


@pytest.mark.parametrize("precision", PRECISIONS[:3], ids=str)
def test_evaluation(precision: Precision) -> None:
    with fake_gpu() as waits:
        run = trainer(fake_model(FullTuning(), precision.weights_dtype), precision)
        batches = list(run.batches)
        waits.clear()
        evaluate_loss(run.model, batches, precision)
    # the sums are read at the end
    assert waits.count("item") == 1
    assert waits.count("nonzero") == len(batches)


def test_the_backward_passes_of_own_functions() -> None:
    """They are called as autograd would call them."""
    with fake_gpu():
        weight = torch.empty(30, 8, device="cuda")
        rows, grad = torch.zeros(5, dtype=torch.int64, device="cuda"), torch.empty(5, 8, device="cuda")
        _Lookup.backward(SimpleNamespace(rows=rows, receive=partial(_add_to_grad, weight)), grad)
        assert weight.grad is not None and weight.grad.device.type == "cuda"
        parts = GradientParts(weight)
        _Lookup.backward(SimpleNamespace(rows=rows, receive=parts.add_looked_up), grad)
        assert [gradient.device.type for _, gradient in parts.take(20, None)] == ["cuda", "cuda"]
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            saved = torch.empty(6, 8, dtype=torch.int8, device="cuda"), torch.empty(6, device="cuda")
            context = SimpleNamespace(saved_tensors=saved, needs_input_grad=(True, False, False, True))
            found, _, _, bias = _QuantizedLinear.backward(context, torch.empty(5, 6, dtype=dtype, device="cuda"))
            assert {found.device.type, bias.device.type} == {"cuda"}
            assert (found.dtype, bias.dtype) == (dtype, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("quantization", [None, INT8], ids=["", "int8"])
def test_loading_and_steps_of_a_loaded_model(
    tmp_path: Path, dtype: torch.dtype, quantization: Quantization | None
) -> None:
    base = write_bloom(tmp_path / "base")
    with fake_gpu(allow_real=True):
        model = load_model(base, dtype=dtype, device="cuda", quantization=quantization, memory_map=False)
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        assert {tensor.device.type for tensor in tensors.values()} == {"cuda"}
        floats = {
            tensor.dtype for name, tensor in tensors.items() if tensor.is_floating_point() and "scale" not in name
        }
        assert floats == {dtype}
        apply_adapter(model, LoraConfig(r=3))
        precision = Precision(compute_dtype=dtype, half_weights=dtype is not torch.float32)
        run = trainer(model, precision)
        with made_up_gradients(model):
            run.run_step()


CONFIGS = {
    "greedy": GenerationConfig(max_new_tokens=4, num_log_probs=2),
    "penalties": GenerationConfig(max_new_tokens=4, repetition_penalty=1.3, no_repeat_ngram_size=2, min_new_tokens=3),
    "counts": GenerationConfig(max_new_tokens=4, frequency_penalty=0.5, presence_penalty=0.5, logit_bias=((5, 1.0),)),
    "sampling": GenerationConfig(max_new_tokens=4, strategy=Sampling(seed=1, top_k=9, top_p=0.9, min_p=0.1)),
    "beams": GenerationConfig(max_new_tokens=4, strategy=BeamSearch(num_beams=3)),
}


@pytest.mark.parametrize("adapter", ADAPTERS[1:4], ids=lambda adapter: adapter.kind)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_session(config: GenerationConfig, adapter: Adapter, calls: Calls) -> None:
    """Prompts are read in chunks beside others, and more sequences do not make a step wait for the GPU more often."""
    counts = []
    for num_prompts in (2, 4):
        with fake_gpu() as waits:
            model = fake_model(adapter, torch.bfloat16)
            session = DecodeSession(model, max_rows=12, max_tokens=60)
            first = session.open(list(range(4, 24)), config)[0]
            session.step({first: 7})
            for _ in range(num_prompts - 1):
                session.open(list(range(4, 30)), config)
            session.step()
            waits.clear()
            session.step()
            counts.append(len(waits))
    # cuDNN plans attention anew for the length of every step
    assert calls.plain > 0 and calls.with_cudnn == 0
    assert counts[1] <= (counts[0] if not isinstance(config.strategy, BeamSearch) else 2 * counts[0]), counts
    assert counts[0] <= 16
