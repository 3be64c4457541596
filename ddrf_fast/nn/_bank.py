"""What the modules share that hold a bank of kernels [N, O, I/g, kh, kw]."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class BankModule(nn.Module):
    """A module that survives ``model.to(memory_format=torch.channels_last)``.

    That call asks for channels_last of every parameter with 4 or 5 dimensions, and torch refuses 5. Here the
    banks stay contiguous in their own layout, and dtype and device change as asked for.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def apply(t: Tensor) -> Tensor:
            if t.dim() != 5:
                return fn(t)
            try:
                return fn(t)
            except RuntimeError:  # once more as [N O, I/g, kh, kw]; if it is not the layout, it raises again
                # Detached, so that no view holds the parameter, which torch may want to swap.
                kernels = fn(t.detach().flatten(0, 1))
            return kernels.unflatten(0, t.shape[:2]).contiguous().detach()

        return super()._apply(apply, recurse)
