"""Which of this package's low-rank layers are no more than what their class says."""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from flashsvd_compile.compress.linears import DTYPES, altered_from


def obstacle_of(
    module: nn.Module,
    kinds: tuple[type[nn.Module], ...],
    factors: Sequence[str] = ("u", "v"),
    buffers: Iterable[str] = (),
) -> str:
    """What makes it more than ``factors`` and a bias; empty where nothing does."""
    if altered := altered_from(kinds, module, "low-rank layer", "factors are"):
        return altered
    has_more = module._parameters.keys() != {*factors, "bias"} or module._modules
    if has_more or module._buffers.keys() != set(buffers):
        return "it holds more, or less, than factors and a bias"
    return unlike([p for p in module._parameters.values() if p is not None])


def unlike(parameters: Sequence[Tensor]) -> str:
    """Why they are not plain parameters of one dtype on one device; empty where they are."""
    kinds = {(p.dtype, p.device) for p in parameters}
    if any(type(p) is not nn.Parameter for p in parameters):
        return "its factors are no plain parameters"
    if len(kinds) > 1:
        return "its parameters differ in dtype or device"
    ((dtype, _),) = kinds
    return "" if dtype in DTYPES else f"its factors are {str(dtype).removeprefix('torch.')}"
