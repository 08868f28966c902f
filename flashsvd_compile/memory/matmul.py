"""What library matmuls copy before they run: factors that are repeated along the batch.

    [B, H, M, r] @ [H, r, D]   multiplies B · H pairs of matrices: [H, r, D] is written B times

Inductor's batched matmul knows one stride for the whole batch (torch 2.11 to 2.13,
``_inductor/kernel/bmm.py``). Copies of weights wait for nothing; on a CPU the kernel that writes
what the graph begins with writes them all (seen with torch 2.13).
"""

import sympy
from torch import fx

from flashsvd_compile.analysis.axes import Size, same, shape_of
from flashsvd_compile.analysis.calls import arguments, aten, is_tensor, packet, value


def repeated_operands(node: fx.Node) -> dict[fx.Node, Size]:
    """The operands that the matmul ``node`` reads from copies, and the bytes of each copy."""
    if packet(node) is not aten.matmul:
        return {}
    operands = [arguments(node)[name] for name in ("self", "other")]
    if not all(is_tensor(x) and value(x).dim() > 2 for x in operands):
        return {}  # one multiplication of all rows at once
    batch = shape_of(value(node))[:-2]
    found = {}
    for operand in operands:
        *own, rows, columns = shape_of(value(operand))
        own = [sympy.S.One] * (len(batch) - len(own)) + own
        kept = [same(mine, full) for mine, full in zip(own, batch, strict=True)]
        varies = any(k and full != 1 for k, full in zip(kept, batch, strict=True))
        if varies and not all(kept):
            size = sympy.Mul(*batch, rows, columns)
            found[operand] = size * value(operand).dtype.itemsize
    return found
