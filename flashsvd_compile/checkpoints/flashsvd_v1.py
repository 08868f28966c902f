"""FlashSVD's first version: raw tensors in each family's own axes, blocks in the layers' places.

======  ==============================================================================
BERT    ``Pq`` [1, H, in, r], ``Vq`` [1, H, r, D], ``bq`` [1, H, 1, D]; ``Uo`` [in, r],
        ``Vo`` [r, out], ``bo_attn``; ``U1 V1 b1 U2 V2 b2`` alike; in
        ``svd_layers.N`` or ``encoder.layer.N.block``
GPT-2   ``q_U`` [in, H, r], ``q_V`` [H, r, D], ``q_b`` [H, D]; ``out_U`` [in, r],
        ``out_V`` [r, out], ``out_b``; ``fc1``, ``fc2`` alike; in ``h.N``
LLaMA   ``q_Us`` [H, D, r], ``q_V`` [H, r, in]; ``o_Us`` [out, r], ``o_V`` [r, in];
        ``g``, ``u``, ``d`` alike; in ``layers.N``
======  ==============================================================================

Norms of a block get the names that they have in transformers.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from flashsvd_compile.checkpoints.errors import CheckpointError
from flashsvd_compile.checkpoints.rules import Rule

_AT = {
    "bert": r"(?:.*\.)?(?:svd_layers|encoder\.layer)\.(?P<n>\d+)\.(?:block\.)?",
    "gpt2": r"(?:.*\.)?h\.(?P<n>\d+)\.(?:block\.)?",
    "llama": r"(?:.*\.)?layers\.(?P<n>\d+)\.(?:block\.)?",
}

# family -> name of the factor -> (the linear, the block of it)
_BERT = {"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value"}
_BERT_WHOLE = {"o": "attention.output.dense", "1": "intermediate.dense", "2": "output.dense"}
_GPT2 = {"out": "attn.c_proj", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj"}
_LLAMA = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"}
_LLAMA_WHOLE = {
    "o": "self_attn.o_proj", "g": "mlp.gate_proj", "u": "mlp.up_proj", "d": "mlp.down_proj",
}  # fmt: skip


def _linear(
    target: str, down: str, up: str, bias: str, axes: tuple[str, str], block: str = ""
) -> list[Rule]:
    """The two factors and the bias of a linear, by the patterns of their names."""
    at = (target,)
    return [
        Rule(down, at, "down", axes[0], block=block),
        Rule(up, at, "up", axes[1], block=block),
        Rule(bias, at, "up_bias", block=block),
    ]


def _bert_rules() -> list[Rule]:
    at = _AT["bert"]
    rules = []
    for x, linear in _BERT.items():
        target = f"encoder.layer.{{n}}.{linear}"
        rules += _linear(target, f"{at}P{x}", f"{at}V{x}", f"{at}b{x}", ("1hir", "1hro"))
    for x, linear in _BERT_WHOLE.items():
        target, bias = f"encoder.layer.{{n}}.{linear}", f"{at}b{x}{'_attn' if x == 'o' else ''}"
        rules += _linear(target, f"{at}U{x}", f"{at}V{x}", bias, ("ir", "ro"))
    return rules


def _gpt2_rules() -> list[Rule]:
    at = _AT["gpt2"]
    x = f"{at}(?P<x>[qkv])"
    rules = _linear("h.{n}.attn.c_attn", f"{x}_U", f"{x}_V", f"{x}_b", ("ihr", "hro"), block="{x}")
    for name, linear in _GPT2.items():
        x = f"{at}{name}"
        rules += _linear(f"h.{{n}}.{linear}", f"{x}_U", f"{x}_V", f"{x}_b", ("ir", "ro"))
    return rules


def _llama_rules() -> list[Rule]:
    at = _AT["llama"]
    rules = []
    for names, axes in ((_LLAMA, ("hri", "hor")), (_LLAMA_WHOLE, ("ri", "or"))):
        for x, linear in names.items():
            target = (f"layers.{{n}}.{linear}",)
            rules += [
                Rule(f"{at}{x}_V", target, "down", axes[0]),
                Rule(f"{at}{x}_Us", target, "up", axes[1]),
            ]
    return rules


RULES = (*_bert_rules(), *_gpt2_rules(), *_llama_rules())

# What else a block holds: its pattern behind the block's place, and the name in transformers.
_RENAMES = [
    (re.compile(_AT[family] + name + r"\.(?P<kind>weight|bias)"), target)
    for family, name, target in (
        ("bert", "ln1", "encoder.layer.{n}.attention.output.LayerNorm.{kind}"),
        ("bert", "ln2", "encoder.layer.{n}.output.LayerNorm.{kind}"),
        ("gpt2", "ln1", "h.{n}.ln_1.{kind}"),
        ("gpt2", "ln2", "h.{n}.ln_2.{kind}"),
        ("llama", "ln1", "layers.{n}.input_layernorm.{kind}"),
        ("llama", "ln2", "layers.{n}.post_attention_layernorm.{kind}"),
    )
]


def renamed(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], linears: Collection[str]
) -> dict[str, Tensor]:
    """``tensors`` with the norms of blocks under the names that transformers has for them.

    Raises `CheckpointError` for a BERT whose own ``norm`` comes after the last layer: that model
    also multiplies its embeddings by √hidden, and no BERT of transformers computes the same.
    """
    if "norm.weight" in tensors and any(name.startswith("svd_layers.") for name in tensors):
        raise CheckpointError(
            "norm.weight beside svd_layers: this model scales its embeddings and normalises once "
            "more after its layers, which no BERT of transformers does; it cannot be read as one"
        )
    return {_renamed(name): tensor for name, tensor in tensors.items()}


def _renamed(name: str) -> str:
    for pattern, target in _RENAMES:
        if match := pattern.fullmatch(name):
            return target.format(**match.groupdict())
    return name
