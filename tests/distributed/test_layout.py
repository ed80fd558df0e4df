"""The table of cuts: every parameter has exactly one row, and adapters take their cut from their base."""

import pytest
import torch

from bloomlm.adapters.base import apply_adapter
from bloomlm.adapters.dora import DoraConfig
from bloomlm.adapters.lora import BLOCK_LINEARS, LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.checkpoint.paddle.layout import model_cuts
from bloomlm.errors import ConfigError
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import PUBLISHED_SIZES, BloomConfig
from bloomlm.parallel.layout import LAYOUT, PATTERNS, Part, tp_dim
from bloomlm.parallel.mesh import Degrees, check_model_divides, degrees_from_flags

CONFIG = BloomConfig(vocab_size=48, hidden_size=32, n_layer=12, n_head=4)


def meta_model(adapter: LoraConfig | PrefixConfig | None = None) -> BloomForCausalLM:
    with torch.device("meta"):
        model = BloomForCausalLM(CONFIG)
    if adapter is not None:
        apply_adapter(model, adapter)
    return model


def test_every_parameter_matches_exactly_one_row() -> None:
    names = [name for name, _ in meta_model().named_parameters()]
    matches = {name: [pattern.pattern for pattern in PATTERNS if pattern.fullmatch(name)] for name in names}
    assert all(len(found) == 1 for found in matches.values()), matches
    assert {found[0] for found in matches.values()} == {pattern.pattern for pattern in PATTERNS}
    assert len(LAYOUT) == 17


def test_what_is_cut() -> None:
    dims = {name.rpartition(".h.1.")[2]: tp_dim(name) for name, _ in meta_model().named_parameters() if ".h.1." in name}
    assert {name: dim for name, dim in dims.items() if dim is not None} == {
        "self_attention.query_key_value.weight": 0,
        "self_attention.query_key_value.bias": 0,
        "self_attention.dense.weight": 1,
        "mlp.dense_h_to_4h.weight": 0,
        "mlp.dense_h_to_4h.bias": 0,
        "mlp.dense_4h_to_h.weight": 1,
    }
    assert tp_dim("transformer.word_embeddings.weight") == 0
    assert tp_dim("transformer.ln_f.weight") is None


@pytest.mark.parametrize("target", BLOCK_LINEARS)
def test_lora_takes_its_cut_from_its_base(target: str) -> None:
    model = meta_model(LoraConfig(target_modules=(target,)))
    names = [name for name, _ in model.named_parameters() if f".h.11.{'mlp' if '4h' in target else 'self'}" in name]
    base = next(name for name in names if name.endswith(f"{target}.weight"))
    dims = {kind: tp_dim(base.replace(".weight", f".{kind}")) for kind in ("lora_A", "lora_B")}
    # a cut along the inputs is lora_A's second dimension, along the outputs lora_B's first
    assert dims == ({"lora_A": None, "lora_B": 0} if tp_dim(base) == 0 else {"lora_A": 1, "lora_B": None})


def test_magnitudes_are_cut_where_the_outputs_are() -> None:
    model = meta_model(DoraConfig(target_modules=BLOCK_LINEARS))
    names = [name for name, p in model.named_parameters() if p.requires_grad and ".h.11." in name]
    magnitudes = {name.split(".")[-2]: tp_dim(name) for name in names if name.endswith("lora_magnitude_vector")}
    assert len(names) == 12
    assert magnitudes == {"query_key_value": 0, "dense": None, "dense_h_to_4h": 0, "dense_4h_to_h": None}


@pytest.mark.parametrize("projection", [False, True])
def test_every_prefix_parameter_has_a_row(projection: bool) -> None:
    model = meta_model(PrefixConfig(prefix_projection=projection))
    dims = {name: tp_dim(name) for name, p in model.named_parameters() if p.requires_grad}
    cut = {name.removeprefix("transformer.prefix."): dim for name, dim in dims.items() if dim is not None}
    assert cut == ({"transform.0.weight": 0, "transform.0.bias": 0, "transform.2.weight": 1} if projection else {})


def test_unknown_names_have_no_row() -> None:
    for name in ("lm_head.weight", "transformer.h.0.mlp.dense.weight", "transformer.h.x.input_layernorm.weight"):
        with pytest.raises(KeyError, match=name):
            tp_dim(name)


def test_paddle_reads_this_table() -> None:
    assert {name: cut.dim for name, cut in model_cuts(CONFIG).items()} == {
        name: tp_dim(name) for name, _ in meta_model().named_parameters()
    }
    shapes = {name: tuple(p.shape) for name, p in meta_model().named_parameters()}
    assert {name: cut.shape for name, cut in model_cuts(CONFIG).items()} == shapes


def test_parts_make_up_the_whole() -> None:
    whole = torch.arange(48).view(6, 8)
    assert torch.equal(torch.cat([Part(0, index, 3).of(whole) for index in range(3)]), whole)
    assert torch.equal(torch.cat([Part(1, index, 4).of(whole) for index in range(4)], dim=1), whole)
    assert Part(1, 2, 4).of(whole).shape == Part(1, 2, 4).shape((6, 8)) == (6, 2)
    assert Part(1, 2, 4).whole_shape((6, 2)) == (6, 8)
    assert Part(None, 1, 2).of(whole) is whole


@pytest.mark.parametrize(
    ("world_size", "flags", "expected"),
    [
        (1, {}, Degrees()),
        (4, {}, Degrees(dp_replicate=4)),
        (4, {"tensor_parallel_degree": 4}, Degrees(tp=4)),
        (4, {"tensor_parallel_degree": 2}, Degrees(dp_replicate=2, tp=2)),
        (4, {"shards": True}, Degrees(dp_shard=4)),
        (4, {"sharding_parallel_degree": 2}, Degrees(dp_replicate=2, dp_shard=2)),
        (8, {"tensor_parallel_degree": 2, "sharding_parallel_degree": 2}, Degrees(dp_replicate=2, dp_shard=2, tp=2)),
        (8, {"tensor_parallel_degree": 2, "shards": True}, Degrees(dp_shard=4, tp=2)),
    ],
)
def test_degrees(world_size: int, flags: dict[str, int], expected: Degrees) -> None:
    degrees = degrees_from_flags(world_size, **flags)  # type: ignore[arg-type]
    assert degrees == expected
    assert degrees.world_size == world_size


@pytest.mark.parametrize(
    ("world_size", "flags", "message"),
    [
        (4, {"tensor_parallel_degree": 3}, "cannot be divided into groups of 3.*one of the degrees 1, 2, 4"),
        (1, {"tensor_parallel_degree": 2}, "with 1 process: .*--num_processes"),
        (6, {"tensor_parallel_degree": 2, "sharding_parallel_degree": 2}, "3 data-parallel ranks.*degrees 1, 3"),
        (4, {"tensor_parallel_degree": 0}, "tensor_parallel_degree is 0"),
        (4, {"sharding_parallel_degree": -2}, "sharding_parallel_degree is -2"),
    ],
)
def test_impossible_degrees_name_those_that_work(world_size: int, flags: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        degrees_from_flags(world_size, **flags)  # type: ignore[arg-type]


def test_models_that_cannot_be_divided() -> None:
    check_model_divides(PUBLISHED_SIZES["176b"], 8)
    with pytest.raises(ConfigError, match=r"16 heads, which cannot be divided by 32.*1, 2, 4, 8, 16 would work"):
        check_model_divides(PUBLISHED_SIZES["560m"], 32)
    uneven = BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=4)
    with pytest.raises(ConfigError, match=r"vocabulary of 50, which cannot be divided by 4.*degrees 1, 2 would work"):
        check_model_divides(uneven, 4)
