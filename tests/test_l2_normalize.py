"""Scaling vectors to length 1: every instruction set against fp64, and what must not depend on a batch."""

from __future__ import annotations

import pytest
import torch

from fastbert import native, use_backend
from fastbert.ops import l2_normalize
from fastbert.ops.l2_normalize import l2_normalize_ref
from fastbert.testing import assert_within_budget

if not native.available():
    pytest.skip("the native extension was not built", allow_module_level=True)


@pytest.fixture(params=native.require().supported_isas())
def isa(request):
    before = native.isa()
    native.require().set_isa(request.param)
    yield request.param
    native.require().set_isa(before)


def rows(S: int, D: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return (torch.randn(S, D, generator=g) * torch.logspace(-3, 3, S)[:, None]).to(dtype)


def check(x: torch.Tensor, ours: torch.Tensor) -> None:
    assert_within_budget(ours, l2_normalize_ref(x), l2_normalize_ref(x.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("S", "D"), [(1, 1), (3, 15), (5, 384), (300, 65), (2, 1025)])
def test_it_is_within_budget(isa, S, D, dtype):
    x = rows(S, D, dtype)
    y = l2_normalize(x)
    check(x, y)
    assert all(torch.equal(l2_normalize(x[i : i + 1]), y[i : i + 1]) for i in range(S)), "a row alone has other bits"


@pytest.mark.parametrize(
    "mutant",
    [
        lambda x: l2_normalize(x[:, :-1]),
        lambda x: l2_normalize(x) * (1 + 3e-6),
        lambda x: x / x.abs().sum(1, keepdim=True),
        lambda x: l2_normalize(x.flatten()[None]).view(x.shape),
    ],
)
def test_a_mutant_fails(mutant):
    x = rows(5, 384)
    y = torch.nn.functional.pad(mutant(x), (0, x.shape[1] - mutant(x).shape[1]))
    with pytest.raises(AssertionError, match="budget"):
        check(x, y)


def test_zeros_stay_and_nan_and_infinity_come_out_as_in_torch(isa):
    x = rows(6, 40)
    x[0], x[1, 3], x[2, 5], x[3], x[4, 7] = 0, float("nan"), float("inf"), 1e-30, 1e30
    torch.testing.assert_close(l2_normalize(x), l2_normalize_ref(x), equal_nan=True)


def test_gradients_and_other_dtypes_are_the_reference():
    x = rows(3, 8).requires_grad_()
    assert torch.equal(l2_normalize(x), l2_normalize_ref(x))
    assert torch.autograd.gradcheck(l2_normalize, x.detach().double().requires_grad_())
    with torch.no_grad(), use_backend("reference"):
        assert torch.equal(l2_normalize(x), l2_normalize_ref(x))
    with pytest.raises(ValueError, match=r"x must be \(S, D\), got \(8,\)"):
        l2_normalize(x[0])
