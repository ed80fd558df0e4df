"""Optimizer states in each form are read under the right names and in the right shapes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bloomlm.checkpoint.paddle.importer import ForeignReading, ImportedRun, read_run
from bloomlm.errors import CheckpointError
from bloomlm.model.bloom import BloomForCausalLM
from tests.paddle_files import (
    CONFIG,
    State,
    cut,
    make_model,
    paddle_state,
    random_arrays,
    read_paddle_adapter,
    resume_paddle_adapter,
    variable_names,
    write,
    write_json,
)

MODEL = make_model()
STATE = paddle_state(MODEL)
NAMES = variable_names(CONFIG, {"linear": 98, "layer_norm": 7})
SCHEDULER = {"last_epoch": 13, "last_lr": 0.25}


class Pair:
    """Pickles as the (name, array) tuple of a nested tensor."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __reduce__(self) -> Any:
        return tuple, (self.items,)


def moments(state: State) -> tuple[State, State]:
    """First and second moments: two arrays for each parameter, all different."""
    return {n: a * 3 + 1 for n, a in state.items()}, {n: a * a + 2 for n, a in state.items()}


def optimizer_content(first: State, second: State, names: dict[str, str], middle: str = "") -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name in first:
        content[f"{names[name]}{middle}_moment1_0"] = first[name]
        content[f"{names[name]}{middle}_moment2_0"] = second[name]
        content[f"{names[name]}{middle}_beta1_pow_acc_0"] = np.array([0.9**14], np.float32)
        content[f"{names[name]}{middle}_beta2_pow_acc_0"] = np.array([0.999**14], np.float32)
    return content | {"LR_Scheduler": SCHEDULER}


def assert_moments(state: ImportedRun, parameters: dict[str, torch.Tensor]) -> None:
    assert state.exp_avg.keys() == state.exp_avg_sq.keys() == parameters.keys()
    for name, parameter in parameters.items():
        torch.testing.assert_close(state.exp_avg[name].read(), parameter * 3 + 1, rtol=0, atol=0)
        torch.testing.assert_close(state.exp_avg_sq[name].read(), parameter * parameter + 2, rtol=0, atol=0)


def test_full_model(tmp_path: Path) -> None:
    head = {"lm_head.decoder_weight": NAMES["bloom.word_embeddings.weight"]}
    write(tmp_path / "model_state.pdparams", STATE | {"StructuredToParameterName@@": NAMES | head})
    write(tmp_path / "optimizer.pdopt", optimizer_content(*moments(STATE), NAMES))
    state = read_run(tmp_path, CONFIG)
    assert_moments(state, MODEL.state_dict())
    assert (state.updates, state.learning_rate, state.loss_scale) == (13, 0.25, None)
    assert not state.master_weights


def test_variable_names_are_counted_where_no_file_translates(tmp_path: Path) -> None:
    write(tmp_path / "model_state.pdparams", STATE)
    write(tmp_path / "optimizer.pdopt", optimizer_content(*moments(STATE), NAMES))
    assert_moments(read_run(tmp_path, CONFIG), MODEL.state_dict())


def test_half_precision_run(tmp_path: Path) -> None:
    half = {name: array.astype(np.float16) for name, array in STATE.items()}
    write(tmp_path / "model_state.pdparams", half | {"StructuredToParameterName@@": NAMES})
    content = optimizer_content(*moments(STATE), NAMES, "_fp32_master_0")
    content["master_weights"] = {NAMES[n]: Pair(f"{NAMES[n]}_fp32_master_0", a) for n, a in STATE.items()}
    write(tmp_path / "optimizer.pdopt", content)
    write(tmp_path / "scaler.pdparams", {"scale": np.array([4096.0], np.float32), "incr_count": 3})
    state = read_run(tmp_path, CONFIG)
    assert_moments(state, MODEL.state_dict())
    for name, parameter in MODEL.state_dict().items():
        assert torch.equal(state.master_weights[name].read(), parameter)
    assert state.loss_scale == 4096.0


@pytest.mark.parametrize("sharding", [1, 2])
def test_ranks_and_sharding_groups(tmp_path: Path, sharding: int) -> None:
    first, second = moments(STATE)
    for tp_rank in range(3):
        names = variable_names(CONFIG, {"linear": 10 * tp_rank})
        part = cut(STATE, 3, tp_rank) | {"StructuredToParameterName@@": names}
        write(tmp_path / f"model_state.tp{tp_rank:02d}.pdparams", part)
        parts = [cut(array, 3, tp_rank) for array in (first, second)]
        for group in range(sharding):
            mine = list(STATE)[group::sharding]
            content = optimizer_content(*({n: part[n] for n in mine} for part in parts), names)
            suffix = f"_shard{group:02d}" if sharding > 1 else ""
            write(tmp_path / f"optimizer.tp{tp_rank:02d}{suffix}.pdopt", content)
    assert_moments(read_run(tmp_path, CONFIG), MODEL.state_dict())
    (tmp_path / f"optimizer.tp01{suffix}.pdopt").unlink()
    missing = r"of tensor-parallel rank 1 the optimizer files of sharding groups \[1\] are missing"
    with pytest.raises(CheckpointError, match=missing if sharding > 1 else r"files of ranks \[1\] are missing"):
        read_run(tmp_path, CONFIG)


def test_sharding_without_tensor_parallelism(tmp_path: Path) -> None:
    write(tmp_path / "model_state.pdparams", STATE | {"StructuredToParameterName@@": NAMES})
    first, second = moments(STATE)
    for group in range(2):
        mine = list(STATE)[group::2]
        content = optimizer_content({n: first[n] for n in mine}, {n: second[n] for n in mine}, NAMES)
        write(tmp_path / f"optimizer.shard{group:02d}.pdopt", content)
    assert_moments(read_run(tmp_path, CONFIG), MODEL.state_dict())
    (tmp_path / "optimizer.shard01.pdopt").rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match=r"optimizer\.shard00\.pdopt lacks transformer"):
        read_run(tmp_path, CONFIG)
    (tmp_path / "away").rename(tmp_path / "optimizer.pp01.pdopt")
    with pytest.raises(CheckpointError, match=r"optimizer\.pp01\.pdopt comes from a kind of parallel training"):
        read_run(tmp_path, CONFIG)


def write_adapter(directory: Path, kind: str, state: State, config: dict[str, Any]) -> None:
    names = {name: f"layer_{i}.w_{i}" for i, name in enumerate(state)}
    write_json(directory / f"{kind}_config.json", config)
    write(directory / f"{kind}_model_state.pdparams", state | {"StructuredToParameterName@@": names})
    write(directory / "optimizer.pdopt", optimizer_content(*moments(state), names))


def resumed(directory: Path) -> tuple[BloomForCausalLM, ImportedRun]:
    model = make_model()
    resume_paddle_adapter(model, read_paddle_adapter(directory, CONFIG))
    return model, read_run(directory, CONFIG)


def test_lora_of_era_a(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(CONFIG.n_layer):
        module = f"bloom.h.{layer}.self_attention.query_key_value"
        shapes |= {f"{module}.lora_A": (24, 8), f"{module}.lora_B": (4, 48)}
    config = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": [".*query_key_value.*"],
        "enable_lora_list": [[True, False, True]],
    }
    write_adapter(tmp_path, "lora", random_arrays(shapes), config)
    model, state = resumed(tmp_path)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert state.exp_avg.keys() == trained.keys()
    for name, parameter in trained.items():
        inside = parameter != 0  # lora_B is zero outside its blocks, and so are its moments
        assert inside.all() or name.endswith("lora_B")
        torch.testing.assert_close(state.exp_avg[name].read(), torch.where(inside, parameter * 3 + 1, 0.0))
        torch.testing.assert_close(state.exp_avg_sq[name].read(), torch.where(inside, parameter**2 + 2, 0.0))


@pytest.mark.parametrize("projection", [False, True])
def test_prefix(tmp_path: Path, projection: bool) -> None:
    shapes: dict[str, tuple[int, ...]] = {"0.weight": (5, 96)}
    if projection:
        shapes = {"0.weight": (5, 24), "1.weight": (24, 7), "1.bias": (7,), "3.weight": (7, 96), "3.bias": (96,)}
    config = {"num_prefix_tokens": 5, "num_attention_heads": 6, "num_hidden_layers": 2, "hidden_size": 24}
    config |= {"prefix_projection": projection, "prefix_projection_hidden_size": 7}
    write_adapter(tmp_path, "prefix", random_arrays(shapes), config)
    model, state = resumed(tmp_path)
    assert_moments(state, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad})


def test_weights_that_name_no_variables(tmp_path: Path) -> None:
    state = random_arrays({"0.weight": (5, 96)})
    config = {"num_prefix_tokens": 5, "num_attention_heads": 6, "num_hidden_layers": 2, "hidden_size": 24}
    write_adapter(tmp_path, "prefix", state, config)
    write(tmp_path / "prefix_model_state.pdparams", state)
    with pytest.raises(CheckpointError, match=r"optimizer\.pdopt: the weights beside it do not name their variables"):
        read_run(tmp_path, CONFIG, reading=ForeignReading(trained_tensor_parallel_degree=2))


def test_steps_from_adams_powers(tmp_path: Path) -> None:
    write(tmp_path / "model_state.pdparams", STATE | {"StructuredToParameterName@@": NAMES})
    content = optimizer_content(*moments(STATE), NAMES)
    del content["LR_Scheduler"]
    write(tmp_path / "optimizer.pdopt", content)
    assert read_run(tmp_path, CONFIG).updates == 13
    write(tmp_path / "scheduler.pdparams", SCHEDULER | {"last_epoch": 99})
    assert read_run(tmp_path, CONFIG).updates == 99
    (tmp_path / "scheduler.pdparams").unlink()
    for key in content:
        if "pow_acc" in key:
            content[key] = np.zeros(1, np.float32)
    write(tmp_path / "optimizer.pdopt", content)
    with pytest.raises(CheckpointError, match="how many steps"):
        read_run(tmp_path, CONFIG)


def test_steps_and_losses_of_the_log(tmp_path: Path) -> None:
    """Steps that fp16 skipped are not updates; without optimizer files the number of steps comes from the log."""
    write(tmp_path / "model_state.pdparams", STATE | {"StructuredToParameterName@@": NAMES})
    write(tmp_path / "optimizer.pdopt", optimizer_content(*moments(STATE), NAMES))
    log = [{"step": 15, "loss": 2.5, "epoch": 0.5}, {"step": 15, "eval_loss": 1.0}]
    write_json(tmp_path / "trainer_state.json", {"global_step": 15, "max_steps": 40, "log_history": log})
    state = read_run(tmp_path, CONFIG)
    assert (state.step, state.updates, state.max_steps) == (15, 13, 40)
    assert state.losses == ({"step": 15, "loss": 2.5, "epoch": 0.5},)
    (tmp_path / "optimizer.pdopt").unlink()
    state = read_run(tmp_path, CONFIG)
    assert (state.step, state.updates, state.exp_avg, state.exp_avg_sq) == (15, 15, {}, {})
    assert torch.equal(state.weights["transformer.ln_f.weight"].read(), MODEL.transformer.ln_f.weight)
    (tmp_path / "trainer_state.json").unlink()
    with pytest.raises(CheckpointError, match="says how many steps were made"):
        read_run(tmp_path, CONFIG)
    (tmp_path / "trainer_state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"trainer_state\.json is not readable JSON"):
        read_run(tmp_path, CONFIG)


def test_states_of_other_parameters_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "model_state.pdparams", STATE | {"StructuredToParameterName@@": NAMES})
    other = {name: variable.replace("linear", "conv") for name, variable in NAMES.items()}
    write(tmp_path / "optimizer.pdopt", optimizer_content(*moments(STATE), other))
    with pytest.raises(CheckpointError, match=r"conv_98\.\w_0.* belongs to none of the parameters"):
        read_run(tmp_path, CONFIG)
    write(tmp_path / "optimizer.pdopt", {"linear_98.w_0_velocity_0": np.zeros(1, np.float32)})
    with pytest.raises(CheckpointError, match="which is not part of AdamW's state"):
        read_run(tmp_path, CONFIG)
    write(tmp_path / "optimizer.pdopt", {"LR_Scheduler": SCHEDULER})
    with pytest.raises(CheckpointError, match="no moments of AdamW"):
        read_run(tmp_path, CONFIG)
