"""PEFT opens the adapters we write and we open those it writes, to equal logits."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bloomlm.adapters.base import adapter_of, apply_adapter
from bloomlm.adapters.dora import DoraConfig
from bloomlm.adapters.lora import BLOCK_LINEARS, LoraConfig
from bloomlm.adapters.lora_linear import LoRALinear
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.checkpoint.adapters.load import load_adapter
from bloomlm.checkpoint.adapters.peft import save_adapter
from bloomlm.checkpoint.merge import merge_to_directory
from bloomlm.checkpoint.reader import load_model
from bloomlm.errors import AdapterError
from bloomlm.model.bloom import BloomForCausalLM
from tests.parity.conftest import make_pair
from tests.parity.test_checkpoint_transformers import assert_equal_logits, logits_of
from tests.tiny_checkpoint import learned_tensors

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base model's directory that both sides load."""
    merge_to_directory(make_pair()[1], tmp_path / "base")
    return tmp_path / "base"


def randomise(parameters: Any) -> None:
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(0.3 * torch.randn(parameter.shape))


def write_theirs(base: Path, directory: Path, config: peft.PeftConfig, dtype: torch.dtype = torch.float32) -> Any:
    """A PEFT model with a trained-looking adapter, saved."""
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), config)
    randomise(p for p in model.parameters() if p.requires_grad)
    model.save_pretrained(directory)
    return model.eval()


def open_theirs(base: Path, directory: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of missing and unexpected adapter keys
        return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), directory).eval()


def with_adapter(base: Path, config: LoraConfig | PrefixConfig) -> BloomForCausalLM:
    model = load_model(base)
    apply_adapter(model, config)
    randomise(learned_tensors(model).values())
    return model


def save(model: BloomForCausalLM, directory: Path) -> Path:
    directory.mkdir()
    save_adapter(model, directory, "org/base")
    return directory


LORA = {
    "one": {"target_modules": ["query_key_value"]},
    "dense is not dense_h_to_4h": {"target_modules": ["dense"]},
    "three": {"target_modules": ["dense_4h_to_h", "mlp.dense_h_to_4h", "dense"]},
    "expression": {"target_modules": r".*\.(query_key_value|dense_h_to_4h)"},
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ["query_key_value"], "use_rslora": True},
    "patterns": {
        "target_modules": ["query_key_value", "dense"],
        "rank_pattern": {"h.1.self_attention.dense": 2, "query_key_value": 5},
        "alpha_pattern": {r"h\.[02]\.self_attention.dense": 3, "^transformer.h.1.self_attention.query_key_value": 11},
    },
    "biases of its layers": {"target_modules": ["query_key_value", "dense"], "bias": "lora_only"},
    "all biases": {"target_modules": ["dense_h_to_4h"], "bias": "all"},
    "patterns and rslora": {"target_modules": ["dense"], "rank_pattern": {"dense": 9}, "use_rslora": True},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "dora, rslora, patterns and biases": {
        "target_modules": ["query_key_value", "dense_4h_to_h"],
        "use_dora": True,
        "use_rslora": True,
        "rank_pattern": {"query_key_value": 5},
        "bias": "all",
    },
    "rows of the embedding": {"target_modules": ["dense"], "trainable_token_indices": [99, 7, 100]},
    "rows by the name of the layer": {
        "target_modules": "all-linear",
        "use_dora": True,
        "trainable_token_indices": {"word_embeddings": [0, 50]},
    },
    "rows of the head too": {
        "target_modules": ["dense"],
        "trainable_token_indices": {"transformer.word_embeddings": [3], "lm_head": [3]},
    },
}


@pytest.mark.parametrize("options", LORA.values(), ids=LORA.keys())
def test_we_open_lora_that_peft_writes(base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, lora_dropout=0.1, **options)
    theirs = write_theirs(base, tmp_path / "adapter", config)
    ours = load_model(base)
    without = logits_of(ours)
    load_adapter(ours, tmp_path / "adapter")
    assert_equal_logits(ours, theirs)
    assert (logits_of(ours) - without).abs().max() > 0.1  # the adapter acts
    trained = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert len(trained) == sum(
        p.requires_grad for p in peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).parameters()
    )
    # what we write of it is what PEFT wrote
    found = load_file(save(ours, tmp_path / "again") / "adapter_model.safetensors")
    expected = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)
    assert_equal_logits(open_theirs(base, tmp_path / "again"), theirs)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(),
        LoraConfig(r=3, lora_alpha=2.5, target_modules=BLOCK_LINEARS, lora_dropout=0.2),
        LoraConfig(r=8, target_modules=("dense_4h_to_h",), use_rslora=True),
        LoraConfig(
            target_modules=("dense", "query_key_value"),
            rank_pattern={"h.0.self_attention.dense": 1},
            alpha_pattern={"dense": 2.5},
        ),
        DoraConfig(r=3, lora_alpha=2.5, target_modules=BLOCK_LINEARS, lora_dropout=0.2),
        DoraConfig(r=9, target_modules=("dense",), use_rslora=True),
        LoraConfig(trained_tokens=(100, 2, 51)),
        DoraConfig(trained_tokens=(98, 99, 100)),
    ],
)
def test_peft_opens_lora_that_we_write(base: Path, tmp_path: Path, config: LoraConfig) -> None:
    ours = with_adapter(base, config)
    theirs = open_theirs(base, save(ours, tmp_path / "adapter"))
    assert_equal_logits(theirs, ours)
    values = theirs.peft_config["default"]
    assert values.base_model_name_or_path == "org/base"
    assert (values.task_type, values.r, values.lora_dropout) == ("CAUSAL_LM", config.r, config.lora_dropout)
    again = load_model(base)
    load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(logits_of(again), logits_of(ours), rtol=0, atol=0)
    found = adapter_of(again)
    assert type(found) is type(config) and found.alpha == config.alpha
    assert (found.rank_pattern, found.alpha_pattern) == (config.rank_pattern, config.alpha_pattern)
    assert set(found.target_modules) == set(config.target_modules)


GRADIENTS = {
    "lora": {"target_modules": "all-linear"},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "dora of one layer, rslora": {"target_modules": ["dense"], "use_dora": True, "use_rslora": True},
    "lora with dropout": {"target_modules": "all-linear", "lora_dropout": 0.3},
    "rows of the embedding": {"target_modules": ["dense"], "trainable_token_indices": [99, 7, 100, 14]},
    "rows of the embedding and dora": {
        "target_modules": "all-linear",
        "use_dora": True,
        "trainable_token_indices": [0, 7, 8, 77],
    },
    "dora with dropout": {"target_modules": "all-linear", "use_dora": True, "lora_dropout": 0.3},
}


@pytest.mark.parametrize("options", GRADIENTS.values(), ids=GRADIENTS.keys())
def test_loss_and_gradients_are_those_of_peft(base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    theirs = write_theirs(base, tmp_path, peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **options))
    ours = load_model(base)
    load_adapter(ours, tmp_path)
    ids = torch.arange(18).view(2, 9) * 7 % 101
    losses = []
    for model in (theirs.train(), ours.train()):
        torch.manual_seed(3)  # the same elements are dropped
        output = model(ids)
        logits = getattr(output, "logits", output)
        losses.append(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    expected = {
        name.removeprefix("base_model.model.")
        .replace("token_adapter.trainable_tokens_delta", "trained_rows")
        .replace(".default", "")
        .removesuffix(".weight"): p.grad
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    found = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None and gradient.abs().max() > 0
        # sums of both sides are rounded differently, by up to 2.5e-5 of the largest number
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=5e-5 * float(gradient.abs().max()))


def test_dora_starts_where_peft_does(base: Path) -> None:
    ours = load_model(base)
    before = logits_of(ours)
    apply_adapter(ours, DoraConfig(r=4, target_modules=BLOCK_LINEARS))
    torch.testing.assert_close(logits_of(ours), before, rtol=1e-4, atol=1e-4)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", use_dora=True)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    names = [name for name, _ in theirs.named_parameters() if "magnitude" in name]
    assert len(names) == 4 * ours.config.n_layer
    for name in names:
        own = ours.get_parameter(name.removeprefix("base_model.model.").removesuffix(".default.weight"))
        torch.testing.assert_close(own, theirs.get_parameter(name), rtol=1e-6, atol=0)


def test_trained_rows_are_merged_as_peft_merges_them(base: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["dense"], trainable_token_indices=[100, 3, 64])
    theirs = write_theirs(base, tmp_path / "adapter", config)
    ours = load_model(base)
    load_adapter(ours, tmp_path / "adapter")
    merge_to_directory(ours, tmp_path / "merged")
    merged = load_model(tmp_path / "merged")
    assert_equal_logits(merged, ours)
    expected = dict(theirs.merge_and_unload().named_parameters())
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_dora_is_merged_as_peft_merges_it(base: Path, tmp_path: Path, use_rslora: bool) -> None:
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules="all-linear", use_dora=True, use_rslora=use_rslora
    )
    theirs = write_theirs(base, tmp_path / "adapter", config)
    ours = load_model(base)
    load_adapter(ours, tmp_path / "adapter")
    merge_to_directory(ours, tmp_path / "merged")
    merged = load_model(tmp_path / "merged")
    assert_equal_logits(merged, ours)
    expected = dict(theirs.merge_and_unload().named_parameters())
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-6)


def test_old_adapter_files_in_pickle(base: Path, tmp_path: Path) -> None:
    directory = tmp_path / "adapter"
    theirs = write_theirs(base, directory, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["dense"]))
    torch.save(load_file(directory / "adapter_model.safetensors"), directory / "adapter_model.bin")
    (directory / "adapter_model.safetensors").unlink()
    # a configuration of PEFT 0.3 knows less
    values = json.loads((directory / "adapter_config.json").read_text())
    old = (
        "peft_type",
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "bias",
        "fan_in_fan_out",
        "modules_to_save",
    )
    (directory / "adapter_config.json").write_text(json.dumps({key: values[key] for key in old}))
    ours = load_model(base)
    load_adapter(ours, directory)
    assert_equal_logits(ours, theirs)


def test_biases_that_an_old_peft_did_not_save(base: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["dense"], bias="lora_only")
    write_theirs(base, tmp_path, config)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({n: t for n, t in tensors.items() if "bias" not in n}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="bias is 'lora_only', and its weights hold no biases"):
        load_adapter(load_model(base), tmp_path)


def test_fp32_adapter_on_a_bf16_model_keeps_its_precision(base: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["query_key_value"])
    theirs = write_theirs(base, tmp_path / "adapter", config, torch.bfloat16)
    ours = load_model(base, dtype=torch.bfloat16)
    load_adapter(ours, tmp_path / "adapter")
    assert {p.dtype for p in learned_tensors(ours).values()} == {torch.float32}
    assert_equal_logits(ours, theirs, torch.bfloat16)


REFUSED = {
    "modules_to_save": {"modules_to_save": ["ln_f"]},
    "layers_to_transform": {"layers_to_transform": [1], "layers_pattern": "h"},
    "exclude_modules": {"exclude_modules": ["dense"]},
    "lora_bias": {"lora_bias": True},
    "init_lora_weights": {"init_lora_weights": "pissa"},
    r"target_modules.*word_embeddings": {"target_modules": ["query_key_value", "word_embeddings"]},
    r"target_modules.*leaves out transformer.h.0.self_attention.dense": {
        "target_modules": ["h.1.self_attention.dense"]
    },
    r"target_modules.*lm_head": {"target_modules": r".*(lm_head|dense)"},
    "trainable_token_indices": {"trainable_token_indices": {"word_embeddings": [1, 2], "lm_head": [3]}},
}


@pytest.mark.parametrize(("key", "options"), REFUSED.items(), ids=REFUSED.keys())
def test_lora_that_we_cannot_run_is_refused_by_its_key(
    base: Path, tmp_path: Path, key: str, options: dict[str, Any]
) -> None:
    config = peft.LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": ["query_key_value"], **options})
    write_theirs(base, tmp_path / "adapter", config)
    ours = load_model(base)
    with pytest.raises(AdapterError, match=key):
        load_adapter(ours, tmp_path / "adapter")
    assert adapter_of(ours) is None


@pytest.mark.parametrize(
    "config",
    [peft.IA3Config(task_type="CAUSAL_LM"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)],
)
def test_other_kinds_of_adapter_are_refused(base: Path, tmp_path: Path, config: peft.PeftConfig) -> None:
    write_theirs(base, tmp_path / "adapter", config)
    with pytest.raises(AdapterError, match=f"peft_type is '{config.peft_type.value}'; bloomlm reads LORA"):
        load_adapter(load_model(base), tmp_path / "adapter")


@pytest.mark.parametrize("prefix_projection", [False, True])
def test_we_open_a_prefix_that_peft_writes(base: Path, tmp_path: Path, prefix_projection: bool) -> None:
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=prefix_projection, encoder_hidden_size=20
    )
    theirs = write_theirs(base, tmp_path / "adapter", config)
    ours = load_model(base)
    without = logits_of(ours)
    load_adapter(ours, tmp_path / "adapter")
    assert_equal_logits(ours, theirs)
    assert (logits_of(ours) - without).abs().max() > 0.1
    assert adapter_of(ours) == PrefixConfig(num_prefix_tokens=5)
    assert_equal_logits(open_theirs(base, save(ours, tmp_path / "again")), theirs)


@pytest.mark.parametrize("width", [None, 20])
@pytest.mark.parametrize("prefix_projection", [False, True])
def test_peft_opens_a_prefix_that_we_write(
    base: Path, tmp_path: Path, prefix_projection: bool, width: int | None
) -> None:
    config = PrefixConfig(num_prefix_tokens=3, prefix_projection=prefix_projection, prefix_projection_hidden_size=width)
    ours = with_adapter(base, config)
    theirs = open_theirs(base, save(ours, tmp_path / "adapter"))
    assert_equal_logits(theirs, ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefix_resumes_with_its_projection(base: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    config = PrefixConfig(num_prefix_tokens=3, prefix_projection=True, prefix_projection_hidden_size=20)
    ours = load_model(base, dtype=dtype)
    apply_adapter(ours, config)
    randomise(learned_tensors(ours).values())
    again = load_model(base, dtype=dtype)
    state = torch.random.get_rng_state()
    load_adapter(again, save(ours, tmp_path / "adapter"))
    assert torch.equal(torch.random.get_rng_state(), state)  # loading draws nothing from the run's randomness
    assert adapter_of(again) == config
    expected, found = learned_tensors(ours), learned_tensors(again)
    assert found.keys() == expected.keys() and len(found) == 5
    assert all(torch.equal(found[k], expected[k]) and found[k].dtype == dtype for k in found)


def test_projection_of_another_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    directory = save(
        with_adapter(base, PrefixConfig(num_prefix_tokens=3, prefix_projection=True)), tmp_path / "adapter"
    )
    tensors = load_file(directory / "prefix_projection.safetensors")
    tensors["transform.2.bias"] += 0.01
    save_file(tensors, directory / "prefix_projection.safetensors", {"format": "pt"})
    with pytest.raises(AdapterError, match="belong to two adapters"):
        load_adapter(load_model(base), directory)
    (directory / "prefix_projection.safetensors").unlink()
    load_adapter(load_model(base), directory)


def test_prefix_of_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    save(with_adapter(base, PrefixConfig(num_prefix_tokens=3)), tmp_path / "adapter")
    merge_to_directory(make_pair(n_head=6)[1], tmp_path / "other")
    with pytest.raises(AdapterError, match="num_attention_heads is 4; the model needs 6"):
        load_adapter(load_model(tmp_path / "other"), tmp_path / "adapter")


def test_lora_tensors_are_held_against_the_configuration(base: Path, tmp_path: Path) -> None:
    directory = save(with_adapter(base, LoraConfig()), tmp_path / "adapter")
    weights = directory / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = "base_model.model.transformer.h.1.self_attention.query_key_value.lora_A.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, weights)
    with pytest.raises(AdapterError, match=f"1 tensors are missing: {key}"):
        load_adapter(load_model(base), directory)
    save_file(tensors | {key: torch.zeros(2, 32)}, weights)
    with pytest.raises(AdapterError, match=r"lora_A.weight \(found \[2, 32\], expected \[4, 32\]\)"):
        load_adapter(load_model(base), directory)
    save_file(tensors | {"more": torch.zeros(2)}, weights)
    with pytest.raises(AdapterError, match="1 tensors do not belong to it: more"):
        load_adapter(load_model(base), directory)
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(AdapterError, match="cut short"):
        load_adapter(load_model(base), directory)
    weights.unlink()
    with pytest.raises(AdapterError, match=r"neither adapter_model\.safetensors nor adapter_model\.bin"):
        load_adapter(load_model(base), directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("r"), "lacks a value.*'r'"),
        (lambda v: v.update(rank_pattern={"(": 2}), r"'\(' is no regular expression"),
        (lambda v: v.update(target_modules=None), "target_modules is None"),
        (lambda v: v.update(target_modules=["nothing"]), "chooses no layer"),
        (lambda v: v.update(r=0), "expected a number from 1 to"),
        (lambda v: v.update(future_option={"x": 1}), "future_option is"),
    ],
)
def test_configurations_that_make_no_sense(base: Path, tmp_path: Path, change: Any, message: str) -> None:
    directory = save(with_adapter(base, LoraConfig()), tmp_path / "adapter")
    values = json.loads((directory / "adapter_config.json").read_text())
    change(values)
    (directory / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(AdapterError, match=message):
        load_adapter(load_model(base), directory)
    for content, expected in (("{", "cannot be read: Expecting"), ("[]", "holds list")):
        (directory / "adapter_config.json").write_text(content)
        with pytest.raises(AdapterError, match=expected):
            load_adapter(load_model(base), directory)
    with pytest.raises(AdapterError, match=r"has no adapter_config\.json"):
        load_adapter(load_model(base), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_directory_is_the_adapted_model_rounded_once(base: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    config = LoraConfig(r=3, target_modules=BLOCK_LINEARS)
    ours = load_model(base, dtype=dtype)
    apply_adapter(ours, config)
    randomise(learned_tensors(ours).values())
    before = {name: p.clone() for name, p in ours.named_parameters()}
    merge_to_directory(ours, tmp_path / "merged")
    assert all(torch.equal(p, before[name]) for name, p in ours.named_parameters())
    layers = {name: layer for name, layer in ours.named_modules() if isinstance(layer, LoRALinear)}
    for name, parameter in load_model(tmp_path / "merged").named_parameters():
        exact = before[name].double()
        layer = layers.get(name.removesuffix(".weight"))
        if layer is not None and name.endswith(".weight"):
            exact = exact + 2.0 * layer.lora_B.double() @ layer.lora_A.double()
        half_a_step = torch.finfo(dtype).eps / 2
        assert ((parameter.double() - exact).abs() <= exact.abs() * half_a_step * 1.01 + 1e-6).all(), name
    if dtype is torch.float32:
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert_equal_logits(opened, open_theirs(base, save(ours, tmp_path / "adapter")))
        merge_to_directory(ours, tmp_path / "half", dtype=torch.bfloat16)
        merged = dict(load_model(tmp_path / "merged").named_parameters())
        for name, parameter in load_model(tmp_path / "half").named_parameters():
            assert torch.equal(parameter, merged[name].to(torch.bfloat16)), name
    assert math.isfinite(float(logits_of(ours).sum()))


def test_merge_refuses_prefixes_and_foreign_directories(base: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="prefix adapter cannot be merged"):
        merge_to_directory(with_adapter(base, PrefixConfig()), tmp_path / "merged")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    with pytest.raises(Exception, match="holds files but no model"):
        merge_to_directory(load_model(base), tmp_path / "home")
    assert (tmp_path / "home" / "thesis.tex").exists()
    before = logits_of(load_model(base))
    merge_to_directory(load_model(base), base)  # onto the files it is mapped from
    torch.testing.assert_close(logits_of(load_model(base)), before, rtol=0, atol=0)
    with pytest.raises(AdapterError, match="no adapter to save"):
        save_adapter(load_model(base), tmp_path, "x")
