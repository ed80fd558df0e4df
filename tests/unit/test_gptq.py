"""Rounding by GPTQ, by value against the published algorithm written column by column, and calibrated programs."""

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bloomlm.adapters.base import Adapter, apply_adapter
from bloomlm.adapters.lora import LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.api import LoadedModel, load
from bloomlm.cli import main as cli
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import CheckpointError, ConfigError, DataError
from bloomlm.export.calibration import MOST_WINDOWS, WINDOW_TOKENS, calibrated_tensors, calibration_windows
from bloomlm.export.gptq import DAMPING, Moments, add_damping, cholesky, round_linear, round_matrix
from bloomlm.export.graph import look_up
from bloomlm.export.program import export_program
from bloomlm.export.weight_formats import GROUP_SIZE, Int4, nearest_int4
from bloomlm.export.weights import FREQUENT, FREQUENT_PLACES, named_tensors, stored_name
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig
from bloomlm.model.documents import Documents
from bloomlm.model.linear import Linear
from bloomlm.runtime.manifest import Manifest
from tests.tiny_checkpoint import merged_model, random_model

DOCS = Path(__file__).parents[2] / "docs"


def correlated_inputs(num_tokens: int, size: int, seed: int = 0) -> Tensor:
    """Inputs of which a few directions have most of the variance, with a mean."""
    random = torch.Generator().manual_seed(seed)
    mixed = torch.randn(num_tokens, size, generator=random) @ torch.randn(size, size, generator=random)
    return mixed * torch.logspace(0, -1.5, size) + torch.randn(size, generator=random)


def damped_covariance(inputs: Tensor) -> Tensor:
    covariance = inputs.double().t().cov(correction=0)
    add_damping(covariance, DAMPING)
    return covariance


def column_by_column(matrix: Tensor, covariance: Tensor) -> Tensor:
    """The decoded result of GPTQ as section 3 of the paper states it, in fp64: after each column the inverse loses it."""
    rest, inverse = matrix.double(), torch.linalg.inv(covariance)
    unit = matrix.abs().amax(dim=1, keepdim=True) / (8 * 127)
    decoded = torch.zeros_like(rest)
    for column in range(matrix.shape[1]):
        if column % GROUP_SIZE == 0:
            group = rest[:, None, column : column + GROUP_SIZE].float()
            scale = nearest_int4(group, lambda s: (s / unit).round().clamp(-127, 127) * unit)[1].double()[:, 0]
        decoded[:, column] = (rest[:, column] / scale).round().clamp(-8, 7) * scale
        error = (rest[:, column] - decoded[:, column]) / inverse[column, column]
        rest = rest - error[:, None] * inverse[column]
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column, column] = 1.0  # not used again
    return decoded.float()


@pytest.mark.parametrize("size", [32, 160])  # 160 columns are more than are corrected at once
def test_it_is_the_published_algorithm(size: int) -> None:
    matrix = torch.randn(6, size, generator=torch.Generator().manual_seed(1))
    covariance = damped_covariance(correlated_inputs(400, size))
    decoded = Int4().decode(round_matrix(matrix, cholesky(covariance, "w"), "w"))
    torch.testing.assert_close(decoded, column_by_column(matrix, covariance), rtol=1e-4, atol=1e-4)
    assert not torch.equal(decoded, Int4().decode(Int4().encode(matrix, "w")))


def test_products_change_less_than_by_rounding_to_the_nearest() -> None:
    matrix = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    inputs, others = correlated_inputs(1000, 96).split(500)
    lower = cholesky(damped_covariance(inputs), "w")
    rounded = Int4().decode(round_matrix(matrix, lower, "w")) - matrix
    nearest = Int4().decode(Int4().encode(matrix, "w")) - matrix
    for x in (inputs, others):
        centred = x - x.mean(0)
        assert (centred @ rounded.t()).norm() < 0.75 * (centred @ nearest.t()).norm()
    assert rounded.norm() > nearest.norm()


def test_uncorrelated_inputs_give_the_nearest() -> None:
    matrix = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    for name, part in round_matrix(matrix, cholesky(2.0 * torch.eye(96).double(), "w"), "w").items():
        assert torch.equal(part, Int4().encode(matrix, "w")[name])


def moments_of(inputs: Tensor, outputs: Tensor) -> Moments:
    moments = Moments(inputs.shape[1], outputs.shape[1])
    for x, y in zip(inputs.split(100), outputs.split(100), strict=True):
        moments.add(x, y)
    return moments


def test_a_layer_makes_up_for_errors_of_its_inputs() -> None:
    linear = Linear(64, 48)
    inputs = correlated_inputs(600, 64)
    # what the layers before have changed: a mix of the inputs is missing, and there is noise
    found = inputs @ (torch.eye(64) + 0.1 * torch.randn(64, 64, generator=torch.Generator().manual_seed(3))) + 0.3
    with torch.no_grad():
        wanted = linear(inputs)
        unaware = (linear(found) - wanted).norm()
        parts = round_linear(linear, moments_of(found, wanted), "w")
        error = (linear(found) - wanted).norm()
        assert torch.equal(linear.weight, Int4().decode(parts))
        torch.testing.assert_close(linear(found).mean(0), wanted.mean(0), rtol=1e-4, atol=1e-4)
    assert error < 0.5 * unaware


def test_inputs_of_zero_are_no_obstacle() -> None:
    linear = Linear(32, 8)
    expected = Int4().encode(linear.weight.data, "w")
    wanted = torch.ones(50, 8)
    parts = round_linear(linear, moments_of(torch.zeros(50, 32), wanted), "w")
    assert torch.equal(parts["weight"], expected["weight"])
    torch.testing.assert_close(linear.bias.data, torch.ones(8))


def test_what_is_not_finite_is_told() -> None:
    with pytest.raises(CheckpointError, match="inputs of w on the calibration text hold NaN"):
        round_linear(Linear(32, 8), moments_of(torch.full((50, 32), float("inf")), torch.ones(50, 8)), "w")
    with pytest.raises(CheckpointError, match="w holds NaN"):
        round_matrix(torch.full((2, 32), float("nan")), torch.eye(32).double(), "w")


def rounded_with_hooks(model: BloomForCausalLM, embedding: Tensor, windows: Tensor) -> dict[str, Tensor]:
    """The weights and biases of the blocks, where both models read all tokens anew for each layer."""
    program = copy.deepcopy(model)
    program.transformer.word_embeddings.weight.data = embedding
    documents = Documents.equal(*windows.shape)
    for layer, block in enumerate(program.transformer.h):
        for name, linear in block.named_modules():
            if isinstance(linear, Linear):
                round_linear(linear, layer_moments(model, program, layer, name, windows.flatten(), documents), name)
    return {name: parameter for name, parameter in program.named_parameters() if ".h." in name}


def layer_moments(
    model: BloomForCausalLM, program: BloomForCausalLM, layer: int, name: str, tokens: Tensor, documents: Documents
) -> Moments:
    """The inputs and wanted outputs of one layer, caught while both models read the tokens."""
    seen: dict[str, Tensor] = {}

    def record(key: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
            seen[f"{key}:in"], seen[f"{key}:out"] = given[0], out

        return hook

    handles = [
        module.register_forward_hook(record(f"{side}.{key}"))
        for side, of in (("model", model), ("program", program))
        for key, module in of.transformer.h[layer].named_modules()
        if key != "mlp.dense_h_to_4h"  # with a hook, GELU would be another pass, which rounds differently
    ]
    model.transformer(tokens, documents)
    program.transformer(tokens, documents)
    for handle in handles:
        handle.remove()
    module = dict(model.transformer.h[layer].named_modules())[name]
    post = model.config.apply_residual_connection_post_layernorm
    norm = "post_attention_layernorm" if "mlp" in name else "input_layernorm"
    if name in ("self_attention.query_key_value", "mlp.dense_h_to_4h"):
        inputs, outputs = seen[f"program.{norm}:out"], module(seen[f"model.{norm}:out"])
    else:
        inputs = seen[f"program.{name}:in"]
        behind = seen["model.:out" if "mlp" in name else "model.post_attention_layernorm:in"]
        outputs = behind - seen[f"program.{norm}:{'out' if post else 'in'}"]
    moments = Moments(inputs.shape[1], outputs.shape[1])
    moments.add(inputs, outputs)
    return moments


def decoded(stored: dict[str, Tensor], name: str) -> Tensor:
    return Int4().decode({suffix: stored[stored_name(name, suffix)] for suffix in ("weight", "scale", "row_scale")})


def looked_up_rows(stored: dict[str, Tensor]) -> Tensor:
    """The embedding [V, D] with what the rows of frequent tokens have besides, one row at a time."""
    table = decoded(stored, "transformer.word_embeddings.weight")
    rest = Int4().decode({suffix: stored[f"{FREQUENT}.{suffix}"] for suffix in ("weight", "scale", "row_scale")})
    for token, place in enumerate(stored[FREQUENT_PLACES].tolist()):
        if place >= 0:
            table[token] += rest[place]
    return table


@pytest.mark.parametrize(
    "adapter",
    [None, LoraConfig(r=2, target_modules=("query_key_value", "dense_h_to_4h")), PrefixConfig(num_prefix_tokens=3)],
    ids=["none", "lora", "prefix"],
)
@pytest.mark.parametrize("post_layernorm", [False, True])
@torch.no_grad()
def test_every_layer_is_rounded_for_what_it_sees(adapter: Adapter | None, post_layernorm: bool) -> None:
    model = random_model(
        BloomConfig(
            vocab_size=101, hidden_size=32, n_layer=2, n_head=4, apply_residual_connection_post_layernorm=post_layernorm
        )
    )
    if adapter is not None:
        apply_adapter(model, adapter, torch.Generator().manual_seed(1))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(2))
    windows = torch.randint(4, 101, (8, 24), generator=torch.Generator().manual_seed(0))
    stored = dict(calibrated_tensors(model.eval(), windows))
    whole = model if adapter is None or adapter.cannot_merge else merged_model(model)
    frequent = [token for token, _ in Counter(windows.flatten().tolist()).most_common(101 // 8)]
    looked_up = looked_up_rows(stored)
    for name, expected in rounded_with_hooks(whole, looked_up, windows).items():
        found = decoded(stored, name) if expected.dim() == 2 else stored[stored_name(name)]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    plain = {name: part.shape for name, part in named_tensors(model, Int4())}
    assert {name: part.shape for name, part in stored.items() if FREQUENT not in name} == plain
    counts = torch.bincount(windows.flatten(), minlength=101)
    assert int(counts[stored[FREQUENT_PLACES] >= 0].sum()) == int(counts[frequent].sum())
    error = (looked_up - whole.transformer.word_embeddings.weight).norm(dim=1)
    assert error[stored[FREQUENT_PLACES] >= 0].max() < 0.2 * error[stored[FREQUENT_PLACES] < 0].min()
    tokens = windows.flatten()[:20]
    assert torch.equal(look_up(tokens, stored, Int4()), looked_up[tokens])


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load("builtin:tiny", dtype="float32")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages of the documentation, which the built-in model reads better than other text."""
    path = tmp_path_factory.mktemp("text") / "pages.txt"
    path.write_text("\n\n".join(page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("*.md")))[:120_000])
    return path


def test_windows_hold_the_first_tokens(loaded: LoadedModel, tmp_path: Path) -> None:
    tokenizer: Tokenizer = loaded.tokenizer
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "One row."}\n{"text": "And another one."}\n' * 2000)
    document = [*tokenizer.encode("One row."), 2, *tokenizer.encode("And another one."), 2]
    windows = calibration_windows(str(path), tokenizer)
    assert windows.shape[1] == WINDOW_TOKENS and len(windows) == min(
        MOST_WINDOWS, 2000 * len(document) // WINDOW_TOKENS
    )
    assert windows.flatten()[: 3 * len(document)].tolist() == 3 * document
    path.write_text('{"text": "One row."}\n')
    with pytest.raises(DataError, match=r"--calibration_file .*rows.jsonl: \d tokens, expected at least 8,192"):
        calibration_windows(str(path), tokenizer)


@pytest.mark.usefixtures("no_compiler")
def test_a_calibrated_program_is_nearer_to_its_model(
    loaded: LoadedModel, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", "--model_name_or_path", "builtin:tiny", "--quantization", "int4"]
    errors = {}
    for name, flags in (("plain", []), ("calibrated", ["--calibration_file", str(text)])):
        with pytest.raises(SystemExit, match="0"):
            cli.main([*command, "--output_path", str(tmp_path / name), *flags])
        errors[name] = Manifest.read(tmp_path / f"{name}.json").parity["logits_error"]
    assert errors["calibrated"] < 0.85 * errors["plain"]
    assert "compared with the model" in capsys.readouterr().out


def test_flags_without_effect_are_refused(loaded: LoadedModel, text: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"quantization": "int8"}, "no effect with --quantization int8"),
        ({"quantization": "none"}, "no effect with --quantization none"),
        ({"quantization": "int4", "format": "gguf"}, "cannot be used with --format gguf"),
    ):
        with pytest.raises(ConfigError, match=message):
            export_program(
                loaded.model, loaded.tokenizer, tmp_path / "bloom", source="tiny", calibration_file=str(text), **options
            )
    assert not list(tmp_path.iterdir())
