"""Checks of arguments, with messages for people: the argument, what came, what was expected."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Those of images that stand for [0, 1].
INTEGER = (torch.uint8, torch.uint16)


def _is_int(value: Any) -> bool:
    return isinstance(value, (Integral, torch.SymInt)) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    """An int that may have been NumPy's; torch's symbols stay as they are."""
    return value if isinstance(value, (int, torch.SymInt)) else int(value)


def integer(name: str, value: Any, minimum: int) -> int:
    """An int of at least `minimum`."""
    if not _is_int(value):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return _plain(value)


def number(name: str, value: Any, expected: str = "a number") -> float:
    """A real number, which may be NumPy's; `expected` says what else the argument may be."""
    if isinstance(value, bool) or not isinstance(value, (Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be {expected}, got {value!r}")
    return torch.sym_float(value)


def pair(name: str, value: Any, minimum: int) -> tuple[int, int]:
    """An int, or two of them, as two."""
    # The usual cases, at a tenth of the cost.
    if type(value) is int and value >= minimum:
        return value, value
    if type(value) is tuple and [type(v) for v in value] == [int, int] and min(value) >= minimum:
        return value
    values = (value, value) if _is_int(value) else value
    if not isinstance(values, Sequence) or len(values) != 2 or not all(_is_int(v) for v in values):
        raise TypeError(f"{name} must be an int or two ints, got {value!r}")
    if min(values) < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value!r}")
    return _plain(values[0]), _plain(values[1])


def tensor(
    name: str, value: Any, dimensions: Sequence[str], dtypes: Sequence[torch.dtype] = FLOATING
) -> Tensor:
    """A tensor of one of `dtypes`, with as many dimensions as one of `dimensions`, e.g. "[B, N]"."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor{' or '.join(dimensions)}, got {type(value).__name__}")
    for text in dimensions:
        if value.dim() == text.count(",") + 1:
            break
    else:
        raise ValueError(f"{name} must be {' or '.join(dimensions)}, got shape {tuple(value.shape)}")
    if value.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must be one of {names}, got {str(value.dtype).removeprefix('torch.')}")
    return value


def like(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """The same dtype and device as another argument."""
    if value.dtype != other.dtype:
        raise TypeError(
            f"{name} must have the dtype of {other_name}, {other.dtype}, got {value.dtype} "
            "(cast it, or use torch.autocast)"
        )
    device(name, value, other_name, other)


def device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """The device of another argument."""
    if value.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {value.device}")


def shape(name: str, value: Tensor, expected: Sequence[int], meaning: str) -> None:
    """Exactly this shape; `meaning` spells it in symbols."""
    if len(value.shape) != len(expected) or any(a != b for a, b in zip(value.shape, expected, strict=True)):
        raise ValueError(f"{name} must be {meaning} = {tuple(expected)}, got shape {tuple(value.shape)}")


def operand(
    name: str,
    value: Any,
    sizes: Sequence[int],
    meaning: str,
    other_name: str,
    other: Tensor,
    also: torch.dtype | None = None,
) -> None:
    """None, or a tensor of exactly this shape, of the dtype (or `also`) and on the device of another."""
    if value is None:
        return
    usual = isinstance(value, Tensor) and value.shape == sizes
    if usual and value.dtype == other.dtype and value.device == other.device:
        return  # at a fifth of the cost of what follows
    tensor(name, value, [meaning])
    shape(name, value, sizes, meaning)
    if value.dtype == also:
        device(name, value, other_name, other)
    else:
        like(name, value, other_name, other)
