"""Names in a checkpoint and paths in a model: the same but for the base model's prefix."""

from collections.abc import Container

from torch import nn


def prefix_of(model: nn.Module) -> str:
    """``"bert"`` for a model of transformers with a head, whose bare model lacks it; or empty."""
    prefix = getattr(model, "base_model_prefix", "")
    return prefix if isinstance(prefix, str) else ""


def resolve(name: str, known: Container[str], prefix: str) -> str | None:
    """``name`` as it is spelled in ``known``: the same, with the prefix, or without; or None."""
    if name in known:
        return name
    if prefix:
        for other in (f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
            if other in known:
                return other
    return None
