"""The operators of our own in the model, by value against PyTorch's, and what happens where they cannot be had."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bloomlm.kernels import compiled
from bloomlm.kernels.compiled import Operators, load_operators, operators
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig
from bloomlm.model.linear import Linear, linear

load_operators()
needs_operators = pytest.mark.skipif(operators() is None, reason="there is no C++ compiler, or no AVX2")

LENGTHS = (9, 1, 17)


def use(monkeypatch: pytest.MonkeyPatch, loaded: Operators | None) -> None:
    monkeypatch.setattr(compiled, "_loaded", loaded)


class Counting:
    """An operator that counts its calls."""

    def __init__(self, operator: object) -> None:
        self.operator, self.calls = operator, 0

    def __call__(self, *arguments: Tensor) -> Tensor:
        self.calls += 1
        return self.operator(*arguments)  # type: ignore[operator,no-any-return]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> tuple[Counting, Counting]:
    """Operators for product and attend, which are in use."""
    loaded = operators()
    assert loaded is not None
    product, attend = Counting(loaded.product), Counting(loaded.attend)
    use(monkeypatch, replace(loaded, product=product, attend=attend, causal=None, weight_gradient=None))
    return product, attend


@needs_operators
@pytest.mark.parametrize("num_rows", [1, 3, 16, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_without_gradients_are_those_of_our_operator(
    has_bias: bool, dtype: torch.dtype, num_rows: int, counted: tuple[Counting, Counting]
) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(37, 128, generator=generator)
    x = torch.randn(num_rows, 2, 128, generator=generator)[:, 1]
    bias = torch.randn(37, generator=generator)
    matrix, x, bias = matrix.to(dtype), x.to(dtype), bias.to(dtype)
    exact = F.linear(x.double(), matrix.double(), bias.double() if has_bias else None)
    with torch.no_grad():
        found = linear(x, matrix, bias if has_bias else None)
    assert counted[0].calls == 1
    assert found.dtype is dtype
    # rounded once: half of the distance of neighbouring numbers
    rounding = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(found.double(), exact, rtol=rounding, atol=2e-5)


@needs_operators
@pytest.mark.parametrize("num_rows", [3, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_adds_gelu_in_the_product(
    dtype: torch.dtype, num_rows: int, counted: tuple[Counting, Counting]
) -> None:
    layer = Linear(32, 48).to(dtype)
    x = torch.randn(num_rows, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
        found = layer.gelu(x)
    assert counted[0].calls == 1 and found.dtype is dtype
    rounding = {torch.float32: 0.0, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(found.double(), F.gelu(exact, approximate="tanh"), rtol=rounding, atol=1e-5)


@needs_operators
def test_other_products_are_not(counted: tuple[Counting, Counting]) -> None:
    x, weight = torch.randn(4, 32), torch.randn(8, 32)
    linear(x, weight.requires_grad_())  # autograd needs its own
    with torch.no_grad():
        linear(x.double(), weight.double())
        linear(x, torch.randn(32, 8).t())
        linear(torch.randn(4, 20), torch.randn(8, 20))  # rows that do not fill vectors
        linear(x[:0], weight)
        with torch.autocast("cpu", torch.bfloat16):
            linear(x, weight)
    assert counted[0].calls == 0


def model(**changes: object) -> BloomForCausalLM:
    config = {"vocab_size": 101, "hidden_size": 48, "n_layer": 3, "n_head": 3, "initializer_range": 0.2, **changes}
    made = BloomForCausalLM(BloomConfig(**config))  # type: ignore[arg-type]
    made.init_weights(torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "bias" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(2))
    return made.eval()


def decoded(made: BloomForCausalLM, lengths: Sequence[int]) -> Tensor:
    """Logits [steps, B, V] of rows that do not lie side by side, after prompts of some lengths."""
    opened = made.open_rows(2 * len(lengths), 40)
    rows = [2 * i + 1 for i in range(len(lengths))][::-1]
    prompts = [[(7 * j + length) % 101 for j in range(length)] for length in lengths]
    with torch.inference_mode():
        steps = [opened.prefill(rows, prompts)]
        for i in range(6):
            steps.append(opened.decode_step(rows, torch.tensor([(11 * i + length) % 101 for length in lengths])))
    return torch.stack(steps)


@needs_operators
@pytest.mark.parametrize("post_norm", [False, True])
def test_decoding_gives_what_the_library_gives(
    post_norm: bool, counted: tuple[Counting, Counting], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = model(apply_residual_connection_post_layernorm=post_norm)
    found = decoded(made, LENGTHS)
    assert counted[1].calls == 6 * 3
    use(monkeypatch, None)
    expected = decoded(made, LENGTHS)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@needs_operators
def test_a_row_has_the_logits_that_it_has_alone() -> None:
    made = model()
    together = decoded(made, LENGTHS)
    for i, length in enumerate(LENGTHS):
        torch.testing.assert_close(together[1:, i], decoded(made, [length])[1:, 0], rtol=0, atol=1e-5)


@needs_operators
def test_bfloat16_is_decoded_by_our_operators(counted: tuple[Counting, Counting]) -> None:
    found = decoded(model().bfloat16(), LENGTHS)
    assert counted[0].calls > 0
    assert counted[1].calls == 6 * 3
    torch.testing.assert_close(found.float(), decoded(model().bfloat16().float(), LENGTHS), rtol=0, atol=0.1)


@pytest.mark.parametrize("problem", ["missing compiler", "failing compiler", "no room for the library"])
def test_without_a_library_one_line_says_why(
    problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use(monkeypatch, None)
    monkeypatch.setenv("BLOOMLM_CACHE", str(tmp_path))
    expected = "No such file"
    if problem == "missing compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
        expected = "no C++ compiler 'no-such-compiler' was found; install g++, or set CXX"
    elif problem == "failing compiler":
        compiler = tmp_path / "compiler"
        compiler.write_text("#!/bin/sh\n[ $1 = --version ] || { echo 'x.cpp:1: error: too old' >&2; exit 1; }\n")
        compiler.chmod(0o700)
        monkeypatch.setenv("CXX", str(compiler))
        expected = f"{compiler} fails: x.cpp:1: error: too old"
    else:
        compiler = tmp_path / "compiler"
        compiler.write_text("#!/bin/sh\nexit 0\n")
        compiler.chmod(0o700)
        monkeypatch.setenv("CXX", str(compiler))
        (tmp_path / "kernels").write_text("a file")
        expected = "File exists"
    with caplog.at_level(logging.WARNING):
        load_operators.__wrapped__()
    assert operators() is None
    (message,) = caplog.messages
    assert "PyTorch's operators are used, which are slower" in message
    assert expected in message


@needs_operators
def test_a_library_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("it was compiled again")

    monkeypatch.setattr(compiled, "_compile", refuse)
    assert compiled._library().exists()
