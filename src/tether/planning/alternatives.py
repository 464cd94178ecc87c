"""The ways to compute `inputs · expression`, and the one to take."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from tether.planning.contraction import Path, grouped, orders
from tether.planning.control import Mode
from tether.planning.cost import Draft, Machine, NoPlan, Value, machine
from tether.planning.plan import ASSUMED_ROWS, MATERIALIZE, Alternative, Plan, Problem, Reading, coded
from tether.planning.products import Factor, Labels, Products, Summand
from tether.weights.each import choices_in, has_base, is_read_only
from tether.weights.expression import Expression, Node, program
from tether.weights.leaves import Choice
from tether.weights.operators.arithmetic import MatMul
from tether.weights.operators.choice import Mask

# --------------------------------------------------------------------------- convolutions
# The steps of a convolution: channels mixed before it, the layer's own, channels mixed after it.


def convolved(
    search: Search, draft: Draft, term: Summand, axes: dict[str, Labels], factors: tuple[Value, ...]
) -> tuple[Draft, Value]:
    """Channels mixed before, the layer's own convolution with what has positions, channels mixed after."""
    spatial = {label for letter in search.problem.kernel[:-2] for label in axes[letter]}
    for letter, size in zip(search.problem.kernel[:-1], search.products.shape, strict=False):
        if size > 1 and not axes[letter]:
            raise NoPlan
    core = [value for value in factors if spatial & set(value.labels)]
    others = [value for value in factors if not spatial & set(value.labels)]
    best: tuple[Draft, Value] | None = None
    for roles in itertools.product(("before", "core", "after"), repeat=len(others)):
        chosen = {role: [v for v, r in zip(others, roles, strict=True) if r == role] for role in ("before", "after")}
        inner = [*core, *(v for v, r in zip(others, roles, strict=True) if r == "core")]
        if not inner:
            continue
        try:
            tried = _convolution(search, draft.fork(), term, axes, chosen["before"], inner, chosen["after"])
        except NoPlan:
            continue
        if best is None or tried[0].seconds() < best[0].seconds():
            best = tried
    if best is None:
        raise NoPlan
    return best


def _convolution(
    search: Search,
    draft: Draft,
    term: Summand,
    axes: dict[str, Labels],
    before: list[Value],
    core: list[Value],
    after: list[Value],
) -> tuple[Draft, Value]:
    problem = search.problem
    depthwise = problem.convolution is not None and problem.convolution.depthwise
    channels_in, channels_out = problem.kernel[-2:]
    draft, x, axes = search.input(draft, axes)
    out = [axes[letter] for letter in problem.outputs]
    flat = tuple(label for axis in out for label in axis)
    later = set(flat).union(*(value.labels for value in after))
    of_core = {label for value in core for label in value.labels}
    if of_core & search.rows:
        raise NoPlan  # a kernel for each example
    # Channels mixed before the convolution: what of it the kernel sums over.
    channels = axes[channels_in]
    if before:
        mixed = set(channels).union(*(value.labels for value in before)) - search.rows
        channels = tuple(sorted(mixed & (of_core | later), reverse=True))
        wanted = tuple(
            label for letter in problem.inputs for label in (channels if letter == channels_in else axes[letter])
        )
        draft, x = search.multiplied(draft, [x, *before], 1.0, wanted, applied=False)
    of_kernel = tuple(label for label in channels if label in of_core or draft.size((label,)) > 1)  # one has no label
    if not set(of_kernel) <= of_core or (set(of_kernel) & later and not depthwise):
        raise NoPlan
    if depthwise and channels != axes[channels_in]:
        raise NoPlan
    spatial = [axes[letter] for letter in problem.kernel[:-2]]
    places = {label for axis in spatial for label in axis}
    made = tuple(sorted((of_core & later) - places - set(channels), reverse=True))
    kernel_axes = [*spatial, of_kernel, made]
    order = tuple(label for axis in kernel_axes for label in axis)
    if of_core - set(order) & later:
        raise NoPlan
    draft, kernel = search.multiplied(draft, core, term.number, order, applied=False)
    sizes = tuple(search.label(draft.size(axis)) for axis in kernel_axes)
    kernel = search.joined(draft, kernel, kernel_axes, sizes)
    if len(channels) != 1:
        groups = [channels if letter == channels_in else axes[letter] for letter in problem.inputs]
        x = search.joined(draft, x, groups, tuple(search.label(draft.size(axis)) for axis in groups))
    middle = [
        ((*channels, *made) if depthwise else made) if letter == channels_out else axes[letter]
        for letter in problem.outputs
        if not (depthwise and letter == channels_in)
    ]
    rows = draft.size(
        label for letter in problem.outputs if letter not in (channels_in, channels_out) for label in axes[letter]
    )
    joined = tuple(search.label(draft.size(axis)) for axis in middle)
    positions = draft.size(places)
    if depthwise:
        sides, count = (rows, draft.size(made), positions), draft.size(channels)
    else:
        sides, count = (rows, draft.size(made), positions * draft.size(channels)), 1
    y = draft.convolve(x, kernel, joined, sides, count)
    if any(len(axis) != 1 for axis in middle):
        detail = tuple(tuple(search.sizes[label] for label in axis) if len(axis) != 1 else None for axis in middle)
        y = draft.reshape(y, "split", detail, tuple(label for axis in middle for label in axis))
    y = Value(y.register, tuple(label for axis in middle for label in axis))
    draft, value = search.multiplied(draft, [y, *after], 1.0, flat, applied=False)
    return draft, search.result(draft, value, out)


# --------------------------------------------------------------------------- the search
# The search for a plan: which terms of a sum are built into one weight, and in which order the others are applied.


KEPT = 1.05
"""How many times faster a weight that is built has to be in training: each layer keeps its own until the gradient has
been computed, so that all of them take the memory of a second model."""
MAX_APART = 3
"""Of so many terms that read a choice each may read it in another way; of more, all read it alike."""
MAX_MERGED = 5
"""A sum of more terms is built whole or applied whole."""


def make_plan(
    problem: Problem,
    products: Products,
    live: Callable[[Expression], bool],
    mode: Mode = "auto",
    on: Machine | None = None,
) -> Plan:
    """The plan of least cost.

    Args:
        problem: What the layer computes.
        products: The weight.
        live: Whether a gradient flows into a factor.
        mode: `"factored"` or `"materialize"` to take that alternative, whatever it costs.
        on: The machine; left out, the one that the backend computes on.
    """
    search = Search(problem, products, live, machine() if on is None else on)
    found: list[tuple[Alternative, Draft, Value]] = []
    for merged, ways in itertools.product(search.subsets(), search.ways()):
        try:
            draft, output = search.draft(merged, ways=ways)
        except NoPlan:
            continue
        every = len(merged) == len(products.terms)
        name = "materialize" if every else "partly" if merged else "factored"
        found.append((_described(name, merged, draft), draft, output))
    mixed = search.mixed()
    if mixed is not None:
        found.append(mixed[:3])
    alternatives = tuple(sorted((entry[0] for entry in found), key=lambda alternative: alternative.seconds))
    if mode != "auto" and not problem.chosen:
        found = [entry for entry in found if entry[0].name == mode]
    if not found:
        return replace(MATERIALIZE, alternatives=alternatives)
    best, draft, output = min(found, key=lambda entry: _preference(entry[0], problem))
    if best.name == "materialize":
        return replace(MATERIALIZE, seconds=best.seconds, alternatives=alternatives)
    factors = tuple(search.places)
    plan = Plan(
        best.name, tuple(draft.steps), factors, output.register, best.seconds, alternatives, choice=problem.choice
    )
    if mixed is not None and best is mixed[0]:
        trained = tuple(place for place, factor in enumerate(factors) if live(factor.expression))
        plan = replace(plan, gradient=mixed[-1], trained=trained)
    return plan


def _preference(alternative: Alternative, problem: Problem) -> float:
    """The seconds, and a little more for what takes memory: in training, built weights live until the gradient."""
    return alternative.seconds * (KEPT if problem.training and alternative.merged else 1.0)


def _described(name: str, merged: tuple[int, ...], draft: Draft) -> Alternative:
    first = len(draft.registers) - len(draft.steps)
    lines = []
    for place, (step, (forward, backward)) in enumerate(zip(draft.steps, draft.seconds_of, strict=True)):
        if forward or backward:
            gradient = f" + {backward * 1e6:,.0f}" if draft.training else ""
            lines.append(f"{draft.registers[first + place].text}  [{step.op}, {forward * 1e6:,.0f}{gradient} µs]")
    return Alternative(name, merged, draft.seconds(), tuple(lines))


class Search:
    """What the alternatives of one problem have in common."""

    def __init__(self, problem: Problem, products: Products, live: Callable[[Expression], bool], on: Machine) -> None:
        self.problem, self.products, self.grouping = grouped(problem, products)
        problem, products = self.problem, self.products
        self.live, self.machine = live, on
        self.sizes = dict(products.sizes)
        self._next = -1
        sizes = dict(zip(problem.inputs, problem.sizes, strict=True))
        self.letters: dict[str, int] = {}
        """Labels of the letters that the weight does not have."""
        for letter in problem.inputs:
            if letter not in problem.kernel:
                size = sizes[letter]
                self.letters[letter] = self.label(ASSUMED_ROWS if size is None else max(size, 1))
        if problem.convolution is not None:
            free = [letter for letter in problem.outputs if letter not in problem.kernel and letter not in self.letters]
            for letter, size in zip(free, problem.convolution.positions, strict=True):
                self.letters[letter] = self.label(ASSUMED_ROWS if size is None else max(size, 1))
        self.rows = frozenset(self.letters.values())
        self.chosen = tuple(self.letters[letter] for letter in problem.inputs[: problem.chosen])
        """The labels of the axes of the choice."""
        self.choice = problem.choice
        self.places: dict[Reading, int] = {}
        """The register of each factor, in each way in which it may be read."""
        for term in products.terms:
            for factor in term.factors:
                for reading in self._readings(factor.expression):
                    self.places.setdefault(reading, len(self.places) + 1)
        self.tables = {place for reading, place in self.places.items() if reading.how == "table"}
        """The registers that have a table for each option, of which rows are picked."""
        if self.choice is not None:
            for how in ("weights", "numbers"):
                self.places[Reading(self.choice, how)] = len(self.places) + 1

    def _readings(self, expression: Expression) -> list[Reading]:
        """In which ways a factor may be read."""
        choices = choices_in(expression)
        if self.choice is None or self.choice not in choices:
            return [Reading(expression, "once" if choices and not isinstance(expression, Mask) else "value")]
        if isinstance(expression, Mask) or has_base(expression, self.choice):
            return [Reading(expression, "rows")]
        return [Reading(expression, "rows"), Reading(expression, "options"), Reading(expression, "table")]

    def _of_choice(self, term: Summand) -> bool:
        """Whether a term has a factor that is another one for each option: not only a mask."""
        return any(Reading(factor.expression, "options") in self.places for factor in term.factors)

    def ways(self) -> list[tuple[str, ...]]:
        """How the terms that read the choice may read it: `"rows"`, an option for each; or `"options"`, all of them."""
        count = sum(self._of_choice(term) for term in self.products.terms)
        if not count:
            return [()]
        if self.problem.mixed:
            return [("options",) * count]
        if self.problem.lookup:
            return [("rows",) * count]
        if count > MAX_APART:
            return [("rows",) * count, ("options",) * count]
        return list(itertools.product(("rows", "options"), repeat=count))

    def label(self, size: int) -> int:
        """A label that no other axis has."""
        self._next -= 1
        self.sizes[self._next] = size
        return self._next

    def subsets(self) -> Iterator[tuple[int, ...]]:
        """Which terms to build into one weight: none, any, all."""
        every = tuple(range(len(self.products.terms)))
        yield ()
        if self.problem.chosen:
            return
        if len(every) <= MAX_MERGED:
            for count in range(1, len(every)):
                for subset in itertools.combinations(every, count):
                    if count > 1 or len(self.products.terms[subset[0]].factors) > 1:
                        yield subset
        yield every

    def mixed(self) -> tuple[Alternative, Draft, Value, Plan] | None:
        """The whole weight built, and a plan for the gradient of what trains, part by part.

        That is worth a look where something in the sum does not train: the gradient of the built weight, of its full
        size, is then computed for the sake of small parts.
        """
        problem = self.problem
        special = problem.lookup or problem.repeated or problem.chosen or problem.convolution is not None
        if not problem.training or special:
            return None
        trains = [any(self.live(factor.expression) for factor in term.factors) for term in self.products.terms]
        if all(trains) or not any(trains):
            return None
        try:
            draft, output = self.draft(tuple(range(len(trains))), live=lambda _: False)
            of_factors, moved = self.gradient_draft()
        except NoPlan:
            return None
        built = _described("mixed", tuple(range(len(trains))), draft)
        apart = _described("mixed", (), of_factors)
        steps = (*built.steps, *(f"gradient of {step}" for step in apart.steps))
        seconds = built.seconds + apart.seconds - draft.given + self.machine.attach
        gradient = Plan("factored", tuple(of_factors.steps), tuple(self.places), moved.register)
        return replace(built, seconds=seconds, steps=steps), draft, output, gradient

    def gradient_draft(self) -> tuple[Draft, Value]:
        """The steps of all terms in which something trains, the input being a constant."""
        dead = [
            index
            for index, term in enumerate(self.products.terms)
            if not any(self.live(factor.expression) for factor in term.factors)
        ]
        draft, output = self.draft((), without=tuple(dead), input_live=False)
        if any(self._size_of(a) != self.sizes[b] for a, b in zip(self.problem.outputs, output.labels, strict=True)):
            raise NoPlan
        return draft, output

    def draft(
        self,
        merged: tuple[int, ...],
        *,
        without: tuple[int, ...] = (),
        live: Callable[[Expression], bool] | None = None,
        input_live: bool = True,
        ways: tuple[str, ...] = (),
    ) -> tuple[Draft, Value]:
        """All steps, if these terms are built into one weight and those are left out, and the choice is read so."""
        problem = self.problem
        trains = self.live if live is None else live
        draft = Draft(self.machine, self.sizes, problem.itemsize, problem.training, problem.repeated)
        rows = math.prod(ASSUMED_ROWS if size is None else size for size in problem.sizes)
        draft.give(rows, live=input_live and not problem.lookup, of_input=True, text="x")
        for reading in self.places:
            expression = reading.expression
            flows = problem.training and trains(expression)
            if reading.how not in ("value", "once"):
                self._give(draft, reading, flows)
                continue
            count = math.prod(expression.shape or ())
            text = expression.notation()
            taken_from = problem.lookup and coded(expression) is not None
            seconds = 0.0 if taken_from else self._evaluation(expression, flows)
            draft.give(count, live=flows, of_input=False, text=text, seconds=seconds)
        of_choice = [index for index, term in enumerate(self.products.terms) if self._of_choice(term)]
        way = dict(zip(of_choice, ways, strict=False))
        if self.grouping is not None:
            draft.reshape(Value(0, ()), "join", self.grouping.joined, (self.label(rows),))
        terms = [index for index in range(len(self.products.terms)) if index not in (*merged, *without)]
        results: list[Value] = []
        if merged:
            draft, whole, weight = self._built(draft, [self.products.terms[index] for index in merged])
            draft, result = self._applied(draft, whole, (weight,))
            results.append(result)
        for index in terms:
            term = self.products.terms[index]
            draft, result = self._applied(draft, term, self._values(term, draft, way.get(index, "rows")))
            results.append(self._masked(draft, term, result))
        total = results[0]
        for result in results[1:]:
            total = draft.add(total, result)
        for axis, letter in enumerate(problem.outputs):
            size = self._size_of(letter)
            if size > 1 and all(self.sizes[result.labels[axis]] == 1 for result in results):
                raise NoPlan
        if self.grouping is not None:
            total = draft.restore(total, self.grouping.restored)
        return draft, total

    def _values(self, term: Summand, draft: Draft | None = None, way: str = "rows") -> tuple[Value, ...]:
        """The factors of a term; what of them reads the choice has its axes, or one of options beside their weights."""
        found: list[Value] = []
        options: Labels = ()
        for factor in term.factors:
            expression, labels = factor.expression, factor.labels
            place = self.places.get(Reading(expression)) or self.places.get(Reading(expression, "once"))
            if place is not None:
                found.append(Value(place, labels))
                continue
            if isinstance(expression, Mask):
                continue
            assert draft is not None and self.choice is not None
            if way == "options" and not options:
                options = (self.label(len(self.choice.choices)),)
                found.append(Value(self._used(draft, Reading(self.choice, "weights")), (*self.chosen, *options)))
            if Reading(expression, "options") not in self.places:
                if self._is_looked_up(term, factor):
                    raise NoPlan  # a whole table for each example
                found.append(Value(self._used(draft, Reading(expression, "rows")), self.chosen + labels))
                continue
            if way == "rows" and self._is_looked_up(term, factor):
                found.append(Value(self._used(draft, Reading(expression, "table")), labels))
            elif way == "rows":
                found.append(Value(self._used(draft, Reading(expression, "rows")), self.chosen + labels))
            else:
                found.append(Value(self._used(draft, Reading(expression, "options")), options + labels))
        return tuple(found)

    def _masked(self, draft: Draft, term: Summand, value: Value) -> Value:
        """The result of a term where its masks let it be, and zero elsewhere, whatever it is there."""
        for factor in term.factors:
            if isinstance(factor.expression, Mask) and Reading(factor.expression, "rows") in self.places:
                mask = self._used(draft, Reading(factor.expression, "rows"))
                value = draft.mask(value, Value(mask, self.chosen))
        return value

    def _is_looked_up(self, term: Summand, factor: Factor) -> bool:
        """Whether entries of a factor are looked up by the numbers in the layer's input."""
        entries = term.axes[0] if self.problem.lookup else ()
        return any(label in factor.labels for label in entries)

    def _give(self, draft: Draft, reading: Reading, flows: bool) -> None:
        """A register for what is read for each choice; what that costs counts where it is used."""
        assert self.choice is not None
        options, rows = len(self.choice.choices), draft.size(self.chosen)
        of_one = 1 if reading.expression is self.choice else math.prod(reading.expression.shape or ())
        count = {"rows": rows * of_one, "weights": rows * options, "numbers": rows}.get(reading.how, options * of_one)
        text = reading.expression.notation()
        text = {"options": f"{text} for all", "weights": f"[{text}]"}.get(reading.how, text)
        live = flows or (reading.how == "weights" and self.problem.mixed)
        draft.give(count, live=live, of_input=False, text=text)

    def _used(self, draft: Draft, reading: Reading) -> int:
        """The register of a reading, which is made now: its cost counts once."""
        place = self.places[reading]
        if place not in draft.made:
            draft.made = draft.made | {place}
            assert self.choice is not None
            machine, moved = draft.machine, draft.bytes(place)
            stack = len(self.choice.choices) * math.prod(reading.expression.shape or ()) * draft.itemsize
            seconds = {
                "rows": machine.elementwise(moved * machine.gather),
                "options": machine.elementwise(2.0 * moved) + machine.start,
                "weights": machine.elementwise(moved),
            }.get(reading.how, 0.0)
            if draft.registers[place].live:
                seconds += machine.elementwise(moved + stack) if reading.how == "rows" else seconds
            if not (isinstance(reading.expression, (Mask, Choice)) or is_read_only(reading.expression)):
                options = len(self.choice.choices)
                times = min(draft.size(self.chosen), options) if reading.how == "rows" else options
                seconds += times * self._evaluation(reading.expression, draft.registers[place].live)
            draft.given += 0.0 if draft.repeated else seconds
        return place

    def _size_of(self, letter: str) -> int:
        if letter in self.letters:
            return self.sizes[self.letters[letter]]
        return self.products.shape[self.problem.kernel.index(letter)]

    def _evaluation(self, expression: Expression, live: bool) -> float:
        """Seconds to compute a factor that is not stored as it is, with its gradient."""
        seconds = 0.0
        for step in program(expression):
            node = step.expression
            if isinstance(node, Node) and node.elementwise_cost:
                shapes = [operand.shape or () for operand in node.operands]
                moved = float(sum(math.prod(shape) for shape in (*shapes, node.shape or ())) * self.problem.itemsize)
                if isinstance(node, MatMul) and len(shapes[0]) == len(shapes[1]) == 2:
                    seconds += self.machine.product(shapes[0][0], shapes[1][1], shapes[0][1], 1, moved)
                else:
                    seconds += self.machine.elementwise(moved)
        return seconds * (3.0 if live else 1.0)

    # ------------------------------------------------------------------ products

    def multiplied(
        self, draft: Draft, values: Sequence[Value], number: float, output: Labels, applied: bool
    ) -> tuple[Draft, Value]:
        """The product of values, in the best order.

        Args:
            draft: Where the steps go.
            values: What is multiplied; the layer's input first, if it is among them.
            number: Multiplies the smallest of them, or the result.
            output: The labels of the result, in order.
            applied: Whether the input has to be multiplied before the last of the other values.
        """
        values = list(values)
        counts = [draft.registers[value.register].count for value in values]
        smallest = min(range(len(values)), key=counts.__getitem__)
        after = draft.size(output) < counts[smallest]
        if not after:
            values[smallest] = draft.scale(values[smallest], number)
        best: tuple[Draft, Value] | None = None
        for path in orders([value.labels for value in values], output, self.sizes, self.rows):
            if applied and len(values) > 2 and self._builds(path):
                continue
            tried = draft.fork()
            left = list(values)
            for pair in path:
                first, second = (left[place] for place in sorted(pair))
                left = [value for place, value in enumerate(left) if place not in pair]
                kept = frozenset(output).union(*(value.labels for value in left))
                left.append(tried.product(first, second, kept, None if left else output))
            found = tried.ordered(left[0], output)
            if best is None or tried.seconds() < best[0].seconds():
                best = tried, found
        if best is None:
            raise NoPlan
        tried, found = best
        return tried, tried.scale(found, number) if after else found

    @staticmethod
    def _builds(path: Path) -> bool:
        """Whether the first value is multiplied last, after all others have become one."""
        place = 0  # of the first value in the list, from which pairs are taken and to whose end products go
        for pair in path[:-1]:
            if place in pair:
                return False
            place -= sum(other < place for other in pair)
        return True

    def _built(self, draft: Draft, terms: Sequence[Summand]) -> tuple[Draft, Summand, Value]:
        """The sum of terms as one weight: a term of one factor, and that factor."""
        shape = self.products.shape
        labels = tuple(self.label(size) for size in shape)
        total: Value | None = None
        for term in terms:
            values = self._values(term)
            flat = tuple(label for axis in term.axes for label in axis)
            if not values:
                raise NoPlan
            draft, value = self.multiplied(draft, values, term.number, flat, applied=False)
            value = self.joined(draft, value, term.axes, labels)
            total = value if total is None else draft.add(total, value)
        if total is None or any(draft.size((a,)) != b for a, b in zip(total.labels, shape, strict=True)):
            raise NoPlan
        axes = tuple(() if size == 1 else (label,) for size, label in zip(shape, labels, strict=True))
        kept = tuple(label for axis in axes for label in axis)
        value = Value(total.register, labels)
        if kept != labels:
            value = draft.reshape(value, "squeeze", tuple(i for i, axis in enumerate(axes) if not axis), kept)
        return draft, Summand(1.0, (), axes), value

    def joined(self, draft: Draft, value: Value, axes: Sequence[Labels], wanted: Labels) -> Value:
        """A value with one axis for each of `axes`, of size 1 where that has no labels."""
        if all(len(axis) == 1 for axis in axes):
            return value
        detail = tuple(len(axis) for axis in axes)
        labels = tuple(
            label if axis or self.sizes[label] == 1 else self.label(1) for axis, label in zip(axes, wanted, strict=True)
        )
        return draft.reshape(value, "join", detail, labels)

    # ------------------------------------------------------------------ what the layer does with a term

    def _applied(self, draft: Draft, term: Summand, factors: tuple[Value, ...]) -> tuple[Draft, Value]:
        """What the layer computes with one term; the result has one axis for each letter of the output."""
        axes = dict(zip(self.problem.kernel, term.axes, strict=True))
        if self.problem.convolution is not None:
            return convolved(self, draft, term, axes, factors)
        if self.problem.lookup:
            return self._looked_up(draft, term, axes, factors)
        draft, x, axes = self.input(draft, axes)
        out = [axes[letter] for letter in self.problem.outputs]
        flat = tuple(label for axis in out for label in axis)
        draft, value = self.multiplied(draft, [x, *factors], term.number, flat, applied=True)
        return draft, self.result(draft, value, out)

    def result(self, draft: Draft, value: Value, axes: Sequence[Labels]) -> Value:
        """A value with one axis for each letter of the output."""
        wanted = tuple(axis[0] if len(axis) == 1 else self.label(draft.size(axis)) for axis in axes)
        return self.joined(draft, value, axes, wanted)

    def input(self, draft: Draft, axes: dict[str, Labels]) -> tuple[Draft, Value, dict[str, Labels]]:
        """The layer's input with the labels of a term, and the labels of each letter."""
        axes = {**{letter: (label,) for letter, label in self.letters.items()}, **axes}
        for letter, size in zip(self.problem.inputs, self.problem.sizes, strict=True):
            if not axes[letter]:  # the term is the same along this axis
                axes[letter] = (self.label(self._size_of(letter) if size is None else size),)
        labels = tuple(label for letter in self.problem.inputs for label in axes[letter])
        x = Value(0 if self.grouping is None else len(self.places) + 1, labels)  # joined by the first step
        if any(len(axes[letter]) > 1 for letter in self.problem.inputs):
            detail = tuple(
                tuple(self.sizes[label] for label in axes[letter]) if len(axes[letter]) > 1 else None
                for letter in self.problem.inputs
            )
            x = draft.reshape(x, "split", detail, labels)
        return draft, x, axes

    def _picked(self, draft: Draft, table: Value, ids: Value, label: int) -> Value:
        """The entries of an option's table: each of the option that its example has chosen."""
        assert self.choice is not None
        numbers = Value(self._used(draft, Reading(self.choice, "numbers")), self.chosen)
        other = float("nan") if self.choice.none is None else 0.0
        return draft.pick(table, ids, numbers, label, other)

    def _looked_up(
        self, draft: Draft, term: Summand, axes: dict[str, Labels], factors: tuple[Value, ...]
    ) -> tuple[Draft, Value]:
        rows = tuple(self.letters[letter] for letter in self.problem.inputs)
        ids, entries = Value(0, rows), axes[self.problem.kernel[0]]
        values, found = [], False
        if not factors:
            raise NoPlan  # a number alone: there is nothing to look up
        for value in factors:
            mine = [label for label in entries if label in value.labels]
            if len(mine) > 1:
                raise NoPlan
            if mine:
                after = entries[entries.index(mine[0]) + 1 :]
                digits = ids
                if len(entries) > 1:
                    # The first digit counts on, so that a number beyond the end stays beyond it.
                    first = mine[0] == entries[0]
                    digits = draft.digit(ids, draft.size(after), None if first else self.sizes[mine[0]])
                if value.register in self.tables:
                    value, found = self._picked(draft, value, digits, mine[0]), True
                else:
                    value, found = draft.take(value, digits, mine[0]), True
            values.append(value)
        out = [(self.letters[letter],) if letter in self.letters else axes[letter] for letter in self.problem.outputs]
        if not found:
            out = [() if letter in self.letters else axes[letter] for letter in self.problem.outputs]
        flat = tuple(label for axis in out for label in axis)
        draft, value = self.multiplied(draft, values, term.number, flat, applied=False)
        return draft, self.result(draft, value, out)
