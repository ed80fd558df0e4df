"""The matrix products of bloomlm.model.linear against float64, and when they apply."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bloomlm.kernels import compiled
from bloomlm.kernels.compiled import load_operators, operators
from bloomlm.model.linear import Linear, linear
from bloomlm.model.products import uses_onednn, weight_gradient
from bloomlm.model.remade import LayerNorm, gelu


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 32), (2, 32), (5, 32), (6, 32), (16, 32), (17, 32), (2, 3, 32), (0, 32)])
def test_values_and_gradients_equal_those_of_float64(shape: tuple[int, ...], has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, requires_grad=True)
    weight = torch.randn(80, 32, generator=generator, requires_grad=True)
    bias = torch.randn(80, generator=generator, requires_grad=True) if has_bias else None
    inputs = [tensor for tensor in (x, weight, bias) if tensor is not None]
    out = linear(x, weight, bias)
    outside = torch.randn(out.shape, generator=generator)
    gradients = torch.autograd.grad(out, inputs, outside)

    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = F.linear(*exact_inputs)
    exact_gradients = torch.autograd.grad(exact, exact_inputs, outside.double())
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    for gradient, exact_gradient in zip(gradients, exact_gradients, strict=True):
        torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():  # by our operator, where this process has loaded it
        torch.testing.assert_close(linear(x, weight, bias).double(), exact.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 16, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_in_16_bits_multiplies_fp32(dtype: torch.dtype, rows: int) -> None:
    """Without gradients our operator reads the weight as it is; beside bf16 it may round the input to bf16, too."""
    load_operators()
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, 32, generator=generator), torch.randn(80, 32, generator=generator).to(dtype)
    exact = x.double() @ weight.double().t()
    with torch.inference_mode():
        found = linear(x, weight)
    assert (found - exact).norm() < (3e-3 if dtype is torch.bfloat16 else 1e-6) * exact.norm()
    if (loaded := operators()) is not None:
        assert torch.equal(found, loaded.product(x, weight, None, False))
    x.requires_grad_()
    linear(x, weight).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), weight.double().sum(0).expand(rows, -1), rtol=1e-5, atol=1e-5)


def test_a_frozen_weight_gets_no_gradient_and_keeps_no_input_alive() -> None:
    layer = Linear(32, 80).requires_grad_(False)
    x = torch.randn(8, 32, requires_grad=True)
    out = layer(x)
    if uses_onednn(x, layer.weight):
        assert [saved is None for saved in out.grad_fn.saved_tensors] == [True, False]
    out.sum().backward()
    assert layer.weight.grad is None
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(8, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 32), (2, 30, 32), (0, 32)])
def test_under_autocast_only_products_are_rounded_and_no_copy_is_kept(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Against float64 on the rounded values; what is rounded once more is the result of each product."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, requires_grad=True)
    weight = torch.randn(80, 32, generator=generator, requires_grad=True)
    bias = torch.randn(80, generator=generator, requires_grad=True)
    kept: list[torch.Tensor] = []
    with (
        torch.autocast("cpu", dtype),
        torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor
        ),
    ):
        out = linear(x, weight, bias)
    outside = torch.randn(out.shape, generator=generator).to(dtype)
    gradients = torch.autograd.grad(out, (x, weight, bias), outside)
    assert out.dtype is dtype and {gradient.dtype for gradient in gradients} == {torch.float32}
    assert [tensor.dtype for tensor in kept if tensor.shape == weight.shape] == [torch.float32]

    exact_inputs = [tensor.detach().to(dtype).double().requires_grad_() for tensor in (x, weight, bias)]
    exact = F.linear(*exact_inputs)
    exact_gradients = torch.autograd.grad(exact, exact_inputs, outside.double())
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=unit, atol=unit / 16)
    for gradient, exact_gradient in zip(gradients, exact_gradients, strict=True):
        torch.testing.assert_close(gradient.double(), exact_gradient, rtol=unit, atol=unit / 16)


@pytest.mark.filterwarnings("ignore:TF32")
def test_what_onednn_does_not_serve_takes_the_plain_product() -> None:
    x, weight = torch.randn(8, 32), torch.randn(80, 32)
    if not uses_onednn(x, weight):
        pytest.skip("oneDNN is not used on this platform")
    assert not uses_onednn(x.half(), weight.half())
    assert not uses_onednn(x.double(), weight.double())
    assert not uses_onednn(x.bfloat16(), weight)
    assert not uses_onednn(x[:0], weight)
    assert not uses_onednn(x.to("meta"), weight.to("meta"))
    with torch.backends.mkldnn.flags(enabled=False):
        assert not uses_onednn(x, weight)
        assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_an_exported_program_has_no_operator_of_ours() -> None:
    program = torch.export.export(Linear(32, 80), (torch.randn(8, 32),))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["aten.linear.default"]


@pytest.mark.parametrize("shape", [(4, 32), (8, 32), (17, 32), (2, 3, 32), (0, 32)])
def test_gelu_in_one_pass_has_the_values_of_two(shape: tuple[int, ...]) -> None:
    layer, x = Linear(32, 80), 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = F.gelu(F.linear(x.double(), layer.weight.double(), layer.bias.double()), approximate="tanh")
    with torch.inference_mode():
        torch.testing.assert_close(layer.gelu(x).double(), expected, rtol=1e-5, atol=1e-6)
        with torch.autocast("cpu"):
            torch.testing.assert_close(layer.gelu(x).double(), layer.gelu(x.bfloat16()).double(), rtol=0, atol=0)
            assert layer.gelu(x).dtype is torch.bfloat16
    assert layer.gelu(x).requires_grad
    torch.testing.assert_close(layer.gelu(x).double(), expected, rtol=1e-5, atol=1e-6)


# rows, columns of gradients and x: fewer and more than a tile has, and numbers that fill none
@pytest.mark.parametrize("shape", [(1, 70, 33), (131, 200, 64), (48, 64, 1100), (1040, 65, 80), (2100, 5, 70)])
def test_a_weights_gradient_by_our_operator(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    load_operators()
    loaded = compiled.operators()
    if loaded is None or loaded.weight_gradient is None:
        pytest.skip("there is no C++ compiler, no AVX2, or an old PyTorch")
    calls: list[Tensor] = []

    def counted(grad: Tensor, x: Tensor, out: Tensor) -> None:
        calls.append(out.fill_(torch.nan))
        loaded.weight_gradient(grad, x, out)

    monkeypatch.setattr(compiled, "_loaded", replace(loaded, weight_gradient=counted))
    rows, outs, ins = shape
    generator = torch.Generator().manual_seed(0)
    grad, x = torch.randn(rows, outs + 3, generator=generator)[:, :outs], torch.randn(rows, ins, generator=generator)
    found = weight_gradient(grad, x)
    assert len(calls) == uses_onednn(grad, x)
    torch.testing.assert_close(found.double(), grad.double().t() @ x.double(), rtol=1e-5, atol=2e-4)
    other = weight_gradient(grad.t().contiguous().t(), x)  # the library's
    torch.testing.assert_close(found, other, rtol=1e-5, atol=2e-4)


def learning_layer() -> Linear:
    layer = Linear(12, 7)
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.normal_(generator=torch.Generator().manual_seed(seed))
    return layer


def learning_norm(width: int) -> LayerNorm:
    norm = LayerNorm(width)
    with torch.no_grad():
        for seed, parameter in enumerate(norm.parameters()):
            parameter.normal_(generator=torch.Generator().manual_seed(seed))
    return norm


@pytest.mark.parametrize("learns", [True, False], ids=["learning", "frozen"])
@pytest.mark.parametrize("is_autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("name", ["gelu", "norm"])
def test_a_product_keeps_what_its_input_is_made_of(name: str, is_autocast: bool, learns: bool) -> None:
    """And has the same values and gradients as with the input itself, bit for bit."""
    layer, norm = learning_layer().requires_grad_(learns), learning_norm(12)
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(3)).requires_grad_()
    make = gelu if name == "gelu" else norm
    learned = [p for p in (x, *layer.parameters(), *(norm.parameters() if name == "norm" else ())) if p.requires_grad]
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            made = make(x)
            out = layer(made)
        expected_out = layer(make(x).view_as(x))  # a view carries no recipe
    assert torch.equal(out, expected_out)
    rows_kept = {tensor.data_ptr() for tensor in kept if tensor.shape == x.shape}
    assert rows_kept == {x.data_ptr()}
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
    found, expected = (torch.autograd.grad((each * weights).sum(), learned) for each in (out, expected_out))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
