"""A dense model's copy with the planned factors as low-rank modules, and what was told of it."""

import copy
import json

import torch
from torch import nn

from flashsvd_compile import explain
from flashsvd_compile.compress.modules import LowRankLinear, PerHeadLowRankLinear
from flashsvd_compile.compress.svd import truncated_svd
from tests.spelled import OPTIONS

KEEP = {**OPTIONS, "keep": 0.5}


def explicit(model, factoring):
    """Every weight that ``factoring`` tells as factored, by a module that holds such factors."""
    low_rank = copy.deepcopy(model)
    for row in factoring["weights"]:
        if row["kind"] == "dense":
            continue
        path = row["weight"].removesuffix(".weight")
        dense = low_rank.get_submodule(path)
        weight = dense.weight.detach()
        weight = weight if isinstance(dense, nn.Linear) else weight.t()
        out, inputs = weight.shape
        heads, rank, bias = row["heads"], row["rank"], dense.bias is not None
        if heads == 1:
            module = LowRankLinear(inputs, out, rank, bias, dtype=weight.dtype)
            u, v = truncated_svd(weight, rank)
        else:
            width = out // heads
            module = PerHeadLowRankLinear(inputs, heads, width, rank, bias, dtype=weight.dtype)
            u, v = truncated_svd(weight.reshape(heads, width, inputs), rank)
        with torch.no_grad():
            module.u.copy_(u)
            module.v.copy_(v)
            if bias:
                module.bias.copy_(dense.bias)
        parent, _, name = path.rpartition(".")
        setattr(low_rank.get_submodule(parent), name, module)
    return low_rank


def told_of(model, *args, options=KEEP, **kwargs):
    """What `explain` tells of the weights of the only graph."""
    (factoring,) = explain(model, *args, options=options, **kwargs).to_dict()["factoring"]
    return json.loads(json.dumps(factoring))


def shapes(factoring):
    """Path of each weight → (kind, heads, rank)."""
    return {row["weight"].removesuffix(".weight"): (row["kind"], row["heads"], row["rank"])
            for row in factoring["weights"]}  # fmt: skip


def codes(factoring):
    """Path of each weight that stayed dense → the reason's code."""
    return {row["weight"].removesuffix(".weight"): row["reason"]["code"]
            for row in factoring["weights"] if row["reason"]}  # fmt: skip
