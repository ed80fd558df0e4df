"""The C++ of compiled programs against what it stands for, by value, with the instructions of every level."""

import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from bloomlm.export.formats.pt2 import compile_functions
from bloomlm.export.operators import attend, compiler_options, product_of
from bloomlm.export.weight_formats import Int4, Int8, Plain, WeightFormat
from bloomlm.runtime.formats.pt2 import instruction_set
from bloomlm.runtime.torch_internals import find_compiler, open_package

pytestmark = pytest.mark.skipif(
    find_compiler() is None or compiler_options() is None, reason="there is no C++ compiler, or no AVX2"
)

LEVELS = ("scalar", "avx2", "avxvnni", "avx512", "avx512_bf16")
"""A processor without one of them computes with the highest that it has."""
FORMATS: dict[str, WeightFormat] = {
    "float32": Plain(torch.float32),
    "float16": Plain(torch.float16),
    "bfloat16": Plain(torch.bfloat16),
    "int8": Int8(),
    "int4": Int4(),
}
SHAPES = [(200, 96), (75, 1024), (6, 17_408)]
"""Rows that do not fill vectors, rows that do and are no whole number of tiles, and so long ones that whole numbers of
32 bits cannot hold the sum of a quarter in int8."""
MATRICES = [(name, shape) for name in FORMATS for shape in SHAPES]
MANY = (40, 64, 130)
"""Numbers of rows that the library multiplies: less than a tile, a tile, tiles and a rest."""

HEAD_DIMS = [64, 80, 20, 3]
"""Whole tiles, tiles and vectors, a vector and numbers, numbers."""

Products = dict[tuple[str, tuple[int, int]], Tensor]
"""By format and shape."""


class Everything(nn.Module):
    """Products of all matrices, the same with a bias and with GELU too, and attention."""

    def forward(
        self,
        xs: list[Tensor],
        parts: list[dict[str, Tensor]],
        biases: list[Tensor],
        attentions: list[tuple[Tensor, ...]],
    ) -> list[Tensor]:
        products = [
            product_of(xs[SHAPES.index(shape)].clone(), part) for (_, shape), part in zip(MATRICES, parts, strict=True)
        ]
        finished = [
            product_of(xs[SHAPES.index(shape)], part, biases[SHAPES.index(shape)], is_gelu=is_gelu)
            for (_, shape), part in zip(MATRICES, parts, strict=True)
            for is_gelu in (False, True)
        ]
        return [*products, *finished, *(attend(*selected(*given)) for given in attentions)]


class Compiled:
    """Everything, compiled."""

    def __init__(self, directory: Path) -> None:
        random = torch.Generator().manual_seed(0)
        matrices = [(name, torch.randn(shape, generator=random)) for name, shape in MATRICES]
        for _, matrix in matrices:
            matrix[0] = 1.0  # the largest whole numbers in every column
            matrix[1] = 0.0
        self.parts = [FORMATS[name].encode(matrix, name) for name, matrix in matrices]
        self.biases = [torch.randn(num_out, generator=random) for num_out, _ in SHAPES]
        rows, batch, slots, room = (Dim(name, min=1, max=1 << 20) for name in "NBSM")
        arguments = (
            [torch.randn(3, num_in) for _, num_in in SHAPES],
            self.parts,
            self.biases,
            attention_inputs([2, 0], [5, 3], 7),
        )
        sizes = (
            [{0: rows}] * len(SHAPES),
            [dict.fromkeys(part) for part in self.parts],
            [None] * len(SHAPES),
            [({0: batch}, {0: slots, 2: room}, {0: slots, 2: room}, None, {0: batch}, {0: batch})] * len(HEAD_DIMS),
        )
        traced = torch.export.export(Everything(), arguments, dynamic_shapes=sizes)
        self._path = directory / "p.pt2"
        compile_functions({"everything": traced}, self._path, instruction_set(), lambda share: None)
        self.level = ""

    def open(self, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Compute with the instructions of a level, which is chosen when the package is loaded."""
        if level != self.level:
            monkeypatch.setenv("BLOOMLM_MAX_CPU_ISA", level)
            self.run = open_package(self._path, "everything")
            self.level = level

    def inputs(self, xs: list[Tensor], attentions: list[tuple[Tensor, ...]]) -> list[Tensor]:
        flat = [tensor for part in self.parts for tensor in part.values()]
        return [*xs, *flat, *self.biases, *(tensor for given in attentions for tensor in given)]

    def products(self, xs: list[Tensor]) -> Products:
        return dict(zip(MATRICES, self.run(self.inputs(xs, attention_inputs([0], [0], 1))), strict=False))

    def finished(self, xs: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Of each matrix the product with a bias, and with GELU too."""
        found = self.run(self.inputs(xs, attention_inputs([0], [0], 1)))[len(MATRICES) : 3 * len(MATRICES)]
        return list(zip(found[::2], found[1::2], strict=True))

    def attentions(self, given: list[tuple[Tensor, ...]]) -> list[Tensor]:
        return self.run(self.inputs([torch.zeros(1, num_in) for _, num_in in SHAPES], given))[3 * len(MATRICES) :]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return Compiled(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(params=LEVELS, scope="module")
def level(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture
def compiled(package: Compiled, level: str, monkeypatch: pytest.MonkeyPatch) -> Compiled:
    package.open(level, monkeypatch)
    return package


def selected(query: Tensor, keys: Tensor, values: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """attend's arguments, three of them parts of wider tensors."""
    head_dim = query.shape[3]
    return query[:, :, 1], keys[..., :head_dim], values[..., :head_dim], *others


def attention_inputs(rows: Sequence[int], slots: Sequence[int], room: int) -> list[tuple[Tensor, ...]]:
    """For each of HEAD_DIMS queries [B, H, 3, K], keys and values [R, H, M, K + 8], and attend's other arguments.

    The cache has a row more than is used, and holds NaN behind every row's end.
    """
    random = torch.Generator().manual_seed(room)
    found = []
    for head_dim in HEAD_DIMS:
        query = torch.randn(len(rows), 2, 3, head_dim, generator=random)
        keys, values = (torch.randn(max(rows) + 2, 2, room, head_dim + 8, generator=random) for _ in range(2))
        for row in set(rows):
            end = 1 + max(slot for other, slot in zip(rows, slots, strict=True) if other == row)
            keys[row, :, end:], values[row, :, end:] = torch.nan, torch.nan
        found.append((query, keys, values, torch.tensor([0.5, 0.03]), torch.tensor(rows), torch.tensor(slots)))
    return found


def attention(query: Tensor, keys: Tensor, values: Tensor, slopes: Tensor, rows: Tensor, slots: Tensor) -> list[Tensor]:
    """One token after another in float64, [H * K] each."""
    outs = []
    query, keys, values = selected(query, keys, values)
    for q, row, slot in zip(query.double(), rows.tolist(), slots.tolist(), strict=True):
        k, v = keys[row, :, : slot + 1].double(), values[row, :, : slot + 1].double()
        scores = (k @ q[:, :, None]).squeeze(2) / q.shape[1] ** 0.5 + slopes[:, None].double() * torch.arange(slot + 1)
        outs.append((scores.softmax(-1)[:, None] @ v).flatten())
    return outs


def rounded(x: Tensor, name: str, level: str) -> Tensor:
    """What a product of few rows makes of activations, in float64: whole numbers, with a scale for the row (int8)
    or for each part (int4), or numbers in bfloat16 where the processor multiplies such and rows fill its vectors."""
    if name == "bfloat16" and level == "avx512_bf16" and x.shape[1] % 32 == 0:
        return x.bfloat16().double()
    most, parts = {"int8": (32767, 1), "int4": (127, x.shape[1] // 32)}.get(name, (0, 1))
    if not most:
        return x.double()
    parted = x.unflatten(1, (parts, -1))
    largest = parted.abs().amax(-1, keepdim=True)
    factor = torch.where(largest > 0, most / largest, 0.0)
    return ((parted * factor).round().double() * (largest.double() / most)).flatten(1)


def activations(rows: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(rows)
    xs = [torch.randn(rows, num_in, generator=random) for _, num_in in SHAPES]
    for x in xs:
        x[0, 7] = 300.0  # an outlier
        x[-1] = 2.0
        x[0, 32:64] = 0.0
    return xs


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9, 21])
def test_products_are_those_of_the_decoded_matrix(compiled: Compiled, rows: int) -> None:
    xs = activations(rows)
    found = compiled.products(xs)
    for (name, shape), part in zip(MATRICES, compiled.parts, strict=True):
        x, matrix = xs[SHAPES.index(shape)], FORMATS[name].decode(part).double()
        exact = rounded(x, name, compiled.level) @ matrix.t()
        assert error(found[name, shape], exact) < 2e-6, (name, shape)
        near = x.double() @ matrix.t()
        rounding = {"int8": 1e-3, "int4": 0.03, "bfloat16": 3e-3 if compiled.level == "avx512_bf16" else 2e-6}
        assert error(found[name, shape], near) < rounding.get(name, 2e-6), (name, shape)
        assert error(product_of(x, part), near) < 2e-6, (name, shape)


@pytest.mark.parametrize("rows", MANY)
def test_many_rows_go_through_the_library(compiled: Compiled, rows: int) -> None:
    xs = activations(rows)
    found = compiled.products(xs)
    for (name, shape), part in zip(MATRICES, compiled.parts, strict=True):
        x, matrix = xs[SHAPES.index(shape)], FORMATS[name].decode(part).double()
        in_bfloat16 = compiled.level == "avx512_bf16" and name in ("bfloat16", "int8", "int4")
        assert error(found[name, shape], x.double() @ matrix.t()) < (5e-3 if in_bfloat16 else 2e-6), (name, shape)


@pytest.mark.parametrize("rows", [3, MANY[0]])
def test_bias_and_gelu_are_those_of_the_formula(compiled: Compiled, rows: int) -> None:
    """The largest sums are far beyond those where GELU differs from 0 and from its argument."""
    xs = activations(rows)
    products, finished = compiled.products(xs), compiled.finished(xs)
    for ((name, shape), product), (added, activated) in zip(products.items(), finished, strict=True):
        expected = product + compiled.biases[SHAPES.index(shape)]
        torch.testing.assert_close(added, expected, rtol=1e-6, atol=1e-6, msg=f"{name} {shape}")
        in_python = F.gelu(added.double(), approximate="tanh").float()
        torch.testing.assert_close(activated, in_python, rtol=2e-6, atol=2e-6, msg=f"{name} {shape}")
        assert added.min() < -20 and added.max() > 20


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [2, MANY[0]])
def test_what_is_no_number_stays_none(compiled: Compiled, value: float, rows: int) -> None:
    xs = [torch.ones(rows, num_in) for _, num_in in SHAPES]
    for x in xs:
        x[1, 3] = value
    for (_, (num_out, _)), product in compiled.products(xs).items():
        assert torch.isfinite(product[0]).all() and not torch.isfinite(product[1, [0, *range(2, num_out)]]).any()


def test_zeros_give_zeros(compiled: Compiled) -> None:
    for product in compiled.products([torch.zeros(2, num_in) for _, num_in in SHAPES]).values():
        assert not product.any()


CHUNK = ([1] * 21 + [0] * 5 + [2] + [0], [*range(40, 61), *range(5), 9, 7])
"""Neighbouring tokens of one row, more and fewer than a vector has numbers, and single ones."""
LONG_CHUNKS = ([1] * 300 + [0] * 64 + [2] * 70, [*range(300), *range(100, 164), *range(58, 128)])
"""More tokens than one thread computes together, blocks and tiles that are full and that are not."""


@pytest.mark.parametrize(
    ("rows", "slots", "room"),
    [
        ([0], [0], 1),
        ([1], [3], 9),
        ([2, 0, 1], [12, 4, 0], 13),
        ([0, 3], [129, 63], 200),
        (*CHUNK, 64),
        (*LONG_CHUNKS, 300),
    ],
)
def test_attention_is_that_of_the_formula(compiled: Compiled, rows: list[int], slots: list[int], room: int) -> None:
    given = attention_inputs(rows, slots, room)
    for arguments, out in zip(given, compiled.attentions(given), strict=True):
        expected = attention(*arguments)
        torch.testing.assert_close(list(out.double()), expected, rtol=1e-5, atol=1e-6)
        in_python = attend(*(t.nan_to_num() if t.is_floating_point() else t for t in selected(*arguments)))
        torch.testing.assert_close(list(in_python.double()), expected, rtol=1e-5, atol=1e-6)


def test_far_tokens_keep_their_weight(compiled: Compiled) -> None:
    """Scores of hundreds, and later tokens of a tile with much larger ones, which earlier tokens must not see."""
    rows, slots = [0] * 8, list(range(8))
    given = attention_inputs(rows, slots, 8)
    for query, keys, *_ in given:
        query.mul_(30.0)
        keys[0, :, 7] *= 30.0
    for arguments, out in zip(given, compiled.attentions(given), strict=True):
        torch.testing.assert_close(list(out.double()), attention(*arguments), rtol=1e-3, atol=1e-4)


def test_attention_to_no_number_is_none(compiled: Compiled) -> None:
    given = attention_inputs([0, 1], [5, 5], 6)
    for _, keys, *_ in given:
        keys[1, 0, 4, 1] = float("nan")
    for out in compiled.attentions(given):
        assert torch.isfinite(out[0]).all() and not torch.isfinite(out[1, : out.shape[1] // 2]).any()


def test_other_threads_run_while_a_function_computes(package: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python gives the lock to another thread only where a function releases it, as the interval never ends here."""
    package.open("avx2", monkeypatch)
    inputs = package.inputs([torch.randn(MANY[0], num_in) for _, num_in in SHAPES], attention_inputs([0], [0], 1))
    may_run, has_run = threading.Event(), False

    def other() -> None:
        nonlocal has_run
        may_run.wait()
        has_run = True

    thread = threading.Thread(target=other)
    thread.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        may_run.set()
        for _ in range(2000):
            package.run(inputs)
            if has_run:
                break
        assert has_run
    finally:
        sys.setswitchinterval(interval)
        thread.join()
