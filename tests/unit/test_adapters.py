"""LoRA and prefix adapters against explicit matrices."""

import copy
import math
from pathlib import Path

import pytest
import torch

from bloomlm.adapters.base import FullTuning, adapter_of, apply_adapter
from bloomlm.adapters.dora import DoraConfig, DoraLinear
from bloomlm.adapters.lora import BLOCK_LINEARS, LoraConfig
from bloomlm.adapters.lora_linear import LoRALinear
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.checkpoint.merge import merge_to_directory
from bloomlm.errors import AdapterError, ConfigError
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig
from bloomlm.model.documents import Documents
from bloomlm.model.kv_cache import KVCache
from tests.tiny_checkpoint import learned_tensors, merged_model


def tiny_model(seed: int = 0) -> BloomForCausalLM:
    model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=24, n_layer=2, n_head=3, initializer_range=0.3))
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.eval()


def randomise(model: BloomForCausalLM) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in learned_tensors(model).values():
            parameter.copy_(0.3 * torch.randn_like(parameter))


def test_lora_starts_at_the_base_model_and_learns_only_its_matrices() -> None:
    ids = torch.randint(0, 64, (2, 7))
    expected = tiny_model()(ids)
    model = tiny_model()
    apply_adapter(model, LoraConfig(r=3, target_modules=BLOCK_LINEARS))
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=0)
    names = {name.rpartition(".")[2] for name in learned_tensors(model)}
    assert names == {"lora_A", "lora_B"}
    assert len(learned_tensors(model)) == 2 * 4 * model.config.n_layer
    assert adapter_of(model) == LoraConfig(r=3, target_modules=BLOCK_LINEARS)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_lora_output_gradients_and_merge_equal_explicit_weights(use_rslora: bool) -> None:
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=BLOCK_LINEARS,
        use_rslora=use_rslora,
        rank_pattern={r"h\.1\.self_attention\.dense": 2},
        alpha_pattern={"dense_h_to_4h": 7.0},
    )
    model = tiny_model()
    apply_adapter(model, config)
    randomise(model)
    explicit = tiny_model()
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, LoRALinear):
                rank = 2 if name.endswith("h.1.self_attention.dense") else 3
                alpha = 7.0 if name.endswith("dense_h_to_4h") else 5.0
                assert layer.lora_A.shape[0] == rank
                scaling = alpha / (math.sqrt(rank) if use_rslora else rank)
                explicit.get_submodule(name).weight += scaling * layer.lora_B @ layer.lora_A
    ids = torch.randint(0, 64, (2, 7))
    torch.testing.assert_close(model(ids), explicit(ids), rtol=1e-5, atol=1e-5)

    model(ids).square().mean().backward()
    explicit(ids).square().mean().backward()
    layer = model.transformer.h[0].mlp.dense_4h_to_h
    weight_grad = explicit.transformer.h[0].mlp.dense_4h_to_h.weight.grad
    torch.testing.assert_close(layer.lora_B.grad, layer.scaling * weight_grad @ layer.lora_A.t(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(layer.lora_A.grad, layer.scaling * layer.lora_B.t() @ weight_grad, rtol=1e-4, atol=1e-6)
    assert layer.weight.grad is None

    merged = merged_model(model)
    torch.testing.assert_close(merged.state_dict(), explicit.state_dict(), rtol=1e-6, atol=1e-6)


def test_dora_computes_norms_once_in_eval_mode_until_a_parameter_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[DoraLinear] = []
    norms = DoraLinear.norms
    monkeypatch.setattr(DoraLinear, "norms", lambda layer, *whole: (calls.append(layer), norms(layer, *whole))[1])
    model = tiny_model()
    apply_adapter(model, DoraConfig(r=2, target_modules=BLOCK_LINEARS))
    randomise(model)
    ids = torch.randint(0, 64, (1, 7))
    num_layers = 4 * model.config.n_layer
    with torch.inference_mode():
        model(ids)
        model(ids)
    assert len(calls) == num_layers
    layer = model.transformer.h[0].mlp.dense_4h_to_h
    for parameter in (layer.lora_A, layer.lora_B):
        with torch.no_grad():
            parameter.mul_(2)
        assert torch.equal(model(ids), copy.deepcopy(model).train().eval()(ids))
    model(ids).sum().backward()  # norms from inference mode are no obstacle to gradients
    calls.clear()
    model.train()(ids)
    model(ids)
    model.eval()(ids)
    assert len(calls) == 3 * num_layers


@pytest.mark.parametrize("projection", [False, True])
def test_prefix_equals_attending_to_explicit_keys(projection: bool) -> None:
    """Against attention written out: virtual keys first, positions from the first virtual token."""
    model = tiny_model()
    apply_adapter(model, PrefixConfig(num_prefix_tokens=5, prefix_projection=projection))
    randomise(model)
    captured: list[tuple[torch.Tensor, torch.Tensor]] = []
    attention = model.transformer.h[0].self_attention
    attention.dense.register_forward_pre_hook(lambda _, args: captured.append(args))
    inputs: list[torch.Tensor] = []
    attention.query_key_value.register_forward_hook(lambda _, __, out: inputs.append(out))
    ids = torch.randint(0, 64, (1, 6))
    model(ids)
    key, value = model.transformer.prefix()[0]
    fused = inputs[0].view(6, 3, 3, 8).permute(2, 1, 0, 3)
    key, value = torch.cat((key, fused[1]), 1), torch.cat((value, fused[2]), 1)
    slopes = torch.tensor([2**-4, 2**-8, 2**-2])
    scores = fused[0] @ key.transpose(1, 2) / math.sqrt(8) + slopes[:, None, None] * torch.arange(11.0)
    scores = scores.masked_fill(torch.arange(11) > torch.arange(6)[:, None] + 5, -torch.inf)
    expected = (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)
    torch.testing.assert_close(captured[0][0], expected, rtol=1e-5, atol=1e-5)


def test_prefix_is_the_same_padded_packed_and_cached() -> None:
    model = tiny_model()
    apply_adapter(model, PrefixConfig(num_prefix_tokens=4))
    randomise(model)
    rows = [torch.randint(0, 64, (n,)) for n in (3, 7)]
    single = [model(row[None])[0] for row in rows]
    packed = model.transformer(torch.cat(rows), Documents.packed((3, 7)))
    torch.testing.assert_close(model.logits(packed), torch.cat(single), rtol=1e-4, atol=1e-5)
    ids = torch.stack((torch.cat((torch.zeros(4, dtype=torch.long), rows[0])), rows[1]))
    mask = torch.tensor([[0] * 4 + [1] * 3, [1] * 7])
    cache = KVCache(model.config, 2, 8, dtype=torch.float32, num_virtual=4)
    torch.testing.assert_close(model(ids, mask, cache)[0, 4:], single[0], rtol=1e-4, atol=1e-5)
    step = model(torch.tensor([[9], [11]]), kv_cache=cache)
    for row, token, logits in zip(rows, (9, 11), step, strict=True):
        expected = model(torch.cat((row, torch.tensor([token])))[None])[0, -1]
        torch.testing.assert_close(logits[0], expected, rtol=1e-4, atol=1e-5)


def test_full_tuning_learns_everything() -> None:
    model = tiny_model().requires_grad_(False)
    apply_adapter(model, FullTuning())
    assert set(learned_tensors(model)) == set(model.state_dict())


def test_lora_dropout_acts_in_training_only() -> None:
    model = tiny_model()
    apply_adapter(model, LoraConfig(lora_dropout=0.5))
    randomise(model)
    ids = torch.randint(0, 64, (1, 7))
    expected = model(ids)
    assert not torch.equal(model.train()(ids), expected)
    assert torch.equal(model.eval()(ids), expected)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="word_embeddings"):
        LoraConfig(target_modules=("word_embeddings",))
    with pytest.raises(ConfigError, match="r is 0"):
        LoraConfig(r=0)
    with pytest.raises(ConfigError, match="num_prefix_tokens is 0"):
        PrefixConfig(num_prefix_tokens=0)
    model = tiny_model()
    apply_adapter(model, PrefixConfig())
    with pytest.raises(AdapterError, match="virtual tokens"):
        merge_to_directory(model, tmp_path / "merged")
    with pytest.raises(AdapterError, match="already"):
        apply_adapter(model, LoraConfig())
