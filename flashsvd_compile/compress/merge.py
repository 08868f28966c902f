"""`merge_`: one matrix in the place of factors that do more work than it would.

    y = (x Uᵀ) Vᵀ + b    →    y = x Wᵀ + b,    W = V U        where r·(m + n) ≥ m·n

for W [m, n]; with heads, of a head's own [D, in] matrix. It is what peft calls merging. A compiler
could do it in the graph, but weights are inputs of a graph: the product would be computed at each
call, or kept beside weights that may change under it, by an optimiser or through ``.data``, without
a word. So the model itself is changed, once, and what was compiled of it is compiled again.

Found are this package's low-rank layers, and two linears in a row in an ``nn.Sequential``, the
first without a bias. W is computed in float64 and rounded once, to the factors' dtype.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flashsvd_compile.compress.linears import (
    find_linears,
    holders_of,
    model_bytes,
    module_paths,
    parameter_bytes,
    replace_,
    select,
    sharing,
)
from flashsvd_compile.compress.modules import (
    FusedPerHeadLowRankLinear,
    LowRankLinear,
    PerHeadLowRankLinear,
)
from flashsvd_compile.compress.own_layers import obstacle_of, unlike
from flashsvd_compile.compress.report import MergeReport, MergeRow

_KINDS = (LowRankLinear, PerHeadLowRankLinear, FusedPerHeadLowRankLinear)
# What the layers of this package have and a linear has not.
_OWN = {"rank", "num_parts", "num_heads", "head_dim", "method"}
_STATE = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class _Chain:
    """A low-rank layer: the module that its matrix will stand for, at ``paths``, and its factors.

    ``u`` [.., r, in] and ``v`` [.., rows, r]. ``first`` is the linear before, in a sequential, and
    ``first_paths`` lead to it. ``obstacle`` says why it cannot be merged; empty where it can.
    """

    paths: tuple[str, ...]
    module: nn.Module
    u: Tensor
    v: Tensor
    obstacle: str
    first_paths: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        return self.paths[0]

    @property
    def rank(self) -> int:
        return self.u.shape[-2]

    @property
    def bytes(self) -> int:
        return parameter_bytes(self.u) + parameter_bytes(self.v)


def merge_(
    model: nn.Module,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    allow_training: bool = False,
) -> MergeReport:
    """Replace low-rank layers of ``model`` whose rank is too large, in place, by ``nn.Linear``.

    Args:
        model: any module with low-rank layers.
        include: `fnmatch` patterns of module paths; only layers that match one are merged. None
            means all. Of two linears in a sequential the second is the one that is named.
        exclude: patterns of layers to leave; wins over ``include``.
        allow_training: merge layers that are in training mode and whose factors require
            gradients, too: from then on the matrix is trained, at full rank.

    Layers whose factors cost less than their matrix stay, and so do those that share a factor or
    are more than factors and a bias, with the reason in the report. In a sequential the matrix
    takes the second linear's place and ``nn.Identity`` the first's, so that indices stay; exclude
    sequentials of which other code calls the linears one by one, to read the latent.
    """
    paths = module_paths(model)
    chains = [*_own_layers(paths), *_sequential_pairs(model, paths)]
    order = [path for path, _ in model.named_modules(remove_duplicate=False)]
    chains.sort(key=lambda chain: order.index(chain.path))
    if any(chain.path == "" for chain in chains):
        raise ValueError("the model itself is a low-rank layer; pass the module that holds it")
    left_out = select(chains, include, exclude)
    for chain in chains:
        if chain.u.is_meta or chain.v.is_meta:
            raise ValueError(f"{chain.path}: factors on the meta device; load the model first")
    before = model_bytes(model)
    rows = []
    for chain in chains:
        reason = left_out.get(chain.path) or _why_not(chain, allow_training)
        rows.append(_merge(model, chain, reason))
    return MergeReport(tuple(rows), before, model_bytes(model))


def _merge(model: nn.Module, chain: _Chain, reason: str) -> MergeRow:
    """Merge one layer unless there is a reason not to; one product is held at a time."""
    kept = MergeRow(chain.path, chain.rank, chain.bytes, chain.bytes, 0.0, reason)
    if reason:
        return kept
    weight, error = _product(chain)
    if not torch.isfinite(weight).all():
        dtype = str(weight.dtype).removeprefix("torch.")
        return MergeRow(chain.path, chain.rank, chain.bytes, chain.bytes, 0.0,
                        f"its matrix is not finite in {dtype}")  # fmt: skip
    replace_(model, chain.paths, _linear(chain, weight))
    replace_(model, chain.first_paths, nn.Identity())
    return MergeRow(chain.path, chain.rank, chain.bytes, parameter_bytes(weight), error)


@torch.no_grad()
def _product(chain: _Chain) -> tuple[Tensor, float]:
    """W = V U [out, in] in the factors' dtype, and what rounding it has cost.

    In float64, as float32 products may be rounded to tf32 or bfloat16 by torch's settings.
    """
    wide = torch.float32 if chain.u.device.type == "mps" else torch.float64
    exact = (chain.v.to(wide) @ chain.u.to(wide)).reshape(-1, chain.u.shape[-1])
    weight = exact.to(chain.u.dtype)
    norm = torch.linalg.vector_norm(exact)
    gap = torch.linalg.vector_norm(weight.to(wide) - exact)
    return weight, float(gap / norm) if norm > 0 else 0.0


def _linear(chain: _Chain, weight: Tensor) -> nn.Linear:
    out_features, in_features = weight.shape
    with torch.device("meta"):  # no memory: the parameters are put in place below
        linear = nn.Linear(in_features, out_features, bias=False)
    requires_grad = chain.u.requires_grad or chain.v.requires_grad
    linear.weight = nn.Parameter(weight, requires_grad=requires_grad)
    # The same object, so that a tied bias stays tied.
    linear.register_parameter("bias", chain.module._parameters["bias"])
    # The training flag, the hooks and whatever others have hung on the layer.
    vars(linear).update(
        {k: value for k, value in vars(chain.module).items() if k not in _STATE | _OWN}
    )
    linear.in_features, linear.out_features = in_features, out_features
    return linear


# ---- what may be merged -------------------------------------------------------------------------


def _why_not(chain: _Chain, allow_training: bool) -> str:
    if chain.obstacle:
        return chain.obstacle
    m, n, rank = chain.v.shape[-2], chain.u.shape[-1], chain.rank
    if rank * (m + n) < m * n:
        return f"rank {rank} costs less than a matrix of {m} × {n}"
    is_trained = chain.module.training and (chain.u.requires_grad or chain.v.requires_grad)
    if is_trained and not allow_training:
        return "it is being trained: call model.eval(), or pass allow_training=True"
    return ""


def _own_layers(paths: dict[nn.Module, list[str]]) -> Iterator[_Chain]:
    """The layers that `compress_` makes."""
    holders = holders_of(paths)
    for module, found in paths.items():
        if not isinstance(module, _KINDS):
            continue
        obstacle = obstacle_of(module, _KINDS)
        for name in ("u", "v"):
            obstacle = obstacle or sharing(module, name, paths, holders)
        yield _Chain(tuple(found), module, module.u, module.v, obstacle)


def _sequential_pairs(model: nn.Module, paths: dict[nn.Module, list[str]]) -> Iterator[_Chain]:
    """Linears in a row in plain sequentials, the first of two without a bias."""
    obstacles = {linear.module: linear.obstacle for linear in find_linears(model)}
    for sequential, found in paths.items():
        if type(sequential) is not nn.Sequential or "forward" in vars(sequential):
            continue
        children = list(sequential._modules.items())
        index = 0
        while index + 1 < len(children):
            (first_name, first), (name, second) = children[index : index + 2]
            index += 1
            if type(first) is not nn.Linear or type(second) is not nn.Linear or first is second:
                continue
            if first.bias is not None:
                continue
            index += 1  # the second one is taken
            lead = [f"{path}." if path else "" for path in found]
            obstacle = obstacles[first] or obstacles[second]
            for place, part in ((first_name, first), (name, second)):
                if set(paths[part]) != {f"{path}{place}" for path in lead}:
                    obstacle = obstacle or "a linear of it is also used elsewhere"
                if any(getattr(part, hooks) for hooks in _HOOKS):
                    obstacle = obstacle or "a linear of it has hooks"
            if first.weight.shape[0] != second.weight.shape[1]:
                obstacle = obstacle or "its linears do not fit each other"
            held = [first.weight, *(p for p in second._parameters.values() if p is not None)]
            yield _Chain(
                tuple(f"{path}{name}" for path in lead), second, first.weight, second.weight,
                obstacle or unlike(held), tuple(f"{path}{first_name}" for path in lead),
            )  # fmt: skip
