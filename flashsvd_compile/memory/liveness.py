"""How much a graph holds at most: a walk over its buffers, from the first write to the last read.

A library call's result lies beside all that it reads. A kernel that Inductor writes puts its result
in the place of something of the same size that it reads there for the last time. What the graph
returns stays to the end.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass

import sympy
from torch import fx

from flashsvd_compile.analysis.axes import Size, shape_of
from flashsvd_compile.analysis.calls import arguments, aten, packet, value
from flashsvd_compile.memory.buffers import Buffer, find_buffers
from flashsvd_compile.memory.convolution import convolution_scratch_bytes
from flashsvd_compile.memory.cpu_attention import flash_scratch_bytes, mask_scratch_bytes
from flashsvd_compile.memory.matmul import repeated_operands
from flashsvd_compile.memory.view import GraphView


@dataclass(frozen=True)
class Moment:
    """What is held while ``node`` runs: bytes by the node that owns them.

    ``scratch_bytes``: what the operator takes for itself meanwhile; ``returned``: the owners that
    the graph returns, and those in whose place these are written.
    """

    node: fx.Node
    held: Mapping[fx.Node, Size]
    scratch_bytes: Size
    returned: frozenset[fx.Node]

    @property
    def transient_bytes(self) -> Size:
        """Without what the graph returns."""
        kept = (size for node, size in self.held.items() if node not in self.returned)
        return sympy.Add(self.scratch_bytes, *kept)


@dataclass(frozen=True)
class MemoryProfile:
    """The moments of one run of a graph, in order; sizes are formulas of the graph's symbols."""

    moments: Sequence[Moment]

    def peak(
        self, at: Callable[[Size], float], among: Container[fx.Node] | None = None
    ) -> tuple[Moment | None, int]:
        """The moment of most transient bytes at the sizes that ``at`` puts in, and those bytes;
        ``among``: only of moments at which those nodes are at work."""
        if among is not None:
            kept = [moment for moment in self.moments if moment.node in among]
            return MemoryProfile(kept).peak(at)
        counted = self._counted(at, lambda moment, node: node not in moment.returned)
        best = max(range(len(counted)), key=counted.__getitem__, default=None)
        return (None, 0) if best is None else (self.moments[best], round(counted[best]))

    def peak_total_bytes(self, at: Callable[[Size], float]) -> int:
        """The most bytes at once, returned ones included."""
        return round(max(self._counted(at, lambda moment, node: True), default=0))

    def _counted(
        self, at: Callable[[Size], float], counts: Callable[[Moment, fx.Node], bool]
    ) -> list[float]:
        """Bytes of each moment; each size is put in once."""
        known: dict[Size, float] = {}

        def bytes_of(size: Size) -> float:
            if size not in known:
                known[size] = at(size)
            return known[size]

        return [
            bytes_of(m.scratch_bytes)
            + sum(bytes_of(size) for node, size in m.held.items() if counts(m, node))
            for m in self.moments
        ]

    @property
    def peak_formula(self) -> Size:
        """The most transient bytes, whatever the sizes: a maximum over the moments."""
        return sympy.Max(0, *_undominated({m.transient_bytes for m in self.moments}))


def walk(view: GraphView) -> MemoryProfile:
    """The profile of one run."""
    buffers = _operands_of_attention_last(view, find_buffers(view))
    index_of = {buffer.node: index for index, buffer in enumerate(buffers)}
    last_read = {read: index for index, b in enumerate(buffers) for read in b.reads}
    for index, buffer in enumerate(buffers):
        if _is_library_attention(view, buffer.node) and value(buffer.node).device.type == "cpu":
            # There one kernel writes q, k, v and the mask, and reads all that it needs until then.
            written = {
                index_of[operand]
                for operand in buffer.reads & index_of.keys()
                if buffers[index_of[operand]].is_fused and last_read[operand] == index
            }
            for operand in written:
                last_read |= {
                    read: max(written)
                    for read in buffers[operand].reads
                    if last_read[read] <= max(written)
                }
    returned = frozenset(b.node for b in buffers if b.is_output)
    ahead: dict[int, list[Buffer]] = {}
    for buffer in buffers:
        found = view.lowered.get(buffer.node)
        if found is not None and found.is_early:
            ahead.setdefault(_first_product(buffer, buffers, index_of), []).append(buffer)
    copied, waiting = _copies_of_operands(view, buffers)
    held: dict[fx.Node, Size] = {}
    written_over: dict[fx.Node, fx.Node] = {}
    moments = []
    for index, buffer in enumerate(buffers):
        dying = [n for n in held if last_read.get(n) == index]
        dying = [n for n in dying if n not in returned]
        replaced = _replaced(buffer, dying, held)
        if replaced is not None:
            del held[replaced]
            written_over[buffer.node] = replaced
        held[buffer.node] = buffer.size_bytes
        scratch = _scratch(view, buffer.node) + copied.get(buffer.node, 0) + waiting[index]
        moments.append((buffer.node, dict(held), scratch))
        held |= {early.node: early.size_bytes for early in ahead.get(index, ())}
        for node in dying:
            held.pop(node, None)
        if buffer.node not in last_read and buffer.node not in returned:
            held.pop(buffer.node)
    for node in returned:
        while node in written_over:
            node = written_over[node]
            returned |= {node}
    return MemoryProfile([Moment(*moment, returned) for moment in moments])


def _scratch(view: GraphView, node: fx.Node) -> Size:
    """What the operator takes for itself while it runs."""
    if node in view.lowered:
        return view.lowered[node].scratch_bytes
    if not _is_library_attention(view, node):
        return convolution_scratch_bytes(node)
    if value(node).device.type != "cpu":
        return sympy.S.Zero
    named = arguments(node)
    query, key, val = (shape_of(value(named[name])) for name in ("query", "key", "value"))
    if len(query) != 4 or query[-1] != val[-1]:
        return sympy.S.Zero  # no flash attention: Inductor's own matmuls, buffers like any others
    batch, heads, rows, width = query
    dtype = value(node).dtype
    scratch = flash_scratch_bytes(batch, heads, rows, key[2], width, dtype)
    if named["attn_mask"] is not None:
        scratch += mask_scratch_bytes(value(named["attn_mask"]), rows, key[2], False, dtype)
    return scratch


def _copies_of_operands(
    view: GraphView, buffers: Sequence[Buffer]
) -> tuple[dict[fx.Node, Size], list[Size]]:
    """Bytes of operands copied for each matmul while it runs, and of what is copied ahead."""
    copied: dict[fx.Node, Size] = {}
    waiting: list[Size] = []
    ahead: Size = sympy.S.Zero
    for buffer in reversed(buffers):
        if buffer.node not in view.lowered:
            for operand, size in repeated_operands(buffer.node).items():
                if operand.op != "call_function" and value(operand).device.type == "cpu":
                    ahead += size
                else:
                    copied[buffer.node] = copied.get(buffer.node, sympy.S.Zero) + size
        waiting.append(ahead)
    return copied, waiting[::-1]


def _first_product(
    buffer: Buffer, buffers: Sequence[Buffer], index_of: Mapping[fx.Node, int]
) -> int:
    """Where the first latent that ``buffer`` reads is written, behind which it is allocated; masks
    may be as old as the graph."""
    read = [index_of[node] for node in buffer.reads if node in index_of]
    products = [index for index in read if not buffers[index].is_fused]
    return min(products or read, default=index_of[buffer.node])


def _operands_of_attention_last(view: GraphView, buffers: Sequence[Buffer]) -> list[Buffer]:
    """``buffers`` as Inductor orders them: what library attention alone reads is written right
    before it, q, k and v after all that they are computed from."""
    readers: dict[fx.Node, list[fx.Node]] = {}
    for buffer in buffers:
        for read in buffer.reads:
            readers.setdefault(read, []).append(buffer.node)
    late: dict[fx.Node, list[Buffer]] = {}
    kept = []
    for buffer in buffers:
        of = readers.get(buffer.node, [])
        if len(of) == 1 and buffer.is_fused and _is_library_attention(view, of[0]):
            late.setdefault(of[0], []).append(buffer)
        else:
            kept.append(buffer)
    return [b for buffer in kept for b in (*late.get(buffer.node, ()), buffer)]


def _is_library_attention(view: GraphView, node: fx.Node) -> bool:
    return node not in view.lowered and packet(node) is aten.scaled_dot_product_attention


def _replaced(buffer: Buffer, dying: list[fx.Node], held: Mapping[fx.Node, Size]) -> fx.Node | None:
    """The buffer in whose place ``buffer`` is written."""
    dtype = getattr(value(buffer.node), "dtype", None)
    return next(
        (
            node
            for node in buffer.over
            if node in dying
            and held.get(node) == buffer.size_bytes
            and getattr(value(node), "dtype", None) == dtype
        ),
        None,
    )


def _undominated(formulas: set[Size]) -> list[Size]:
    """Without those that another one exceeds term by term; sizes are not negative."""
    terms = {formula: sympy.expand(formula).as_coefficients_dict() for formula in formulas}

    def exceeds(more: Size, less: Size) -> bool:
        return all(
            coefficient <= 0 or terms[more].get(term, 0) >= coefficient
            for term, coefficient in terms[less].items()
        )

    kept: list[Size] = []
    for formula in sorted(formulas, key=lambda f: (-len(terms[f]), str(f))):
        if not any(exceeds(other, formula) for other in kept):
            kept = [other for other in kept if not exceeds(formula, other)] + [formula]
    return kept
