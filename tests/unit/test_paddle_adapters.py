"""LoRA of each era and both prefix layouts, compared with slow implementations of their definitions."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bloomlm.adapters.base import adapter_of, apply_adapter
from bloomlm.adapters.lora import LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.checkpoint.adapters.load import load_adapter
from bloomlm.checkpoint.adapters.peft import save_adapter
from bloomlm.checkpoint.paddle.importer import ForeignReading, PrefixLayout, find_adapter
from bloomlm.checkpoint.paddle.prefix import PaddlePrefix
from bloomlm.errors import AdapterError
from bloomlm.model.bloom import BloomForCausalLM
from tests.paddle_files import (
    CONFIG,
    State,
    install_paddle_adapter,
    logits,
    make_model,
    random_arrays,
    read_paddle_adapter,
    resume_paddle_adapter,
    write,
    write_json,
)
from tests.tiny_checkpoint import merged_model

D, L, H, K = CONFIG.hidden_size, CONFIG.n_layer, CONFIG.n_head, CONFIG.head_dim
QKV = "bloom.h.{}.self_attention.query_key_value"
R, ALPHA = 5, 7.0
SLOTS = [[True, False, True], [False, True, False], [True, True, True]]
INSTALLS = [install_paddle_adapter, resume_paddle_adapter]


def lora_config(**more: Any) -> dict[str, Any]:
    values = {"r": R, "lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": [".*query_key_value.*"]}
    return values | {"enable_lora_list": None, "tensor_parallel_degree": -1, "merge_weights": True} | more


def lora_arrays(k: int) -> State:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(L):
        shapes[QKV.format(layer) + ".lora_A"] = (D, k * R)
        shapes[QKV.format(layer) + ".lora_B"] = (R, D * k if k < 3 else 3 * D)
    return random_arrays(shapes)


def names_of(state: State) -> State:
    """A state dict as one process writes it, with variable names."""
    return state | {"StructuredToParameterName@@": {name: f"v_{i}" for i, name in enumerate(state)}}


def write_lora(directory: Path, state: Any, **config: Any) -> Path:
    write_json(directory / "lora_config.json", lora_config(**config))
    write(directory / "lora_model_state.pdparams", state)
    return directory


def add_to_weights(model: BloomForCausalLM, deltas: dict[str, np.ndarray]) -> None:
    with torch.no_grad():
        for module, delta in deltas.items():
            name = module.replace("bloom.", "transformer.", 1)
            model.get_parameter(f"{name}.weight").add_(torch.from_numpy(delta.T.copy()))


def era_a_delta(lora_a: np.ndarray, lora_b: np.ndarray, slots: list[bool], degree: int) -> np.ndarray:
    """The update [in, out]; each rank's columns of lora_B and of the weight are cut into thirds."""
    delta = np.zeros((D, 3 * D), np.float32)
    enabled = [j for j, on in enumerate(slots) if on]
    width = D // degree
    for tp_rank in range(degree):
        own_b = np.split(lora_b, degree, axis=1)[tp_rank]
        for j, slot in enumerate(enabled):
            a, b = lora_a[:, j * R : (j + 1) * R], own_b[:, j * width : (j + 1) * width]
            start = tp_rank * 3 * width + slot * width
            delta[:, start : start + width] = a @ b * (ALPHA / R)
    return delta


def era_m_delta(lora_a: np.ndarray, lora_b: np.ndarray, slots: list[bool]) -> np.ndarray:
    """The update [in, out], made head by head from the enabled parts of query, key and value."""
    delta = np.zeros((D, 3 * D), np.float32)
    enabled = [j for j, on in enumerate(slots) if on]
    column = 0
    for head in range(H):
        for j, slot in enumerate(enabled):
            start = (head * 3 + slot) * K
            a = lora_a[:, j * R : (j + 1) * R]
            delta[:, start : start + K] = a @ lora_b[:, column : column + K] * (ALPHA / R)
            column += K
    return delta


def assert_equals_merged(directory: Path, deltas: dict[str, np.ndarray], **options: Any) -> None:
    """The adapter gives the logits of the base model with updated weights: installed, merged, and through PEFT's files."""
    expected = logits(make_model(), lambda model: add_to_weights(model, deltas))
    assert not torch.allclose(logits(make_model()), expected, atol=0.1)
    assert find_adapter(directory)
    for install in INSTALLS:
        model = make_model()
        install(model, read_paddle_adapter(directory, CONFIG, **options))
        torch.testing.assert_close(logits(model), expected, atol=2e-4, rtol=1e-4)
    saved = directory / "peft"
    saved.mkdir()
    save_adapter(model, saved, "base")
    again = make_model()
    load_adapter(again, saved)
    torch.testing.assert_close(logits(again), expected, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(logits(merged_model(model)), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("slots", SLOTS)
def test_era_a(tmp_path: Path, slots: list[bool]) -> None:
    state = lora_arrays(sum(slots))
    write_lora(tmp_path, names_of(state), enable_lora_list=[slots])
    deltas = {
        QKV.format(i): era_a_delta(state[QKV.format(i) + ".lora_A"], state[QKV.format(i) + ".lora_B"], slots, 1)
        for i in range(L)
    }
    assert_equals_merged(tmp_path, deltas)
    model = make_model()
    install_paddle_adapter(model, read_paddle_adapter(tmp_path, CONFIG))
    config = adapter_of(model)
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha) == (sum(slots) * R, sum(slots) * ALPHA)


@pytest.mark.parametrize("degree", [2, 3])
def test_era_a_trained_by_ranks(tmp_path: Path, degree: int) -> None:
    slots = SLOTS[0]
    state = lora_arrays(2)
    deltas = {
        QKV.format(i): era_a_delta(state[QKV.format(i) + ".lora_A"], state[QKV.format(i) + ".lora_B"], slots, degree)
        for i in range(L)
    }
    merged = write_lora(tmp_path / "merged", state, enable_lora_list=[slots])
    with pytest.raises(AdapterError, match=r"each rank's columns.*--trained_tensor_parallel_degree"):
        read_paddle_adapter(merged, CONFIG)
    assert_equals_merged(merged, deltas, trained_tensor_parallel_degree=degree)
    shards = tmp_path / "shards"
    write_json(shards / "lora_config.json", lora_config(enable_lora_list=[slots], tensor_parallel_degree=degree))
    for tp_rank in range(degree):
        part = {n: np.split(a, degree, axis=1)[tp_rank] if n.endswith("B") else a for n, a in state.items()}
        write(shards / f"lora_model_state.tp{tp_rank:02d}.pdparams", names_of(part))
    assert_equals_merged(shards, deltas)
    with pytest.raises(
        AdapterError, match=f"shards of {degree} tensor-parallel ranks, but trained_tensor_parallel_degree"
    ):
        read_paddle_adapter(shards, CONFIG, trained_tensor_parallel_degree=6)
    (shards / "lora_model_state.tp00.pdparams").unlink()
    with pytest.raises(AdapterError, match=r"files of ranks \[0\] are missing"):
        read_paddle_adapter(shards, CONFIG)


@pytest.mark.parametrize("slots", SLOTS)
def test_era_m(tmp_path: Path, slots: list[bool]) -> None:
    state = lora_arrays(sum(slots))
    write_lora(tmp_path, state, enable_lora_list=[slots], head_dim=K)
    deltas = {
        QKV.format(i): era_m_delta(state[QKV.format(i) + ".lora_A"], state[QKV.format(i) + ".lora_B"], slots)
        for i in range(L)
    }
    assert_equals_merged(tmp_path, deltas)


PLAIN = {"self_attention.query_key_value": (D, 3 * D), "self_attention.dense": (D, D)}
PLAIN |= {"mlp.dense_h_to_4h": (D, 4 * D), "mlp.dense_4h_to_h": (4 * D, D)}


def plain_state() -> tuple[State, dict[str, np.ndarray]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(L):
        for name, (inputs, outputs) in PLAIN.items():
            module = f"bloom.h.{layer}.{name}"
            shapes |= {f"{module}.lora_A": (inputs, R), f"{module}.lora_B": (R, outputs)}
    state = random_arrays(shapes)
    modules = [name.removesuffix(".lora_A") for name in state if name.endswith("A")]
    deltas = {m: state[f"{m}.lora_A"] @ state[f"{m}.lora_B"] * (ALPHA / R) for m in modules}
    return state, deltas


@pytest.mark.parametrize("degree", [1, 2])
def test_plain_lora_of_all_linears(tmp_path: Path, degree: int) -> None:
    state, deltas = plain_state()
    targets = [".*query_key_value.*", ".*dense.*"]
    if degree == 1:
        write_lora(tmp_path, state, target_modules=targets, head_dim=None)
    else:
        write_json(tmp_path / "lora_config.json", lora_config(target_modules=targets, tensor_parallel_degree=2))
        for tp_rank in range(degree):
            part = {}
            for name, array in state.items():
                by_inputs = name.rsplit(".", 2)[1] in ("dense", "dense_4h_to_h")
                if by_inputs and name.endswith("A"):
                    array = np.split(array, degree, axis=0)[tp_rank]
                elif not by_inputs and name.endswith("B"):
                    array = np.split(array, degree, axis=1)[tp_rank]
                part[name] = array
            write(tmp_path / f"lora_model_state.tp{tp_rank:02d}.pdparams", part)
    assert_equals_merged(tmp_path, deltas)


def test_trained_biases_and_modules(tmp_path: Path) -> None:
    state, deltas = plain_state()
    bias, norm = "bloom.h.1.mlp.dense_4h_to_h.bias", "bloom.ln_f.weight"
    more = random_arrays({bias: (D,), norm: (D,)}, seed=1)
    write_lora(tmp_path, state | more, target_modules=[".*dense.*", ".*query_key_value"], trainable_bias="lora")

    def change(model: BloomForCausalLM) -> None:
        add_to_weights(model, deltas)
        with torch.no_grad():
            for name, array in more.items():
                model.get_parameter(name.replace("bloom.", "transformer.")).copy_(torch.from_numpy(array))

    expected = logits(make_model(), change)
    model = make_model()
    install_paddle_adapter(model, read_paddle_adapter(tmp_path, CONFIG))
    torch.testing.assert_close(logits(model), expected, atol=2e-4, rtol=1e-4)
    for install in INSTALLS:
        model = make_model()
        install(model, read_paddle_adapter(tmp_path, CONFIG))
        learned = {name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}
        assert learned == {name.replace("bloom.", "transformer.") for name in more}
    with pytest.raises(AdapterError, match=r"PEFT's files cannot hold transformer\.ln_f\.weight.*merge it"):
        save_adapter(model, tmp_path, "base")
    del more[norm]
    write_lora(tmp_path, state | more, target_modules=[".*dense.*", ".*query_key_value"], trainable_bias="lora")
    expected = logits(make_model(), change)
    model = make_model()
    install_paddle_adapter(model, read_paddle_adapter(tmp_path, CONFIG))
    save_adapter(model, tmp_path, "base")
    again = make_model()
    load_adapter(again, tmp_path)
    torch.testing.assert_close(logits(again), expected, atol=2e-4, rtol=1e-4)
    half = make_model().bfloat16()
    load_adapter(half, tmp_path)
    assert half.get_parameter(bias.replace("bloom.", "transformer.")).dtype == torch.bfloat16
    assert torch.isfinite(logits(half)).all()


def test_slots_by_target_module(tmp_path: Path) -> None:
    """One pattern with slots, one without: the ranks of the plain LoRA differ."""
    state = lora_arrays(2)
    dense = random_arrays(
        {f"bloom.h.{i}.self_attention.dense.lora_{p}": (D, R) if p == "A" else (R, D) for i in range(L) for p in "AB"}
    )
    config = {"target_modules": [".*query_key_value", ".*dense"], "enable_lora_list": [SLOTS[0], None]}
    write_lora(tmp_path, names_of(state | dense), **config)
    deltas = {
        QKV.format(i): era_a_delta(state[QKV.format(i) + ".lora_A"], state[QKV.format(i) + ".lora_B"], SLOTS[0], 1)
        for i in range(L)
    }
    for i in range(L):
        module = f"bloom.h.{i}.self_attention.dense"
        deltas[module] = dense[f"{module}.lora_A"] @ dense[f"{module}.lora_B"] * (ALPHA / R)
    assert_equals_merged(tmp_path, deltas)


def test_lora_of_some_blocks_leaves_the_others(tmp_path: Path) -> None:
    state, deltas = plain_state()
    module = QKV.format(1)
    write_lora(tmp_path, {name: array for name, array in state.items() if name.startswith(module)})
    assert_equals_merged(tmp_path, {module: deltas[module]})


def test_resumed_era_a_trains_its_blocks_only(tmp_path: Path) -> None:
    write_lora(tmp_path, names_of(lora_arrays(2)), enable_lora_list=[SLOTS[0]])
    model = make_model()
    resume_paddle_adapter(model, read_paddle_adapter(tmp_path, CONFIG))
    name = QKV.format(0).replace("bloom.", "transformer.") + ".lora_B"
    parameter = model.get_parameter(name)
    model(torch.arange(8).view(2, 4)).square().sum().backward()
    assert parameter.grad is not None
    outside = torch.ones(3, D, 2, R, dtype=torch.bool)
    outside[0, :, 0] = outside[2, :, 1] = False
    assert (parameter.grad.view(3, D, 2, R)[outside] == 0).all()
    assert (parameter.grad.view(3, D, 2, R)[~outside] != 0).all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 0}, "r 0; expected a whole number"),
        ({"r": 4}, r"lora_A has shape \[24, 5\]; expected \[24, 4\]"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"rslora": True}, "rslora True, which bloomlm does not read"),
        ({"enable_lora_list": [[True, False, True]], "head_dim": 4}, r"expected \[24, 10\]"),
        ({"enable_lora_list": [[True, False, True]], "head_dim": 5}, "head_dim 5 does not divide 72 outputs"),
        ({"enable_lora_list": [[True, False, True]], "head_dim": None}, "head_dim None; expected a whole number"),
        ({"enable_lora_list": [[True], [True]]}, "does not match target_modules"),
        ({"enable_lora_list": [[True, True, True]], "target_modules": ["dense"]}, "matches none of target_modules"),
        ({"enable_lora_list": [["yes"]]}, "expected true and false values"),
        ({"enable_lora_list": [[True, True, True]], "target_modules": ["(x"]}, "is no regular expression"),
        ({"enable_lora_list": [[True, True, True]], "target_modules": [5]}, "expected a text"),
    ],
)
def test_invalid_loras_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    state, _ = plain_state()
    qkv = {name: array for name, array in state.items() if "query_key_value" in name}
    write_lora(tmp_path, qkv, **config)
    with pytest.raises(AdapterError, match=message):
        read_paddle_adapter(tmp_path, CONFIG)


def test_lora_of_another_model(tmp_path: Path) -> None:
    state, _ = plain_state()
    write_lora(tmp_path, {name.replace("h.1", "h.9"): array for name, array in state.items()})
    with pytest.raises(
        AdapterError, match=r"updates bloom\.h\.9\.self_attention\.query_key_value, which is not a linear layer"
    ):
        read_paddle_adapter(tmp_path, CONFIG)
    write_lora(
        tmp_path, {name: array for name, array in state.items() if not name.endswith("1.mlp.dense_4h_to_h.lora_A")}
    )
    with pytest.raises(AdapterError, match="found 7 and 8"):
        read_paddle_adapter(tmp_path, CONFIG)


P, G = 6, 12


def prefix_config(**more: Any) -> dict[str, Any]:
    values = {"num_prefix_tokens": P, "num_attention_heads": H, "num_hidden_layers": L, "hidden_size": D}
    values |= {"prefix_projection": False, "prefix_projection_hidden_size": G, "prefix_dropout": 0.0}
    return values | {"tensor_parallel_degree": -1} | more


def prefix_state(projection: bool) -> State:
    if not projection:
        return random_arrays({"0.weight": (P, 2 * L * D)})
    return random_arrays(
        {"0.weight": (P, D), "1.weight": (D, G), "1.bias": (G,), "3.weight": (G, 2 * L * D), "3.bias": (2 * L * D,)}
    )


def cut_prefix(state: State, degree: int, tp_rank: int) -> State:
    axes = {"0.weight": 0, "1.weight": 1, "1.bias": 0, "3.weight": 0}
    return {n: np.split(a, degree, axis=axes[n])[tp_rank] if n in axes else a for n, a in state.items()}


def encode(state: State) -> np.ndarray:
    if len(state) == 1:
        return state["0.weight"]
    return np.tanh(state["0.weight"] @ state["1.weight"] + state["1.bias"]) @ state["3.weight"] + state["3.bias"]


def keys_values(encoded: np.ndarray, layout: PrefixLayout, degree: int) -> tuple[np.ndarray, np.ndarray]:
    """[L, H, P, K] keys and values, by the operations of PaddleNLP on each rank's heads."""
    keys, values, heads = [], [], H // degree
    for chunk in np.split(encoded, degree, axis=1):
        slots = chunk.reshape(P, 2 * L, heads, K).transpose(1, 0, 2, 3)  # [2L, P, heads, K]
        if layout is PrefixLayout.OLD:
            keys.append(slots[:L].reshape(L, heads, K, P).transpose(0, 1, 3, 2))
            values.append(slots[L:].reshape(L, heads, P, K))
        else:
            keys.append(slots[:L].transpose(0, 2, 1, 3))
            values.append(slots[L:].transpose(0, 2, 1, 3))
    return np.concatenate(keys, axis=1), np.concatenate(values, axis=1)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("layout", list(PrefixLayout))
@pytest.mark.parametrize("degree", [1, 2, 3])
def test_prefix_keys_and_values(tmp_path: Path, layout: PrefixLayout, projection: bool, degree: int) -> None:
    state = prefix_state(projection)
    new = {"multi_query_group_num": None} if layout is PrefixLayout.NEW else {}
    config = prefix_config(prefix_projection=projection, **new)
    merged, shards = tmp_path / "merged", tmp_path / "shards"
    write_json(merged / "prefix_config.json", config)
    write(merged / "prefix_model_state.pdparams", state)
    write_json(shards / "prefix_config.json", config | {"tensor_parallel_degree": degree})
    for tp_rank in range(degree):
        write(shards / f"prefix_model_state.tp{tp_rank:02d}.pdparams", cut_prefix(state, degree, tp_rank))
    keys, values = keys_values(encode(state), layout, degree)
    options: dict[str, Any] = {"prefix_layout": layout} if layout is PrefixLayout.NEW else {}
    for directory, more in ((merged, {"trained_tensor_parallel_degree": degree}), (shards, {})):
        for install in INSTALLS:
            model = make_model()
            install(model, read_paddle_adapter(directory, CONFIG, **options, **more))
            assert isinstance(model.transformer.prefix, nn.Module)
            for layer, (key, value) in enumerate(model.transformer.prefix()):
                np.testing.assert_allclose(key.detach().numpy(), keys[layer], rtol=1e-5, atol=1e-5)
                np.testing.assert_allclose(value.detach().numpy(), values[layer], rtol=1e-5, atol=1e-5)
    saved = tmp_path / "peft"
    saved.mkdir()
    model = make_model()
    install_paddle_adapter(model, read_paddle_adapter(shards, CONFIG, **options))
    save_adapter(model, saved, "base")
    again = make_model()
    load_adapter(again, saved)
    torch.testing.assert_close(logits(again), logits(model))


def test_projection_survives_the_new_layout_only(tmp_path: Path) -> None:
    write_json(tmp_path / "prefix_config.json", prefix_config(prefix_projection=True))
    write(tmp_path / "prefix_model_state.pdparams", names_of(prefix_state(True)))
    for layout, kept in ((PrefixLayout.OLD, False), (PrefixLayout.NEW, True)):
        model = make_model()
        install_paddle_adapter(model, read_paddle_adapter(tmp_path, CONFIG, prefix_layout=layout))
        config = adapter_of(model)
        assert isinstance(config, PrefixConfig)
        assert config.prefix_projection is kept
        resumed = make_model()
        resume_paddle_adapter(resumed, read_paddle_adapter(tmp_path, CONFIG, prefix_layout=layout))
        trained = {name for name, p in resumed.named_parameters() if p.requires_grad}
        assert trained == {
            f"transformer.prefix.{n}"
            for n in (
                "embedding.weight",
                "transform.0.weight",
                "transform.0.bias",
                "transform.2.weight",
                "transform.2.bias",
            )
        }


@pytest.mark.parametrize("kind", ["lora", "old prefix", "new prefix"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """An adapter in half precision computes the same as its numbers in fp32."""
    exact = lora_arrays(2) if kind == "lora" else prefix_state(True)
    rounded = {name: torch.from_numpy(array).to(dtype) for name, array in exact.items()}
    bits = torch.uint16 if dtype is torch.bfloat16 else dtype
    halves = {name: tensor.view(bits).numpy() for name, tensor in rounded.items()}
    options: dict[str, Any] = {} if kind == "lora" else {"prefix_layout": PrefixLayout(kind.split()[0])}
    found = []
    for directory, state in (
        (tmp_path / "half", halves),
        (tmp_path / "fp32", {n: t.float().numpy() for n, t in rounded.items()}),
    ):
        if kind == "lora":
            write_lora(directory, names_of(state), enable_lora_list=[SLOTS[0]])
        else:
            write_json(directory / "prefix_config.json", prefix_config(prefix_projection=True))
            write(directory / "prefix_model_state.pdparams", names_of(state))
        for install in INSTALLS:
            model = make_model()
            install(model, read_paddle_adapter(directory, CONFIG, **options))
            found.append(logits(model))
    # an old prefix is computed in fp32 and rounded once more
    tolerance = 3e-2 if kind == "old prefix" and dtype is torch.bfloat16 else 5e-3 if kind == "old prefix" else 1e-5
    for other in found[1:]:
        assert (found[0] - other).abs().max() < tolerance * found[0].abs().max()


def test_a_directory_of_several_forms_warns_which_one_is_read(tmp_path: Path) -> None:
    state, _ = plain_state()
    write_lora(tmp_path, state, target_modules=[".*query_key_value.*", ".*dense.*"])
    save_adapter(with_prefix := make_model_with_prefix(), tmp_path, "base")
    model = make_model()
    with pytest.warns(UserWarning, match="PEFT's is read, the other is not"):
        load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(with_prefix))
    with pytest.warns(UserWarning), pytest.raises(AdapterError, match="is not read as an adapter in PaddleNLP's files"):
        load_adapter(make_model(), tmp_path, reading=ForeignReading(trained_tensor_parallel_degree=2))


def make_model_with_prefix() -> BloomForCausalLM:
    model = make_model()
    apply_adapter(model, PrefixConfig(num_prefix_tokens=3), torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("layout", list(PrefixLayout))
def test_a_resumed_prefix_is_saved_as_its_keys_and_values(tmp_path: Path, layout: PrefixLayout) -> None:
    """PaddleNLP's encoder orders its columns differently, so PEFT could not use its projection."""
    write_json(tmp_path / "prefix_config.json", prefix_config(prefix_projection=True))
    write(tmp_path / "prefix_model_state.pdparams", names_of(prefix_state(True)))
    model = make_model()
    resume_paddle_adapter(model, read_paddle_adapter(tmp_path, CONFIG, prefix_layout=layout))
    saved = tmp_path / "peft"
    saved.mkdir()
    save_adapter(model, saved, "base")
    again = make_model()
    load_adapter(again, saved)
    torch.testing.assert_close(logits(again), logits(model))
    config = adapter_of(again)
    assert isinstance(config, PrefixConfig) and not config.prefix_projection


def test_prefix_layout_is_detected_or_must_be_given(tmp_path: Path) -> None:
    write(tmp_path / "prefix_model_state.pdparams", names_of(prefix_state(False)))

    def layout(**options: Any) -> PrefixLayout:
        adapter = read_paddle_adapter(tmp_path, CONFIG, **options)
        assert isinstance(adapter, PaddlePrefix)
        return adapter.arrangement.layout

    write_json(tmp_path / "prefix_config.json", prefix_config())
    assert layout() is PrefixLayout.OLD
    write_json(tmp_path / "prefix_config.json", prefix_config(multi_query_group_num=None))
    with pytest.raises(AdapterError, match=r"multi_query_group_num.*2023-07-19.*2023-08-09.*--prefix_layout new"):
        layout()
    np.save(tmp_path / "pre_caches.npy", np.zeros(1))  # written alike by both
    with pytest.raises(AdapterError, match="--prefix_layout"):
        layout()
    assert layout(prefix_layout=PrefixLayout.NEW) is PrefixLayout.NEW
    write(tmp_path / "past_key_values.pdparams", {"past_key_values": np.zeros(1)})
    assert layout() is PrefixLayout.OLD


def test_degree_of_a_merged_prefix_must_be_given(tmp_path: Path) -> None:
    write_json(tmp_path / "prefix_config.json", prefix_config())
    write(tmp_path / "prefix_model_state.pdparams", prefix_state(False))
    with pytest.raises(AdapterError, match=r"own part of the prefix's columns.*--trained_tensor_parallel_degree N"):
        read_paddle_adapter(tmp_path, CONFIG)
    with pytest.raises(AdapterError, match="6 heads cannot be divided among 4 ranks"):
        read_paddle_adapter(tmp_path, CONFIG, trained_tensor_parallel_degree=4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, and the base model has 2"),
        ({"num_prefix_tokens": 7}, r"0\.weight has shape \[6, 96\]; expected \[7, 96\]"),
        ({"num_prefix_tokens": None}, "num_prefix_tokens None"),
        ({"prefix_projection": True}, "lacks 1.weight"),
        ({"multi_query_group_num": 2}, "which no BLOOM has"),
    ],
)
def test_invalid_prefixes_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    write_json(tmp_path / "prefix_config.json", prefix_config(**config))
    write(tmp_path / "prefix_model_state.pdparams", names_of(prefix_state(False)))
    with pytest.raises(AdapterError, match=message):
        read_paddle_adapter(tmp_path, CONFIG)


def test_directories_without_an_adapter_are_refused(tmp_path: Path) -> None:
    assert not find_adapter(tmp_path)
    with pytest.raises(AdapterError, match="found neither"):
        read_paddle_adapter(tmp_path, CONFIG)
    write_json(tmp_path / "lora_config.json", lora_config())
    with pytest.raises(AdapterError, match=r"neither lora_model_state\.pdparams nor"):
        read_paddle_adapter(tmp_path, CONFIG)
    (tmp_path / "lora_model_state.pdparams").write_bytes(b"\x80\x04")
    with pytest.raises(AdapterError, match="cut short"):
        read_paddle_adapter(tmp_path, CONFIG)
    with pytest.raises(AdapterError, match="prefix_layout does not apply"):
        read_paddle_adapter(tmp_path, CONFIG, prefix_layout=PrefixLayout.NEW)
    write_json(tmp_path / "prefix_config.json", prefix_config())
    with pytest.raises(AdapterError, match="found both"):
        read_paddle_adapter(tmp_path, CONFIG)
    (tmp_path / "prefix_config.json").write_text("[]")
    (tmp_path / "lora_config.json").unlink()
    with pytest.raises(AdapterError, match="holds list"):
        read_paddle_adapter(tmp_path, CONFIG)
