"""The modules of a model without its weights: parameters on the meta device, buffers real.

Layers make their weights with ``torch.empty``; buffers that no checkpoint holds (rotary
frequencies, position ids) are computed from numbers. So while a model is built, ``torch.empty``
alone goes to the meta device: buffers get their values, and no matrix is ever allocated.
"""

import copy
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from flashsvd_compile.checkpoints.errors import CheckpointError, optional_module

# Tools put their name before the model type (palullama, asvd_llama, svdllm-llama).
_TOOLS = re.compile(r"(?:palu|asvd|svdllm|svd|basis_sharing|share|dobi_?svd|low_?rank)[-_]?(.+)")


class _EmptyOnMeta(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def skeleton_of(
    base: Any,
    config: Mapping[str, Any],
    names: Collection[str],
    dtype: torch.dtype | None,
    is_exact: bool = False,
) -> nn.Module:
    """A new model in eval mode without weights.

    Args:
        base: None for what ``config`` says, a module (on any device; it is left as it is), a
            config of transformers, or the name or directory of a model for transformers.
        config: the checkpoint's config.json; its ``architectures`` choose the class where the
            base is a config that has none.
        names: of the checkpoint's tensors. Where no architecture is told, an ``lm_head`` among
            them makes it a causal language model, and all else the bare model.
        dtype: of the weights to come, in which buffers are computed; a config may tell another.
        is_exact: take an architecture for what it says, not for the class that its name ends with.

    Raises `CheckpointError` where transformers does not know the model type or cannot build what
    config.json says, and `TypeError` for a base of another kind.
    """
    if isinstance(base, nn.Module):
        return _copied(base, dtype).eval()
    transformers = optional_module("transformers")
    is_from_file = base is None or isinstance(base, str | Path)
    if base is None:
        base = _known_config(config)
    elif isinstance(base, str | Path):
        # Left open, transformers asks at the terminal whether to run the code beside a config.
        base = transformers.AutoConfig.from_pretrained(base, trust_remote_code=False)
    if not isinstance(base, transformers.PreTrainedConfig):
        raise TypeError(
            "base must be a module, a config of transformers, or the name or directory of a "
            f"model; got {type(base).__name__}"
        )
    base = copy.deepcopy(base)
    if is_from_file:
        # The name of a kernel on the Hub, whose code transformers would load and run.
        base._attn_implementation = base._experts_implementation = None
    kind = _class_for(
        base,
        _architectures(base.architectures or config.get("architectures")),
        has_head=any(name.startswith("lm_head.") for name in names),
        is_exact=is_exact,
    )
    with _told_as_config_error(type(base).__name__):
        return _built(kind, base, dtype).eval()


def skeleton_like(model: Any) -> nn.Module:
    """A new model of the same class and config, without weights."""
    return _built(type(model), copy.deepcopy(model.config))


def _built(kind: Any, config: Any, dtype: torch.dtype | None = None) -> Any:
    initialization = optional_module("transformers.initialization")
    with _EmptyOnMeta(), initialization.no_init_weights():
        model = kind._from_config(config, dtype=dtype or config.dtype)
    # What was made otherwise (ones of a norm) goes, too: all values come from the checkpoint.
    on_meta = _meta_parameters(model)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = on_meta[id(parameter)]
    model.tie_weights()
    return model


def _copied(base: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy whose parameters are on the meta device, tied where those of ``base`` are."""
    model = copy.deepcopy(base, _meta_parameters(base))
    for path, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = _computed_buffer(base, f"{path}.{name}".lstrip("."), dtype)
    return model


def _computed_buffer(base: Any, name: str, dtype: torch.dtype | None) -> torch.Tensor:
    """A buffer that ``base`` has on the meta device and no checkpoint holds, made anew."""
    if hasattr(base, "_from_config"):
        return _built(type(base), copy.deepcopy(base.config), dtype).get_buffer(name)
    raise CheckpointError(
        f"buffer {name} of base is on the meta device and is not stored in checkpoints; build base "
        "with its buffers on a real device"
    )


def _meta_parameters(model: nn.Module) -> dict[int, Any]:
    return {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }


def _architectures(names: Any) -> list[str]:
    if names is None:
        return []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"architectures must be a list of names, got {names!r}")
    return names


@contextmanager
def _told_as_config_error(what: str) -> Iterator[None]:
    """Whatever transformers raises over the values of a config, as one kind of error."""
    try:
        yield
    except (CheckpointError, ImportError):
        raise
    except Exception as error:
        raise CheckpointError(f"transformers cannot make the model of {what}: {error}") from error


def _known_config(config: Mapping[str, Any]) -> Any:
    """config.json as a config of transformers, with the model type that the tool has built on."""
    mapping = optional_module("transformers").models.auto.configuration_auto.CONFIG_MAPPING
    model_type = config.get("model_type")
    if not model_type:
        raise CheckpointError(
            "there is no config.json with a model_type beside the weights; say what the model is "
            "with base="
        )
    if not isinstance(model_type, str):
        raise CheckpointError(f"config.json: model_type must be a string, got {model_type!r}")
    stripped = _TOOLS.fullmatch(model_type)
    names = [model_type] if stripped is None else [model_type, stripped[1]]
    for name in names:
        if name in mapping:
            # The tool's own code is never run, nor named in what is saved later.
            own = {k: v for k, v in config.items() if k not in ("auto_map", "flashsvd")}
            with _told_as_config_error("config.json"):
                return mapping[name].from_dict(own | {"model_type": name})
    raise CheckpointError(
        f"transformers knows no model type {model_type!r}; say what the model is with base="
    )


def _class_for(config: Any, architectures: list[str], has_head: bool, is_exact: bool) -> Any:
    """The class of transformers that an architecture's name ends with.

    ``ShareLlamaForCausalLM`` is ``LlamaForCausalLM``; a name without the model's
    (``TransformersForCausalLM``) still tells the head, here causal language modelling.
    """
    transformers = optional_module("transformers")
    for name in architectures:
        starts = [0] if is_exact else [m.start() for m in re.finditer("[A-Z]", name)]
        for start in starts:
            found = getattr(transformers, name[start:], None)
            if getattr(found, "config_class", None) is type(config):
                return found
        head = None if is_exact else re.search(r"For[A-Z]\w+$", name)
        auto = getattr(transformers, f"AutoModel{head[0]}", None) if head else None
        if auto is not None and type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    auto = transformers.AutoModelForCausalLM if has_head else transformers.AutoModel
    if not architectures and type(config) in auto._model_mapping:
        return auto._model_mapping[type(config)]
    raise CheckpointError(
        f"transformers has none of the architectures {architectures} for {type(config).__name__}; "
        "pass the model to load_checkpoint as base="
    )
