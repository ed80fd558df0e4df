"""The few-rows product against the plain one."""

import pytest
import torch
import torch.nn.functional as F

from bloomlm.model.linear import FEW_ROWS, linear


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 4, 8, 48, 49])
def test_every_number_of_rows_equals_the_plain_product(num_rows: int, has_bias: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(num_rows, 32), torch.randn(80, 32)
    bias = torch.randn(80) if has_bias else None
    with torch.no_grad():
        result = linear(x, weight, bias)
    torch.testing.assert_close(result, F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)
    is_column_by_column = result.stride() == (1, num_rows)
    assert is_column_by_column == (num_rows in FEW_ROWS)


def test_training_and_half_precision_take_the_plain_product() -> None:
    x, weight = torch.randn(8, 32), torch.randn(80, 32, requires_grad=True)
    assert linear(x, weight).stride() == (80, 1)
    with torch.no_grad():
        assert linear(x.bfloat16(), weight.bfloat16()).stride() == (80, 1)
