"""Finds how each attention of a model makes keys and values, and makes sure by making them again.

What is read: which module gave the values (they lie in its output's memory), which ones normed the
keys, which module made the cosines and sines that the attention was given. What is left open, such
as whether all of a head turns, is tried. A `Route` counts only if it gives the keys and values that
the model itself handed to the cache.
"""

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flashsvd_compile.compress.joint_modules import NarrowHeadsLinear
from flashsvd_compile.compress.modules import (
    FusedPerHeadLowRankLinear,
    LowRankLinear,
    PerHeadLowRankLinear,
)
from flashsvd_compile.latent_cache.base import DynamicLayer, DynamicSlidingWindowLayer
from flashsvd_compile.latent_cache.rotation import POSITIONS, Rotation, X
from flashsvd_compile.latent_cache.route import Norm, Route, Turned, Where
from flashsvd_compile.latent_cache.trial import ModuleCall, Update, try_out

FACTORED = (LowRankLinear, PerHeadLowRankLinear, NarrowHeadsLinear)
_ALLOWED = (
    "LatentCache needs keys and values from two projections of their own, factored by "
    "fsc.compress_ or fsc.load_checkpoint"
)
# The name that transformers' models give to the function by which they turn queries and keys.
_ROTATE = "apply_rotary_pos_emb"
# A position that no context reaches, and float32 holds exactly.
_FAR = 2**24
# Rounding, in units of the dtype's precision at the largest number: the same sums in the same
# order, but for what libraries choose by shape.
_TOLERANCE = 16


@dataclass(frozen=True)
class Reading:
    """One attention module: its `Route`, and what its layer of the cache has to be.

    ``dense_features``: numbers that a dense cache keeps for a token, 2·num_kv_heads·D.
    """

    attention: nn.Module
    route: Route
    rotation: Rotation | None
    sliding_window: int | None
    dense_features: int

    def keeps_with(self, other: "Reading") -> bool:
        """Whether both keep the same tokens, turned by the same angles."""
        return (
            self.rotation is not None
            and other.rotation is not None
            and self.sliding_window == other.sliding_window
            and self.rotation.is_like(other.rotation)
        )


def read(model: Any) -> list[Reading]:
    """One reading for each layer of the cache, in order.

    Raises TypeError and ValueError as `LatentCache` says.
    """
    config: Any = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "get_text_config"):
        raise TypeError(f"model must be a model of transformers, got {type(model).__name__}")
    if config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} has an encoder, whose keys and values cross-attention keeps; "
            "LatentCache takes decoders alone"
        )
    config = config.get_text_config(decoder=True)
    paths = {module: path for path, module in model.named_modules()}
    found: dict[int, tuple[nn.Module, Route, Rotation | None, int]] = {}

    def see(update: Update) -> None:
        attention = update.stack[-1].module
        path = paths.get(attention, type(attention).__name__)
        if update.layer_idx in found:
            raise ValueError(f"{path} updates layer {update.layer_idx} of the cache once more")
        if getattr(attention, "layer_idx", None) != update.layer_idx:
            raise ValueError(f"{path} does not tell its layer of the cache as `layer_idx`")
        route, rotation = _Reader(update, path).read()
        features = update.key_states.shape[1] * update.key_states.shape[3]
        features += update.value_states.shape[1] * update.value_states.shape[3]
        found[update.layer_idx] = (attention, route, rotation, features)

    dense = try_out(model, config, see)
    readings = []
    for index, layer in enumerate(dense.layers):
        if index not in found or type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ValueError(
                f"layer {index} of {type(model).__name__}'s cache is a {type(layer).__name__} that "
                "no attention fills with keys and values of its own; " + _ALLOWED
            )
        attention, route, rotation, features = found[index]
        window = getattr(layer, "sliding_window", None)
        readings.append(Reading(attention, route, rotation, window, features))
    if not readings:
        raise ValueError(f"{type(model).__name__} keeps no keys and values in the cache given")
    return readings


class _Reader:
    """Of one update."""

    def __init__(self, update: Update, path: str) -> None:
        self.update, self.path = update, path
        self.call = update.stack[-1]
        self.attention = self.call.module
        self.names = {module: name for name, module in self.attention.named_children()}

    def read(self) -> tuple[Route, Rotation | None]:
        key_states, value_states = self.update.key_states, self.update.value_states
        value = self._value_call()
        others = [call for call in self.call.calls if call is not value]
        candidates = [
            call
            for call in others
            if type(call.module) in FACTORED and _count(call.output) == key_states.numel()
        ]
        if not candidates:
            raise ValueError(self._without_key(others))
        rotation, turned, ids_name = self._rotation()
        for key in candidates:
            x = self._input_of(key, value)
            for rotate, rotated in self._ways_to_turn(turned):
                route = Route(
                    self.names[key.module], self.names[value.module], value_states.shape[-1],
                    self._norms(key), rotate, rotated, x, ids_name,
                )  # fmt: skip
                if key_states.shape[-1] == value_states.shape[-1] and self._holds(route, turned):
                    return route, rotation if rotate is not None else None
        names = " or ".join(f"`{self.names[call.module]}`" for call in candidates)
        raise ValueError(
            f"{self.path}: its keys are not what comes of {names} by norms and `{_ROTATE}`, so "
            f"they cannot be made again from latents; LatentCache knows projection, norm of the "
            f"features or of heads, and RoPE of all or the first features of a head, in that order"
        )

    def _value_call(self) -> ModuleCall:
        """The call whose output the values are, in another layout."""
        values = self.update.value_states
        place = values.untyped_storage().data_ptr()
        for call in self.call.calls:
            output = call.output
            if isinstance(output, Tensor) and output.untyped_storage().data_ptr() == place:
                break
        else:
            raise ValueError(
                f"{self.path}: its values are not what a projection of its own gives, laid out "
                f"by heads; {_ALLOWED}"
            )
        name = self.names.get(call.module, type(call.module).__name__)
        if isinstance(call.module, FusedPerHeadLowRankLinear) or output.numel() != values.numel():
            raise ValueError(
                f"{self.path}.{name} makes more than values at once, so that no latent is the "
                f"values' own; {_ALLOWED}"
            )
        self._check_factored(call, "values")
        return call

    def _check_factored(self, call: ModuleCall, made: str) -> None:
        if type(call.module) not in FACTORED or call.module not in self.names:
            kind = type(call.module).__name__
            name = self.names.get(call.module, kind)
            allowed = ", ".join(kind.__name__ for kind in FACTORED)
            raise ValueError(
                f"{self.path}.{name}, which makes {made}, is a {kind}, not factored; "
                f"{_ALLOWED} (as {allowed})"
            )

    def _without_key(self, others: list[ModuleCall]) -> str:
        """Why no factored projection gives as many numbers as there are keys."""
        count = self.update.key_states.numel()
        for call in others:
            # A norm gives as many, too; it has no matrix.
            has_matrix = any(p.dim() > 1 for p in call.module.parameters())
            if _count(call.output) == count and has_matrix:
                name, kind = self.names.get(call.module, "?"), type(call.module).__name__
                return (
                    f"{self.path}.{name}, which may make keys, is a {kind}, not factored; "
                    + _ALLOWED
                )
        return f"{self.path}: no projection of its own makes its keys; {_ALLOWED}"

    def _input_of(self, key: ModuleCall, value: ModuleCall) -> str | int:
        """How the attention module is given what both projections read."""
        x = key.args[0] if key.args else None
        if x is not None and value.args and value.args[0] is x:
            for name, given in self.call.kwargs.items():
                if given is x:
                    return name
            for place, given in enumerate(self.call.args):
                if given is x:
                    return place
        raise ValueError(
            f"{self.path}: `{self.names[key.module]}` and `{self.names[value.module]}` do not both "
            "read the input of the module itself, so LatentCache cannot make their latents"
        )

    def _norms(self, key: ModuleCall) -> tuple[Norm, ...]:
        """What read the key projection's output, or a norm of it, in order."""
        batch, tokens = key.output.shape[:2]
        place, norms = key.output.untyped_storage().data_ptr(), []
        for call in self.call.calls:
            read = call.args[0] if call.args else None
            if not isinstance(read, Tensor) or read.untyped_storage().data_ptr() != place:
                continue
            if call.module not in self.names or not isinstance(call.output, Tensor):
                continue
            where: Where = "flat"
            if read.dim() == 4:
                where = "tokens" if read.shape[:2] == (batch, tokens) else "heads"
            norms.append(Norm(self.names[call.module], where))
            place = call.output.untyped_storage().data_ptr()
        return tuple(norms)

    def _ways_to_turn(self, turned: Turned | None) -> Iterator[tuple[Any, int | None]]:
        if turned is not None:
            forward = inspect.unwrap(type(self.attention).forward)
            rotate = forward.__globals__.get(_ROTATE)
            if rotate is not None:
                width = turned[0].shape[-1]
                if width < self.update.key_states.shape[-1]:
                    yield rotate, width
                yield rotate, None
        yield None, None

    def _holds(self, route: Route, turned: Turned | None) -> bool:
        given = route.x
        x = self.call.args[given] if isinstance(given, int) else self.call.kwargs[given]
        try:
            key_latents, value_latents = route.latents(self.attention, x)
            keys = route.keys(self.attention, key_latents, turned if route.rotate else None)
            values = route.values(self.attention, value_latents)
        except (RuntimeError, TypeError, ValueError):  # shapes or arguments that do not fit
            return False
        return _same(keys, self.update.key_states) and _same(values, self.update.value_states)

    def _rotation(self) -> tuple[Rotation | None, Turned | None, str]:
        """The module that made the cosines and sines given to the attention, and those."""
        pairs = [_pair(value) for value in (*self.call.args, *self.call.kwargs.values())]
        given = [pair for pair in pairs if pair is not None]
        for outer in self.update.stack[:-1]:
            for call in outer.calls:
                made = _pair(call.output)
                if made is not None and any(made[0] is x[0] and made[1] is x[1] for x in given):
                    return self._read_rotation(call, made)
        return None, None, "position_ids"

    def _read_rotation(self, call: ModuleCall, made: Turned) -> tuple[Rotation, Turned, str]:
        kind = type(call.module).__name__

        def generic(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return X if value.is_floating_point() else POSITIONS

        args = tuple(generic(value) for value in call.args)
        kwargs = {name: generic(value) for name, value in call.kwargs.items()}
        values = [*call.args, *call.kwargs.values()]
        ids = [v for v in values if isinstance(v, Tensor) and not v.is_floating_point()]
        names = [
            name
            for name, value in self.call.kwargs.items()
            if isinstance(value, Tensor) and len(ids) == 1 and value is ids[0]
        ]
        if not names or ids[0].dim() != 2:
            raise ValueError(
                f"{self.path} is not told the positions, [batch, tokens], by which {kind} turns "
                "its keys, so LatentCache cannot turn them again"
            )
        # On a copy: such modules keep what they last computed.
        rotation = Rotation(copy.deepcopy(call.module), args, kwargs)
        x = next(v for v in values if isinstance(v, Tensor) and v.is_floating_point())
        tokens = ids[0].shape[1]
        rotation.append(torch.cat((ids[0], ids[0].new_full((ids[0].shape[0], 1), _FAR)), dim=1))
        rotation.turn(x, tokens + 1)
        assert rotation.turned is not None
        if not all(_same(a[:, :tokens], b) for a, b in zip(rotation.turned, made, strict=True)):
            told = getattr(call.module, "rope_type", "unknown")
            raise ValueError(
                f"{self.path}: the angles of {kind} (rope_type {told!r}) depend on how far the "
                "positions reach, so keys cannot be turned again later; LatentCache takes kinds "
                "of RoPE with fixed frequencies, such as 'default', 'linear', 'llama3' and 'yarn'"
            )
        return Rotation(call.module, args, kwargs), made, names[0]


def _count(output: Any) -> int:
    return output.numel() if isinstance(output, Tensor) else -1


def _pair(value: Any) -> Turned | None:
    is_pair = isinstance(value, tuple) and len(value) == 2
    return value if is_pair and all(isinstance(x, Tensor) for x in value) else None


def _same(got: Tensor, want: Tensor) -> bool:
    """Whether they are equal but for rounding."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    gap = (got.double() - want.double()).abs().max()
    return bool(gap <= _TOLERANCE * torch.finfo(want.dtype).eps * want.double().abs().max())
