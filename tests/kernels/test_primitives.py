"""What the launchers ask of operands: alignment of rows, emptiness, divisibility."""

import pytest
import torch
from flashsvd_compile.kernels.primitives import is_empty, is_multiple, row_alignment
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext


def latent(width: int, start: int, stop: int) -> torch.Tensor:
    return torch.zeros(4, 3, width, dtype=torch.bfloat16)[..., start:stop]


@pytest.mark.parametrize(
    ("operand", "alignment"),
    [
        (latent(64, 0, 40), 16),
        (latent(40, 0, 40), 16),
        (latent(64, 3, 35), 2),
        (latent(64, 20, 44), 8),
        (latent(64, 16, 32), 16),
        (latent(37, 0, 37), 2),
        (latent(36, 0, 36), 8),
        (latent(64, 0, 40).transpose(-1, -2), 1),
        (latent(64, 0, 40).expand(2, 4, 3, 40), 16),
        (latent(64, 0, 40).float(), 16),
        (None, 1),
    ],
)
def test_rows_begin_at_multiples(operand, alignment):
    assert row_alignment(operand) == alignment
    if operand is not None and operand.stride(-1) == 1:
        rows = operand.flatten(0, -2) if operand.dim() == 2 else operand.unbind(0)
        assert all(row.data_ptr() % alignment == 0 for row in rows)


@pytest.mark.parametrize(("start", "alignment"), [(0, 16), (3, 2), (20, 8), (8, 16)])
def test_traced_rows_count_from_where_the_storage_begins(start, alignment):
    with FakeTensorMode():
        assert row_alignment(latent(64, start, start + 24)) == alignment


def test_symbolic_sizes_are_never_guarded():
    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes)
    rows = torch.zeros(6, 10, 40, dtype=torch.bfloat16)
    kinds = [DimDynamic.DYNAMIC, DimDynamic.DYNAMIC, DimDynamic.STATIC]
    traced = mode.from_tensor(rows, symbolic_context=StatelessSymbolicContext(kinds))
    batch, length, _ = traced.shape
    assert isinstance(length, torch.SymInt)
    assert row_alignment(traced) == 16  # both strides are multiples of 40 elements
    assert not is_multiple(length, 2)
    assert is_multiple(batch * 64, 64)
    assert not is_empty(traced)
    assert shapes.guards == []
