"""What launchers refuse: operands that do not belong together, buffers that do not fit."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def validate_operands(
    operands: Any, expected: Mapping[str, tuple[int | None, ...]], like: str
) -> None:
    """Raise ValueError for the first operand, by attribute name, of another shape, dtype or device.

    The operand called ``like`` says which dtype and device; operands that are None are left out.
    """
    first = getattr(operands, like)
    if not first.is_floating_point():
        raise ValueError(f"the operands must be floating point, {like} is {first.dtype}")
    for name, shape in expected.items():
        operand = getattr(operands, name)
        if operand is None:
            continue
        if tuple(operand.shape) != shape:
            raise ValueError(
                f"{name} must be {list(shape)} beside {like} {list(first.shape)}, "
                f"is {list(operand.shape)}"
            )
        if (operand.dtype, operand.device) != (first.dtype, first.device):
            raise ValueError(
                f"all operands must share {like}'s dtype and device ({first.dtype}, "
                f"{first.device}); {name} is {operand.dtype}, {operand.device}"
            )


def validate_output(out: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Raise ValueError unless ``out`` has that ``shape``, and the dtype and device of ``like``."""
    if tuple(out.shape) != shape or (out.dtype, out.device) != (like.dtype, like.device):
        raise ValueError(
            f"out must be {list(shape)} of {like.dtype} on {like.device}, "
            f"is {list(out.shape)} of {out.dtype} on {out.device}"
        )


def checked_output(out: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """``out``, which must be contiguous, or a new tensor of ``shape`` beside ``like``."""
    if out is None:
        return like.new_empty(shape)
    validate_output(out, shape, like)
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, has strides {out.stride()}")
    return out
