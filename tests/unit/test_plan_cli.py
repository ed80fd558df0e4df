"""`bloomlm plan`: numbers by hand, refusals, what is written."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bloomlm.adapters.base import apply_adapter
from bloomlm.adapters.lora import LoraConfig
from bloomlm.checkpoint.reader import load_model
from bloomlm.cli.main import main
from bloomlm.cli.plan import PlanConfig, find_config, make_plan
from bloomlm.errors import ConfigError
from bloomlm.model.config import PUBLISHED_SIZES, BloomConfig, published_config
from bloomlm.model.quantized import QUANTIZATIONS
from bloomlm.parallel.mesh import Degrees
from bloomlm.parallel.traffic import Links, Traffic, sent_bytes, step_time


def plan_of(**flags: Any) -> Any:
    return make_plan(PlanConfig(**{"model_name_or_path": "bigscience/bloom-560m", **flags}))[0]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("bigscience/bloom", "176b"),
        ("bloomz", "176b"),
        ("bigscience/bloomz-mt", "176b"),
        ("bigscience/bloom-560m", "560m"),
        ("bigscience/bloomz-7b1-mt", "7b1"),
        ("bloomz-7b1-p3", "7b1"),
        ("bloom-1b7", "1b7"),
        ("bloom-176b", "176b"),
    ],
)
def test_published_names(name: str, size: str) -> None:
    assert published_config(name) is PUBLISHED_SIZES[size]


@pytest.mark.parametrize("name", ["bigscience/bloom-2b5", "bloom-7b1-mt", "someone/bloom-7b1", "bloom-", "gpt2"])
def test_other_names(name: str) -> None:
    assert published_config(name) is None
    with pytest.raises(ConfigError, match=r"no published BLOOM.*bigscience/bloom-560m.*name its directory"):
        find_config(name)


def test_a_config_file_or_its_directory(tmp_path: Path) -> None:
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=3, n_head=4)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    for name in (tmp_path, tmp_path / "config.json"):
        assert find_config(str(name)).num_parameters == config.num_parameters
    assert find_config("builtin:tiny").n_layer == 4


def test_a_trimmed_vocabulary() -> None:
    whole, trimmed = plan_of(), plan_of(vocab_size=46_145)
    num_fewer = (250_880 - 46_145) * 1024
    assert whole.num_parameters - trimmed.num_parameters == num_fewer
    assert whole.training.weights - trimmed.training.weights == 4 * num_fewer
    assert whole.prediction.peak > trimmed.prediction.peak + 2 * num_fewer
    with pytest.raises(ConfigError, match="vocabulary of 46145"):
        plan_of(vocab_size=46_145, tensor_parallel_degree=2)


def test_full_tuning_of_560m_by_hand() -> None:
    """One process, fp32: 4 bytes a weight and a gradient, 8 and a count for AdamW."""
    size = PUBLISHED_SIZES["560m"].num_parameters
    memory = plan_of().training
    num_tensors = 2 + 2 + 24 * 12 + 1
    assert (memory.weights, memory.gradients, memory.optimizer) == (4 * size, 4 * size, 8 * size + 4 * num_tensors)
    half = plan_of(bf16=True, fp16_opt_level="O2").training
    assert (half.weights, half.gradients) == (2 * size, 4 * size)
    assert half.optimizer == 12 * size + 4 * num_tensors


def test_an_update_within_the_backward_pass_by_hand() -> None:
    """Without clipping, one gradient of a block exists at a time, and the head's in two factors."""
    load = {"src_length": 500, "tgt_length": 100, "per_device_train_batch_size": 1}
    clipped, fused = (plan_of(max_grad_norm=norm, **load).training for norm in (1.0, 0.0))
    assert (clipped.weights, clipped.optimizer, clipped.activations) == (
        fused.weights,
        fused.optimizer,
        fused.activations,
    )
    assert fused.gradients == 4 * 1024 * 4096
    head, factor = 250_880 * 1024 * 4, 250_880 * 100 * 4
    assert clipped.at_loss - fused.at_loss == head - factor
    assert fused.peak == fused.at_loss < clipped.peak
    # two microbatches, an adapter or 16-bit gradients need them all
    for flags in ({"gradient_accumulation_steps": 2}, {"lora": True}, {"fp16": True}, {"tensor_parallel_degree": 2}):
        assert plan_of(max_grad_norm=0.0, **flags).training == plan_of(**flags).training
    # with more supervised tokens than the hidden size the head's gradient is smaller than its factors
    load["tgt_length"] = 1025
    assert plan_of(max_grad_norm=0.0, **load).training.loss == plan_of(**load).training.loss


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_quantised_base_takes_what_it_takes_when_loaded(quantization: str) -> None:
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes")
    found = plan_of(model_name_or_path="builtin:tiny", lora=True, r=8, base_quantization=quantization)
    model = load_model("builtin:tiny", dtype=torch.float32, quantization=QUANTIZATIONS[quantization])
    apply_adapter(model, LoraConfig(r=8))
    tensors = [*model.parameters(), *model.buffers()]
    assert found.training.weights == sum(tensor.nbytes for tensor in tensors)
    plain = plan_of(model_name_or_path="builtin:tiny", lora=True, r=8)
    assert plain.training.peak - found.training.peak == plain.training.weights - found.training.weights > 0
    assert plain.time == found.time
    with pytest.raises(ConfigError, match=f"--base_quantization {quantization} rounds .* add --lora"):
        plan_of(base_quantization=quantization)


def test_what_ranks_share() -> None:
    whole = plan_of(lora=True, dtype="float32")
    parts = plan_of(lora=True, tensor_parallel_degree=4, dtype="float32")
    # a quarter of nearly everything; norms and half of the biases lie whole on each
    assert whole.training.weights / 4 < parts.training.weights < whole.training.weights / 3.99
    assert parts.prediction.kv_cache == whole.prediction.kv_cache / 4
    assert whole.prediction.kv_cache == 2 * 24 * 1024 * 16 * (64 + 8) * 4


def test_recompute_and_accumulation() -> None:
    plain, recomputed = (plan_of(recompute=recompute) for recompute in (False, True))
    assert recomputed.training.activations < plain.training.activations / 5
    # a third of the blocks' products comes on top
    assert 1.2 < recomputed.time.computing / plain.time.computing < 4 / 3
    twice = plan_of(gradient_accumulation_steps=2)
    assert twice.time.computing == pytest.approx(2 * plain.time.computing)
    assert twice.training.at_loss == plain.training.at_loss + plain.training.gradients


def test_preference_tuning_has_two_documents_a_pair_and_a_reference() -> None:
    flags = {"lora": True, "src_length": 100, "tgt_length": 28}
    four, eight = (plan_of(per_device_train_batch_size=size, **flags) for size in (4, 8))
    found = {name: plan_of(preference=name, per_device_train_batch_size=4, **flags) for name in ("dpo", "orpo", "kto")}
    assert found["dpo"].training == eight.training and found["dpo"].time == eight.time
    assert found["dpo"].num_step_tokens == 8 * 127 and four.reference is None
    # 4 prompts of 99 more labels
    more_labels = 4 * 99 * 2 * 250_880 * 1024 * 2
    assert found["orpo"].time.computing == pytest.approx(eight.time.computing + more_labels / 4e14, rel=1e-9)
    assert found["orpo"].reference is None
    assert found["kto"].training == four.training and found["kto"].time.computing > four.time.computing
    # each parameter of a matrix of a block once for each token, half a product of scores for each token before it
    blocks = 24 * 12 * 1024**2
    scored = 8 * (2 * blocks * 127 + 4 * 24 * 1024 * 127 * 128 // 2 + 2 * 250_880 * 1024 * 28)
    for name in ("dpo", "kto"):
        reference = found[name].reference
        assert reference.seconds_a_step == pytest.approx(scored / 4e14, rel=1e-9)
        assert found[name].training.weights < reference.peak < found[name].training.weights + 2**30
    flags |= {"per_device_train_batch_size": 4, "tensor_parallel_degree": 2}
    alone, scoring = (plan_of(preference=name, **flags) for name in (None, "kto"))
    (scored,) = scoring.traffic[len(alone.traffic) :]
    # 2 sums a block, that of the embedding, and the numbers of the labels
    assert scored.payload_bytes == 4 * (4 * 127 * 1024 * (2 * 24 + 1) + 3 * 4 * 28)
    with pytest.raises(ConfigError, match=r"--label_smoothing 0\.1 with --preference orpo: this loss has none"):
        plan_of(preference="orpo", label_smoothing=0.1)


def test_a_cpu_keeps_less_of_attention() -> None:
    """Per token, head and block 4 x 8 numbers of position columns, and what leaves the operator once instead of twice."""
    gpu, cpu = (plan_of(device=device, per_device_train_batch_size=1) for device in ("auto", "cpu"))
    num_tokens, heads, blocks = 1023, 16, 24
    kept = num_tokens * heads * (blocks * (4 * 8 + 64) + 3 * 8) * 4
    assert gpu.training.activations - cpu.training.activations == kept + num_tokens * heads * (4 * 8 + 64) * 4


def test_a_cpu_holds_linear_weights_that_do_not_learn_in_16_bits() -> None:
    for flags, shrinks in (({"lora": True}, True), ({}, False)):
        gpu, cpu = (plan_of(device=device, bf16=True, **flags).training.weights for device in ("auto", "cpu"))
        assert gpu - cpu == (24 * 12 * 1024**2 * 2 if shrinks else 0)
    gpu, cpu = (plan_of(device=d, bf16=True, lora=True, preference="dpo").reference.peak for d in ("auto", "cpu"))
    assert gpu - cpu == 24 * 12 * 1024**2 * 2


def test_the_largest_batch_fits_and_no_larger_one() -> None:
    flags = {"model_name_or_path": "bigscience/bloom-7b1", "lora": True, "bf16": True, "fp16_opt_level": "O2"}
    for fit in plan_of(**flags).fits:
        assert fit.largest_train_batch_size > 0
        for more in (0, 1):
            batch_sizes = {
                "per_device_train_batch_size": fit.largest_train_batch_size + more,
                "batch_size": fit.largest_batch_size + more,
            }
            plan = plan_of(**flags, **batch_sizes)
            for memory in (plan.training, plan.prediction):
                assert (memory.peak <= fit.gigabytes * 10**9) is (more == 0)
    assert [fit.largest_train_batch_size for fit in plan_of(model_name_or_path="bigscience/bloom").fits] == [0, 0, 0]


def test_what_a_ring_sends() -> None:
    assert sent_bytes("all-reduce", 1000, 4) == 1500
    assert sent_bytes("all-gather", 1000, 4) == sent_bytes("reduce-scatter", 1000, 4) == 750


def test_time_by_hand() -> None:
    links = Links(flops_per_second=100.0, node_bytes_per_second=50.0, network_bytes_per_second=5.0, ranks_per_node=4)
    degrees = Degrees(tp=2, dp_shard=4)
    common: dict[str, Any] = {"what": "", "least_bytes": 0}
    traffic = [
        Traffic(operation="all-reduce", axis="tp", num_ranks=2, payload_bytes=200, **common),
        Traffic(operation="all-gather", axis="dp_shard", num_ranks=4, payload_bytes=400, **common),
        Traffic(operation="all-reduce", axis="all", num_ranks=8, payload_bytes=8, **common),
    ]
    time = step_time(traffic, degrees, links, flops=1000.0)
    # two tp ranks share the work; they are neighbours, and 8 ranks are two machines
    assert (time.computing, time.tensor_parallelism, time.data_parallelism) == (5.0, 4.0, 60.0)
    assert (time.shortest, time.longest) == (60.0, 69.0)
    assert links.bytes_per_second("tp", Degrees(tp=3)) == 50.0
    # groups of 3 on machines of 4: the second one lies on both
    assert links.bytes_per_second("tp", Degrees(tp=3, dp_replicate=2)) == 5.0


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *arguments])
    return int(stopped.value.code or 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "bigscience/bloom-560m", "--tensor_parallel_degree", "32"), "degrees 1, 2, 4, 8, 16 would work"),
        (("--model", "bloom", "--tensor_parallel_degree", "8", "--num_processes", "12"), "groups of 8"),
        (("--model", "bloom", "--sharding", "stage3"), "Add --num_processes"),
        (("--model", "bloom", "--lora", "--prefix_tuning"), "choose one"),
        (("--model", "bloom", "--bf16", "--fp16"), "choose one"),
        (("--model", "bloom", "--batch_size", "0"), "--batch_size is 0"),
        (("--model", "bloom", "--per_device_train_batch_size", "0"), "--per_device_train_batch_size is 0"),
    ],
)
def test_what_cannot_be(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


def test_flags_without_effect_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--r", "8", "--fp16_opt_level", "O2", "--network_bandwidth", "1e9")
    assert run("--model", "bloom-560m", *flags) == 0
    told = capsys.readouterr().err
    for name in ("--r: not used", "--fp16_opt_level O2 is not used", "--network_bandwidth is not used"):
        assert name in told


def test_tables_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    flags = {"tensor_parallel_degree": 2, "num_processes": 4, "sharding": "stage3"}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    assert run("--model", "bigscience/bloom-560m", *words, "--output_file", str(path)) == 0
    told = capsys.readouterr()
    for text in ("2 tensor-parallel x 2 sharded ranks", "KV cache", "141 GB", "reduce-scatter", "tokens/s"):
        assert text in told.out
    written = json.loads(path.read_text())
    expected = plan_of(**flags)
    assert written["training"] == {**dataclasses.asdict(expected.training), "peak": expected.training.peak}
    assert [item["sent_bytes"] for item in written["traffic"]] == [item.sent_bytes for item in expected.traffic]
    assert written["time"]["longest"] == expected.time.longest
    assert written["bloomlm_plan"] == 1
