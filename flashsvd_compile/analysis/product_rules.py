"""Products: where factored facts, scores, feed-forward and attention candidates begin."""

from dataclasses import replace

from flashsvd_compile.analysis import attention_rules
from flashsvd_compile.analysis.axes import Dim, Dims, shape_of
from flashsvd_compile.analysis.calls import value
from flashsvd_compile.analysis.contraction import Contraction
from flashsvd_compile.analysis.factored import Factored, Labelled, label_like
from flashsvd_compile.analysis.facts import Facts, FeedForwardCandidate, Pointwise


def product(facts: Facts, product: Contraction) -> None:
    """Facts of ``product.node`` and of the sites that it may complete."""
    flipped = _weight_on_the_left(facts, product)
    if flipped:
        product = replace(
            product,
            left=product.right,
            right=product.left,
            left_letters=product.right_letters,
            right_letters=product.left_letters,
        )
    dims = out_dims(facts, product)
    facts.axes[product.node] = dims
    if {product.left, product.right, product.bias} & facts.mutated or not product.contracted:
        _lost_feed_forward(facts, product)
        return
    if product.right in facts.weights or product.right in facts.inputs:
        _lift(facts, product, dims)
    if product.right not in facts.weights:
        attention_rules.product(facts, product, dims)


def _weight_on_the_left(facts: Facts, product: Contraction) -> bool:
    return product.left in facts.weights and product.right not in facts.weights


def out_dims(facts: Facts, product: Contraction) -> Dims:
    """Output dimensions: the left operand's where it has the letter, new atoms elsewhere."""
    left = dict(zip(product.left_letters, facts.axes[product.left], strict=True))
    return tuple(
        facts.space.varying(left.get(letter, ()), size)
        for letter, size in zip(product.out_letters, shape_of(value(product.node)), strict=True)
    )


def right_labels(facts: Facts, product: Contraction, dims: Dims) -> Dims:
    """The right operand's dimensions, by the left's atoms where shared and the output's else."""
    names: dict[str, Dim] = dict(zip(product.out_letters, dims, strict=True))
    names |= {
        letter: dim
        for letter, dim in zip(product.left_letters, facts.axes[product.left], strict=True)
        if letter in product.contracted
    }
    sizes = shape_of(value(product.right))
    return tuple(
        () if size == 1 else names[letter]
        for letter, size in zip(product.right_letters, sizes, strict=True)
    )


def _lift(facts: Facts, product: Contraction, dims: Dims) -> None:
    space = facts.space
    latent = Labelled((product.left,), facts.axes[product.left])
    factor = Labelled((product.right,), right_labels(facts, product, dims))
    rank = tuple(
        atom
        for letter, dim in zip(product.left_letters, facts.axes[product.left], strict=True)
        if letter in product.contracted
        for atom in space.leaves(dim)
    )
    if product.left not in facts.weights:
        _feed_forward(facts, product, rank)
    fact = Factored(product.node, latent, factor, rank, scale=product.scale)
    if product.bias is not None:
        labels = label_like(space, dims, shape_of(value(product.bias)))
        bias = Labelled((product.bias,), labels) if labels is not None else None
        if bias is None or not set(bias.atoms(space)) <= set(factor.atoms(space)):
            return
        fact = fact.plus(bias)
    facts.factored[product.node] = fact


def _feed_forward(facts: Facts, product: Contraction, rank: Dim) -> None:
    """The left operand may be wide: elementwise in lifted tensors, contracted away here."""
    wide = product.left
    region = facts.pointwise.get(wide)
    if region is None and wide in facts.factored and facts.factored[wide].scale == 1.0:
        region = Pointwise({wide: facts.axes[wide]}, ())
    if region is not None:
        facts.candidates.append(FeedForwardCandidate(product, region))
    else:
        _lost_feed_forward(facts, product)


def _lost_feed_forward(facts: Facts, product: Contraction) -> None:
    """The left operand was lifted once, and something came between that cannot be streamed."""
    if (lost := facts.lost.get(product.left)) is not None:
        facts.candidates.append(FeedForwardCandidate(product, lost.region, lost.reason))
