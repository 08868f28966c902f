"""Positions of the tokens that are kept, and the cosines and sines that they stand for.

Positions cost 8 bytes a token for all layers that rotate alike; cosines and sines would cost
``2·D`` numbers. They are computed anew by the model's own module, once in each forward, so they
are right for every scaled kind of RoPE whose frequencies do not depend on which other positions
are asked for (``reading.py`` refuses the others).
"""

from typing import Any

import torch
from torch import Tensor, nn

from flashsvd_compile.latent_cache.route import Turned

# Stand in a recorded call for the activations and for the position ids.
X, POSITIONS = object(), object()


class Rotation:
    """Of one group of layers, which keep the same tokens and turn by the same angles.

    ``positions``: [B or 1, T]; one row stands for all while they are alike. ``turned`` lives from
    the first layer's update to the last one's.
    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """``args`` and ``kwargs`` of a call of ``module``, with `X` and `POSITIONS` in them."""
        self.module, self.args, self.kwargs = module, args, kwargs
        self.turned: Turned | None = None
        self.empty(torch.device("cpu"))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Rotation":
        """The module is the model's: copies share it."""
        copied = memo[id(self)] = Rotation(self.module, self.args, self.kwargs)
        copied.positions = self.positions.clone()
        return copied

    def is_like(self, other: "Rotation") -> bool:
        """Whether both turn by the same angles."""
        return (
            self.module is other.module
            and len(self.args) == len(other.args)
            and all(a is b or a == b for a, b in zip(self.args, other.args, strict=True))
            and self.kwargs == other.kwargs
        )

    def empty(self, device: torch.device) -> None:
        self.positions = torch.empty((1, 0), dtype=torch.long, device=device)

    def append(self, positions: Tensor) -> None:
        """[B or 1, T] of new tokens."""
        positions = positions.to(torch.long)
        kept = self.positions.to(positions.device)
        if kept.shape[1] == 0:
            # Cut from the new ones so that it has their rows, and that a trace sees the length
            # change from nothing to something.
            kept = positions[:, :0]
        rows = max(kept.shape[0], positions.shape[0])
        self.positions = torch.cat((kept.expand(rows, -1), positions.expand(rows, -1)), dim=1)

    def turn(self, x: Tensor, tokens: int) -> None:
        """Cosines and sines of the last ``tokens``, in the dtype of ``x``."""
        positions = self.positions[:, self.positions.shape[1] - tokens :]

        def given(value: Any) -> Any:
            return x if value is X else positions if value is POSITIONS else value

        args = [given(value) for value in self.args]
        kwargs = {name: given(value) for name, value in self.kwargs.items()}
        cos, sin = self.module(*args, **kwargs)
        self.turned = cos, sin

    def keep_last(self, tokens: int) -> None:
        if self.positions.shape[1] != tokens:
            # In memory of its own: compiled code is made for one offset into another tensor's.
            self.positions = self.positions[:, self.positions.shape[1] - tokens :].clone()

    def drop_last(self, tokens: int) -> None:
        self.positions = self.positions[:, : self.positions.shape[1] - tokens]

    def select(self, rows: Tensor) -> None:
        if self.positions.shape[0] > 1:
            self.positions = self.positions[rows.to(self.positions.device)]

    def repeat_interleave(self, repeats: int) -> None:
        if self.positions.shape[0] > 1:
            self.positions = self.positions.repeat_interleave(repeats, dim=0)
