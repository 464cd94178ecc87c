"""The sum-of-products form of an expression: what a planner can reorder.

Every axis of a value is written as labels, as in an einsum. A leaf has one label an axis; a matrix
product shares a label between two factors, a transpose only moves labels, and a reshape that splits
or joins axes splits or joins labels, so that each axis of a value is a row of labels (none where the
value does not depend on the axis). So `W + s * (A @ B).reshape(…)` becomes two terms:

    W[i, o]    and    s[] · A[i, r] · B[r, o]

What has no such form (an inverse, a norm, a user's function) is one factor, computed as it is written.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from tether import keras_seam
from tether.weights.expression import Expression, Node, Shape, Stored, program
from tether.weights.leaves import Choice, Constant
from tether.weights.operators import arithmetic, choice, structure

MAX_TERMS = 8
MAX_FACTORS = 6
"""Beyond these a part is one factor: the number of ways to compute it grows faster than what they save."""

Labels = tuple[int, ...]


class _NoForm(Exception):
    """A step has no sum-of-products form."""


@dataclass(frozen=True)
class Factor:
    """An expression whose shape is the sizes of its labels."""

    expression: Expression
    labels: Labels


@dataclass(frozen=True)
class Summand:
    """A number times factors, summed over the labels that no axis has."""

    number: float
    factors: tuple[Factor, ...]
    axes: tuple[Labels, ...]
    """For each axis of the value its labels, outermost first; none where the value is the same along the axis."""


@dataclass(frozen=True)
class Products:
    """A sum of terms, each with labels of its own."""

    shape: Shape
    terms: tuple[Summand, ...]
    sizes: Mapping[int, int]


def products(expression: Expression, each: bool = False) -> Products:
    """The sum-of-products form. The expression's shape must be known.

    Args:
        expression: What the weight is.
        each: Whether the choice in it is made for each example: then all options are terms, of which each example has
            some.
    """
    return _Expansion(each).of(expression)


def shaped(expression: Expression, labels: Labels, sizes: Mapping[int, int]) -> tuple[Expression, Labels]:
    """The expression in the shape of its labels, reshaped at most once; and the labels."""
    shape = tuple(sizes[label] for label in labels)
    if expression.shape != shape:
        while isinstance(expression, structure.Reshape):
            expression = expression.operands[0]
        if expression.shape != shape:
            expression = structure.reshape(expression, shape)
    return expression, labels


class _Expansion:
    """Brings one expression into the form; hands out labels."""

    def __init__(self, each: bool = False) -> None:
        self.each = each
        self.sizes: dict[int, int] = {}
        self._numbers = itertools.count()

    def of(self, expression: Expression) -> Products:
        done: list[Products] = []
        for step in program(expression):
            done.append(self._step(step.expression, [done[place] for place in step.operands]))
        return done[-1]

    def _step(self, current: Expression, operands: list[Products]) -> Products:
        if isinstance(current, Constant) and current.number is not None:
            return Products((), (Summand(float(current.number), (), ()),), self.sizes)
        if isinstance(current, Node) and current.dtype is not None and keras_seam.is_float(current.dtype):
            try:
                rule = _RULES.get(type(current))
                simpler = None if rule is not None else current.expanded()
                if simpler is not None:
                    found = self.of(simpler)
                elif rule is not None:
                    found = rule(self, current, *operands)
                else:
                    raise _NoForm
                if len(found.terms) <= MAX_TERMS and all(len(term.factors) <= MAX_FACTORS for term in found.terms):
                    return found
            except _NoForm:
                pass
        return self.leaf(current)

    # ------------------------------------------------------------------ labels

    def label(self, size: int) -> int:
        """A label that no other axis has."""
        number = next(self._numbers)
        self.sizes[number] = size
        return number

    def size(self, labels: Labels) -> int:
        """The product of the labels' sizes."""
        return math.prod(self.sizes[label] for label in labels)

    def leaf(self, expression: Expression) -> Products:
        """An expression as one factor."""
        shape = expression.shape or ()
        axes = tuple(() if size == 1 else (self.label(size),) for size in shape)
        labels = tuple(label for axis in axes for label in axis)
        return Products(shape, (Summand(1.0, (self.factor(expression, labels),), axes),), self.sizes)

    def factor(self, expression: Expression, labels: Labels) -> Factor:
        """A factor, with the expression in the shape of its labels."""
        return Factor(*shaped(expression, labels, self.sizes))

    def substituted(self, term: Summand, new: Mapping[int, Labels]) -> Summand:
        """The term with labels replaced by rows of labels of the same total size."""
        if not new:
            return term

        def replaced(labels: Labels) -> Labels:
            return tuple(part for label in labels for part in new.get(label, (label,)))

        return Summand(
            term.number,
            tuple(self.factor(factor.expression, replaced(factor.labels)) for factor in term.factors),
            tuple(replaced(axis) for axis in term.axes),
        )

    def fresh(self, term: Summand) -> Summand:
        """The term with labels that no other term has."""
        own = {label for factor in term.factors for label in factor.labels}
        return self.substituted(term, {label: (self.label(self.sizes[label]),) for label in own})

    def split(self, labels: Labels, sizes: list[int]) -> tuple[list[Labels], dict[int, Labels]]:
        """Labels dealt out over axes of the given sizes, and which labels had to be split for it."""
        rest, new, dealt = list(labels), dict[int, Labels](), list[Labels]()
        for wanted in sizes:
            axis: list[int] = []
            while wanted > 1:
                if not rest:
                    raise _NoForm
                label = rest.pop(0)
                size = self.sizes[label]
                if wanted % size == 0:
                    axis.append(label)
                    wanted //= size
                elif size % wanted == 0:
                    parts = (self.label(wanted), self.label(size // wanted))
                    new[label] = parts
                    rest.insert(0, parts[1])
                    axis.append(parts[0])
                    wanted = 1
                else:
                    raise _NoForm
            dealt.append(tuple(axis))
        return dealt, _settled(new)

    def unified(self, a: Summand, b: Summand, pairs: list[tuple[Labels, Labels]]) -> tuple[Summand, Summand]:
        """Both terms with the same labels where axes of one meet axes of the other."""
        new_a: dict[int, Labels] = {}
        new_b: dict[int, Labels] = {}
        for ours, theirs in pairs:
            if not ours or not theirs:
                continue
            rest, others = list(ours), list(theirs)
            while rest and others:
                mine, other = rest.pop(0), others.pop(0)
                n, m = self.sizes[mine], self.sizes[other]
                if n == m:
                    new_b[other] = (mine,)
                elif n % m == 0:
                    parts = (self.label(m), self.label(n // m))
                    new_a[mine], new_b[other] = parts, (parts[0],)
                    rest.insert(0, parts[1])
                elif m % n == 0:
                    parts = (self.label(n), self.label(m // n))
                    new_b[other], new_a[mine] = parts, (parts[0],)
                    others.insert(0, parts[1])
                else:
                    raise _NoForm
        return self.substituted(a, _settled(new_a)), self.substituted(b, _settled(new_b))


def _settled(new: dict[int, Labels]) -> dict[int, Labels]:
    """Substitutions with the labels that were split again followed to the end."""

    def followed(label: int) -> Labels:
        return tuple(part for found in new[label] for part in (followed(found) if found in new else (found,)))

    return {label: followed(label) for label in new}


# --------------------------------------------------------------------------- the rules


def _padded(term: Summand, rank: int) -> Summand:
    return replace(term, axes=((),) * (rank - len(term.axes)) + term.axes)


def _sum(expansion: _Expansion, node: Node, a: Products, b: Products, sign: float = 1.0) -> Products:
    shape = node.shape or ()
    terms = [*a.terms, *(replace(term, number=sign * term.number) for term in b.terms)]
    return Products(shape, tuple(_padded(term, len(shape)) for term in terms), expansion.sizes)


def _difference(expansion: _Expansion, node: Node, a: Products, b: Products) -> Products:
    return _sum(expansion, node, a, b, -1.0)


def _negative(expansion: _Expansion, node: Node, a: Products) -> Products:
    return replace(a, terms=tuple(replace(term, number=-term.number) for term in a.terms))


def _pairs(expansion: _Expansion, a: Products, b: Products) -> Iterator[tuple[Summand, Summand]]:
    if len(a.terms) * len(b.terms) > MAX_TERMS:
        raise _NoForm
    for left in a.terms:
        for right in b.terms:
            yield left, expansion.fresh(right)


def _product(expansion: _Expansion, node: Node, a: Products, b: Products) -> Products:
    shape = node.shape or ()
    terms = []
    for left, right in _pairs(expansion, a, b):
        left, right = _padded(left, len(shape)), _padded(right, len(shape))
        left, right = expansion.unified(left, right, list(zip(left.axes, right.axes, strict=True)))
        axes = tuple(x or y for x, y in zip(left.axes, right.axes, strict=True))
        terms.append(Summand(left.number * right.number, left.factors + right.factors, axes))
    return Products(shape, tuple(terms), expansion.sizes)


def _quotient(expansion: _Expansion, node: Node, a: Products, b: Products) -> Products:
    divisor = node.operands[1]
    if isinstance(divisor, Constant) and divisor.number:
        terms = tuple(replace(term, number=term.number / divisor.number) for term in a.terms)
        return replace(a, terms=terms)
    return _product(expansion, node, a, expansion.leaf(arithmetic.divide(Constant.of(1.0), divisor)))


def _matmul(expansion: _Expansion, node: Node, a: Products, b: Products) -> Products:
    inner, terms = a.shape[-1], []
    row, column = len(a.shape) > 1, len(b.shape) > 1
    batch = max(len(a.shape), len(b.shape), 2) - 2
    for left, right in _pairs(expansion, a, b):
        # Both with the leading axes of the larger, then a row's and the inner one, the inner one and a column's.
        left, right = _padded(left, batch + 1 + row), _padded(right, batch + 1 + column)
        place = batch if column else -1
        meet = [*zip(left.axes[:batch], right.axes[:batch], strict=True), (left.axes[-1], right.axes[place])]
        left, right = expansion.unified(left, right, meet)
        repeats = inner if not left.axes[-1] and not right.axes[place] else 1
        axes = tuple(x or y for x, y in zip(left.axes[:batch], right.axes[:batch], strict=True))
        axes += left.axes[batch:-1] + right.axes[batch + 1 :]
        terms.append(Summand(left.number * right.number * repeats, left.factors + right.factors, axes))
    return Products(node.shape or (), tuple(terms), expansion.sizes)


def _einsum(expansion: _Expansion, node: Node, *operands: Products) -> Products:
    inputs, _, output = node.parameters["equation"].replace(" ", "").partition("->")
    letters = inputs.split(",")
    if "." in inputs or not output or any(len(set(part)) != len(part) for part in letters):
        raise _NoForm
    sizes = {c: n for part, p in zip(letters, operands, strict=True) for c, n in zip(part, p.shape, strict=True)}
    found: list[tuple[Summand, str]] = [(term, letters[0]) for term in operands[0].terms]
    for part, operand in zip(letters[1:], operands[1:], strict=True):
        joined = []
        if len(found) * len(operand.terms) > MAX_TERMS:
            raise _NoForm
        for left, names in found:
            for other in operand.terms:
                right = expansion.fresh(other)
                shared = [c for c in part if c in names]
                met = [(left.axes[names.index(c)], right.axes[part.index(c)]) for c in shared]
                mine, right = expansion.unified(left, right, met)
                axes = [
                    axis or (right.axes[part.index(c)] if c in part else ())
                    for c, axis in zip(names, mine.axes, strict=True)
                ]
                new = [c for c in part if c not in names]
                axes += [right.axes[part.index(c)] for c in new]
                term = Summand(mine.number * right.number, mine.factors + right.factors, tuple(axes))
                joined.append((term, names + "".join(new)))
        found = joined
    terms = []
    for term, names in found:
        repeats = math.prod(sizes[c] for c, axis in zip(names, term.axes, strict=True) if not axis and c not in output)
        axes_of = dict(zip(names, term.axes, strict=True))
        terms.append(Summand(term.number * repeats, term.factors, tuple(axes_of[c] for c in output)))
    return Products(node.shape or (), tuple(terms), expansion.sizes)


def _transpose(expansion: _Expansion, node: structure.Transpose, a: Products) -> Products:
    order = node._axes(len(a.shape))
    terms = tuple(replace(term, axes=tuple(term.axes[axis] for axis in order)) for term in a.terms)
    return Products(node.shape or (), terms, expansion.sizes)


def _reshape(expansion: _Expansion, node: Node, a: Products) -> Products:
    shape = node.shape or ()
    terms = []
    for term in a.terms:
        if any(size > 1 and not axis for size, axis in zip(a.shape, term.axes, strict=True)):
            raise _NoForm  # the same along an axis: the labels do not say how long that is
        axes, new = expansion.split(tuple(label for axis in term.axes for label in axis), list(shape))
        terms.append(replace(expansion.substituted(term, new), axes=tuple(axes)))
    return Products(shape, tuple(terms), expansion.sizes)


def _index(expansion: _Expansion, node: structure.Index, a: Products) -> Products:
    key = node._key()
    taken = sum(1 for part in key if part is not None and part is not Ellipsis)
    full: list[structure.Part] = []
    for part in key:
        full += [slice(None)] * (len(a.shape) - taken) if part is Ellipsis else [part]
    full += [slice(None)] * (len(a.shape) - sum(part is not None for part in full))
    terms = []
    for term in a.terms:
        factors, axes, place = list(term.factors), list[Labels](), 0
        for part in full:
            if part is None:
                axes.append(())
                continue
            labels, size = term.axes[place], a.shape[place]
            place += 1
            whole = isinstance(part, slice) and range(*part.indices(size)) == range(size)
            if whole or not labels:
                axes += [labels] if isinstance(part, slice) else []
                continue
            if len(labels) > 1:
                raise _NoForm
            count = len(range(*part.indices(size))) if isinstance(part, slice) else 1
            if count == 0:
                raise _NoForm
            kept = (expansion.label(count),) if count > 1 else ()
            for number, factor in enumerate(factors):
                if labels[0] in factor.labels:
                    axis = factor.labels.index(labels[0])
                    cut = structure.index(factor.expression, (slice(None),) * axis + (part,))
                    left = factor.labels[:axis] + kept + factor.labels[axis + 1 :]
                    factors[number] = expansion.factor(cut, left)
            axes += [kept] if isinstance(part, slice) else []
        terms.append(Summand(term.number, tuple(factors), tuple(axes)))
    return Products(node.shape or (), tuple(terms), expansion.sizes)


def _on_each_factor(expansion: _Expansion, node: Node, a: Products) -> Products:
    # The gradient of a product to one factor is linear in the gradient of the product, so cutting or scaling
    # the product's gradient is cutting or scaling each factor's.
    def wrapped(factor: Factor) -> Factor:
        if isinstance(factor.expression, choice.Mask):  # which has no gradient, and which a plan knows by its class
            return factor
        again = isinstance(node, arithmetic.StopGradient) and isinstance(factor.expression, arithmetic.StopGradient)
        expression = factor.expression if again else type(node)(factor.expression, **node.parameters)
        return replace(factor, expression=expression)

    terms = tuple(replace(term, factors=tuple(map(wrapped, term.factors))) for term in a.terms)
    return replace(a, terms=terms)


def _adapted(expansion: _Expansion, node: choice.Adapted, base: Products, *pairs: Products) -> Products:
    """The base's terms, and those of each part times its strength; factors of a part are zero at strength zero."""
    found = base
    for (strength, _), number, part in zip(node.parts.values(), pairs[::2], pairs[1::2], strict=True):
        found = _sum(expansion, node, found, _product(expansion, node, number, _off(expansion, part, strength)))
    return found


def _switched(expansion: _Expansion, node: choice.Switched, part: Products, number: Products) -> Products:
    return _off(expansion, part, node.operands[1])


def _off(expansion: _Expansion, part: Products, strength: Expression) -> Products:
    """A part whose factors are zero where its strength is."""
    if isinstance(strength, Constant):
        return part

    def switched(factor: Factor) -> Factor:
        if isinstance(factor.expression, choice.Mask):  # zero or one, whatever the part holds
            return factor
        return expansion.factor(choice.Switched(factor.expression, strength), factor.labels)

    terms = tuple(replace(term, factors=tuple(map(switched, term.factors))) for term in part.terms)
    return replace(part, terms=terms)


# --------------------------------------------------------------------------- what is chosen
# What only some choices have is a term with a factor that reads the choice: an entry of a stack, or a mask.


def _routed(expansion: _Expansion, node: choice.Routed, _: Products, base: Products, option: Products) -> Products:
    """The options' terms that read the choice, what base and options have in common, and the rest of both by a mask."""
    number = node.operands[0]
    if any(_reads(factor.expression, number) for term in base.terms for factor in term.factors):
        raise _NoForm
    left = list(base.terms)
    terms: list[Summand] = []
    for term in option.terms:
        if any(_reads(factor.expression, number) for factor in term.factors):
            terms.append(term)
            continue
        same = next((other for other in left if _is_same(other, term)), None)
        if same is None:
            terms.append(_masked(node, term, "options"))
        else:
            left.remove(same)
            terms.append(term)
    terms += [_masked(node, term, "base") for term in left]
    return Products(node.shape or (), tuple(terms), expansion.sizes)


def _chosen(expansion: _Expansion, node: choice.Choose, _: Products, *options: Products) -> Products:
    """The terms of all options, each by a mask, where examples choose for themselves."""
    number = node.operands[0]
    if not expansion.each or not isinstance(number, Choice) or _reads_stored(node):
        raise _NoForm
    terms = [_masked(node, term, place) for place, option in enumerate(options) for term in option.terms]
    return Products(node.shape or (), tuple(terms), expansion.sizes)


def _reads_stored(node: choice.Choose) -> bool:
    """Whether the options are stored weights: one of them is read as an entry is."""
    return all(isinstance(option, Stored) for option in node.operands[1:])


def _reads(expression: Expression, choice: Expression) -> bool:
    return any(step.expression == choice for step in program(expression))


def _masked(node: Node, term: Summand, of: str | int) -> Summand:
    return replace(term, factors=(*term.factors, Factor(choice.Mask(node.operands[0], of=of), ())))


def labels_of(term: Summand) -> tuple[tuple[Labels, ...], tuple[Labels, ...]]:
    """The labels of a term's factors and axes, numbered in the order of their appearance."""
    numbers: dict[int, int] = {}

    def named(labels: Labels) -> Labels:
        return tuple(numbers.setdefault(label, len(numbers)) for label in labels)

    return tuple(named(factor.labels) for factor in term.factors), tuple(map(named, term.axes))


def _is_same(a: Summand, b: Summand) -> bool:
    """Whether two terms are equal, whatever their labels are called."""
    factors = [factor.expression for factor in a.factors] == [factor.expression for factor in b.factors]
    return factors and a.number == b.number and labels_of(a) == labels_of(b)


_RULES: dict[type, Callable[..., Products]] = {
    arithmetic.Add: _sum,
    arithmetic.Subtract: _difference,
    arithmetic.Negative: _negative,
    arithmetic.Multiply: _product,
    arithmetic.Divide: _quotient,
    arithmetic.MatMul: _matmul,
    structure.Einsum: _einsum,
    structure.Transpose: _transpose,
    structure.Reshape: _reshape,
    structure.Index: _index,
    arithmetic.StopGradient: _on_each_factor,
    arithmetic.ScaleGradient: _on_each_factor,
    choice.Adapted: _adapted,
    choice.Switched: _switched,
    choice.Choose: _chosen,
    choice.Routed: _routed,
}
"""How the operators of the algebra act on sums of products. Any other operator may say a simpler expression
that equals it (`Node.expanded`), or is one factor."""
