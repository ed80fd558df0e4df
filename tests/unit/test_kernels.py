"""The C++ of compiled programs against what it stands for, by value."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from bloomlm.export.formats.pt2 import compile_functions
from bloomlm.export.kernels.operators import attend, compiler_options, decoded_of, few_rows_of
from bloomlm.export.weights import Int4, Int8, Plain, WeightFormat
from bloomlm.runtime.formats.pt2 import instruction_set
from bloomlm.runtime.torch_internals import find_compiler, open_package

pytestmark = pytest.mark.skipif(
    find_compiler() is None or compiler_options() is None, reason="there is no C++ compiler, or no AVX2"
)

FORMATS: dict[str, WeightFormat] = {
    "float32": Plain(torch.float32),
    "float16": Plain(torch.float16),
    "bfloat16": Plain(torch.bfloat16),
    "int8": Int8(),
    "int4": Int4(),
}
SHAPES = [(200, 96), (43, 4416)]
"""Many short rows, and rows of more than one segment; neither is a multiple of a tile or of a vector."""
MATRICES = [(name, shape) for name in FORMATS for shape in SHAPES]

HEAD_DIMS = [64, 80, 20, 3]
"""Whole tiles, tiles and vectors, a vector and numbers, numbers."""

Outputs = dict[tuple[str, tuple[int, int]], tuple[Tensor, Tensor]]
"""Product and decoded matrix, by format and shape."""


class Everything(nn.Module):
    def forward(
        self, xs: list[Tensor], parts: list[dict[str, Tensor]], attentions: list[tuple[Tensor, ...]]
    ) -> list[Tensor]:
        results = []
        for (_, shape), part in zip(MATRICES, parts, strict=True):
            results += [few_rows_of(xs[SHAPES.index(shape)].clone(), part), decoded_of(part)]
        return results + [attend(query[:, :, 1], *others) for query, *others in attentions]


class Compiled:
    """Everything, compiled."""

    def __init__(self, directory: Path) -> None:
        random = torch.Generator().manual_seed(0)
        matrices = [(name, torch.randn(shape, generator=random)) for name, shape in MATRICES]
        for _, matrix in matrices:
            matrix[0] = 1.0  # the largest whole numbers in every column
        self.parts = [FORMATS[name].encode(matrix, name) for name, matrix in matrices]
        rows, batch, slots, room = (Dim(name, min=1, max=1 << 20) for name in "NBSM")
        arguments = ([torch.randn(3, num_in) for _, num_in in SHAPES], self.parts, attention_inputs([2, 0], [5, 3], 7))
        sizes = (
            [{0: rows}] * len(SHAPES),
            [dict.fromkeys(part) for part in self.parts],
            [({0: batch}, {0: slots, 2: room}, {0: slots, 2: room}, None, {0: batch}, {0: batch})] * len(HEAD_DIMS),
        )
        traced = torch.export.export(Everything(), arguments, dynamic_shapes=sizes)
        compile_functions({"everything": traced}, directory / "p.pt2", instruction_set(), lambda share: None)
        self._run = open_package(directory / "p.pt2", "everything")

    def __call__(self, xs: list[Tensor], attentions: list[tuple[Tensor, ...]]) -> tuple[Outputs, list[Tensor]]:
        flat = [tensor for part in self.parts for tensor in part.values()]
        out = self._run([*xs, *flat, *(tensor for given in attentions for tensor in given)])
        products = {key: (out[2 * index], out[2 * index + 1]) for index, key in enumerate(MATRICES)}
        return products, out[2 * len(MATRICES) :]

    def products(self, xs: list[Tensor]) -> Outputs:
        return self(xs, attention_inputs([0], [0], 1))[0]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return Compiled(tmp_path_factory.mktemp("kernels"))


def attention_inputs(rows: list[int], slots: list[int], room: int) -> list[tuple[Tensor, ...]]:
    """For each of HEAD_DIMS queries [B, H, 3, K], of which the second is taken, and attend's other arguments.

    The cache has a row more than is used, and holds NaN behind every row's end.
    """
    random = torch.Generator().manual_seed(room)
    found = []
    for head_dim in HEAD_DIMS:
        query = torch.randn(len(rows), 2, 3, head_dim, generator=random)
        keys, values = (torch.randn(max(rows) + 2, 2, room, head_dim, generator=random) for _ in range(2))
        for row, slot in zip(rows, slots, strict=True):
            keys[row, :, slot + 1 :], values[row, :, slot + 1 :] = torch.nan, torch.nan
        found.append((query, keys, values, torch.tensor([0.5, 0.03]), torch.tensor(rows), torch.tensor(slots)))
    return found


def attention(query: Tensor, keys: Tensor, values: Tensor, slopes: Tensor, rows: Tensor, slots: Tensor) -> list[Tensor]:
    """One row after another in float64, [H * K] each."""
    outs = []
    for q, row, slot in zip(query[:, :, 1].double(), rows.tolist(), slots.tolist(), strict=True):
        k, v = keys[row, :, : slot + 1].double(), values[row, :, : slot + 1].double()
        scores = (k @ q[:, :, None]).squeeze(2) / q.shape[1] ** 0.5 + slopes[:, None].double() * torch.arange(slot + 1)
        outs.append((scores.softmax(-1)[:, None] @ v).flatten())
    return outs


def in_16_bits(x: Tensor) -> Tensor:
    """What few_rows makes of activations that meet int8, with the same roundings to whole numbers."""
    halves = x.unflatten(1, (4, -1))
    largest = halves.abs().amax(-1, keepdim=True)
    return ((halves * (32767 / largest)).round().double() * (largest.double() / 32767)).flatten(1)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 21])
def test_products_are_those_of_the_decoded_matrix(compiled: Compiled, rows: int) -> None:
    random = torch.Generator().manual_seed(rows)
    xs = [torch.randn(rows, num_in, generator=random) for _, num_in in SHAPES]
    for x in xs:
        x[0, 7] = 300.0  # an outlier
        x[-1] = 2.0
    found = compiled.products(xs)
    for (name, shape), part in zip(MATRICES, compiled.parts, strict=True):
        product, decoded = found[name, shape]
        expected = FORMATS[name].decode(part)
        torch.testing.assert_close(decoded, expected, rtol=1e-6, atol=0)
        x = xs[SHAPES.index(shape)]
        exact = (in_16_bits(x) if name == "int8" else x.double()) @ expected.double().t()
        assert (product - exact).norm() / exact.norm() < 2e-6, (name, shape)
        near = x.double() @ expected.double().t()
        assert (product - near).norm() / near.norm() < 1e-3, (name, shape)
        torch.testing.assert_close(few_rows_of(x, part).double(), near, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(compiled: Compiled, value: float) -> None:
    xs = [torch.ones(2, num_in) for _, num_in in SHAPES]
    for x in xs:
        x[1, 3] = value
    for product, _ in compiled.products(xs).values():
        assert torch.isfinite(product[0]).all() and not torch.isfinite(product[1]).any()


def test_zeros_give_zeros(compiled: Compiled) -> None:
    for product, _ in compiled.products([torch.zeros(2, num_in) for _, num_in in SHAPES]).values():
        assert not product.any()


@pytest.mark.parametrize(
    ("rows", "slots", "room"),
    [([0], [0], 1), ([1], [3], 9), ([2, 0, 1], [12, 4, 0], 13), ([0, 3], [129, 63], 200)],
)
def test_attention_is_that_of_the_formula(compiled: Compiled, rows: list[int], slots: list[int], room: int) -> None:
    given = attention_inputs(rows, slots, room)
    _, found = compiled([torch.zeros(1, num_in) for _, num_in in SHAPES], given)
    for arguments, out in zip(given, found, strict=True):
        expected = attention(*arguments)
        torch.testing.assert_close(list(out.double()), expected, rtol=1e-5, atol=1e-6)
        query, keys, values, *others = arguments
        in_python = attend(query[:, :, 1], keys.nan_to_num(), values.nan_to_num(), *others)
        torch.testing.assert_close(list(in_python.double()), expected, rtol=1e-5, atol=1e-6)


def test_attention_to_no_number_is_none(compiled: Compiled) -> None:
    given = attention_inputs([0, 1], [5, 5], 6)
    for _, keys, *_ in given:
        keys[1, 0, 4, 1] = float("nan")
    for out in compiled([torch.zeros(1, num_in) for _, num_in in SHAPES], given)[1]:
        assert torch.isfinite(out[0]).all() and not torch.isfinite(out[1, : out.shape[1] // 2]).any()
