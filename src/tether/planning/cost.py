"""What a plan costs on a machine, and a plan that is being written: its steps, and the cost of each."""

from __future__ import annotations

import copy
import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import keras

from tether.planning.products import Labels

# --------------------------------------------------------------------------- the machine
# What a machine needs for a step: the constants of the cost model, and where they come from.


@dataclass(frozen=True)
class Machine:
    """How fast a kind of device computes, reads and starts."""

    name: str
    flops: float
    """Multiplications and additions a second in a large matrix product."""
    half: float
    """The length of one side of a matrix product at which it runs at half that speed."""
    near: float
    """Bytes a second to and from memory for what fits in the cache."""
    far: float
    """Bytes a second for what does not."""
    cache: float
    """Bytes of the cache."""
    start: float
    """Seconds to start one operation."""
    gather: float = 2.0
    """How many times slower than in order memory is read by rows that a table is asked for."""
    attach: float = 0.0
    """Seconds that a gradient takes which is computed by other steps than the value's: nothing once compiled."""

    def moving(self, moved: float) -> float:
        """Seconds to read and write so many bytes."""
        return min(moved, self.cache) / self.near + max(moved - self.cache, 0.0) / self.far

    def product(self, m: int, n: int, k: int, count: int, moved: float, thinness: float = 1.0) -> float:
        """Seconds for `count` products of `m × k` and `k × n` matrices that move `moved` bytes.

        `thinness` says how much more than a matrix product the operation minds short sides.
        """
        m, n, k = max(m, 1), max(n, 1), max(k, 1)
        speed = self.flops
        for side in (m, n, k):
            speed *= side / (side + thinness * self.half)
        return self.start + max(2.0 * m * n * k * count / speed, self.moving(moved))

    def elementwise(self, moved: float) -> float:
        """Seconds for an operation that only moves bytes."""
        return self.start + self.moving(moved)


# Fitted by benchmarks/calibrate.py to the times of products, sums and lookups of many sizes, on two cores of a server
# (the times are in benchmarks/results); TensorFlow's start to the layers of benchmarks/planner.py, since single
# operations came out too cheap. What counts are their ratios: another CPU moves all of them together.
_CPU = {
    "jax": Machine("CPU, JAX", flops=3.9e11, half=15.0, near=5e10, far=9e9, cache=2.5e7, start=4e-6),
    "tensorflow": Machine("CPU, TensorFlow", flops=3.0e11, half=15.0, near=5e10, far=9e9, cache=2.5e7, start=8e-6),
    "torch": Machine(
        "CPU, PyTorch", flops=1.6e11, half=12.0, near=5e10, far=9e9, cache=2.5e7, start=1.1e-5, attach=1.2e-4
    ),
}
# From the data sheet of an H100, for float32 without TF32, which is Keras's default; not measured.
_GPU = Machine("GPU", flops=4.5e13, half=64.0, near=5e12, far=2.5e12, cache=5e7, start=6e-6)


def machine() -> Machine:
    """The machine that the backend computes on, by the kind of its default device."""
    backend = keras.backend.backend()
    return _GPU if _on_gpu(backend) else _CPU.get(backend, _CPU["torch"])


_gpu: dict[str, bool] = {}


def _on_gpu(backend: str) -> bool:
    if backend not in _gpu:
        if backend == "jax":
            import jax

            _gpu[backend] = jax.default_backend() != "cpu"
        elif backend == "tensorflow":
            import tensorflow as tf

            _gpu[backend] = bool(tf.config.list_logical_devices("GPU"))
        elif backend == "torch":
            import torch

            _gpu[backend] = torch.cuda.is_available()
        else:
            _gpu[backend] = False
    return _gpu[backend]


# --------------------------------------------------------------------------- a plan being written
# A plan being written: steps over registers, each with its cost, equal steps once.


_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

THIN = 2.0
"""How much more than a matrix product a convolution minds few channels: measured with benchmarks/planner.py."""


class NoPlan(Exception):
    """This alternative does not exist."""


@dataclass(frozen=True)
class Operation:
    """One operation on registers: the layer's input has register 0, the factors follow, then each step's result."""

    op: str
    inputs: tuple[int, ...]
    detail: Any = None
    """What the operation needs beside its inputs; hashable."""


@dataclass(frozen=True)
class Register:
    """What is known of a value while the plan is written."""

    count: int
    live: bool
    """Whether a gradient flows into it."""
    of_input: bool
    """Whether it was computed from the layer's input."""
    text: str


@dataclass(frozen=True)
class Value:
    """A register, and the labels of its axes where it is used: equal steps of two terms have one register."""

    register: int
    labels: Labels


class Draft:
    """Registers and steps, and what they cost forward and backward, in seconds.

    Args:
        machine: What the costs are for.
        sizes: The size of each label; shared with whoever makes labels.
        itemsize: Bytes of a number.
        training: Whether there is a backward pass.
        repeated: Whether what does not depend on the input is computed once for many calls, so that it costs nothing.
    """

    def __init__(
        self, machine: Machine, sizes: dict[int, int], itemsize: int, training: bool, repeated: bool = False
    ) -> None:
        self.machine, self.sizes, self.itemsize, self.training = machine, sizes, itemsize, training
        self.repeated = repeated
        self.registers: list[Register] = []
        self.steps: list[Operation] = []
        self.seconds_of: list[tuple[float, float]] = []
        """What each step costs, forward and backward."""
        self.given = 0.0
        """What the factors cost that are computed before the first step."""
        self.made: frozenset[int] = frozenset()
        """The registers that are filled in several ways, of which the cost counts already."""
        self._known: dict[Operation, int] = {}
        self._uses: list[int] = []

    def fork(self) -> Draft:
        """A copy to try something in."""
        other = copy.copy(self)
        other.registers, other.steps, other.seconds_of = [*self.registers], [*self.steps], [*self.seconds_of]
        other._known, other._uses = dict(self._known), [*self._uses]
        return other

    # ------------------------------------------------------------------ registers

    def give(self, count: int, *, live: bool, of_input: bool, text: str, seconds: float = 0.0) -> int:
        """A register that is filled before the first step."""
        self.registers.append(Register(count, live and self.training, of_input, text))
        self._uses.append(0)
        self.given += 0.0 if self.repeated else seconds
        return len(self.registers) - 1

    def size(self, labels: Iterable[int]) -> int:
        """The number of elements of a value with these labels."""
        return math.prod(self.sizes[label] for label in labels)

    def bytes(self, register: int) -> float:
        """How many bytes a register of the plan takes."""
        return float(self.registers[register].count * self.itemsize)

    def seconds(self) -> float:
        """What all steps cost, with the adding up of the gradients of what was used several times."""
        total = self.given + sum(forward + backward for forward, backward in self.seconds_of)
        for place, register in enumerate(self.registers):
            if register.live and self._uses[place] > 1:
                total += (self._uses[place] - 1) * self.machine.elementwise(3.0 * self.bytes(place))
        return total

    def _emit(
        self,
        step: Operation,
        labels: Labels,
        text: str,
        forward: float,
        backward: Sequence[float],
        of_input: bool | None = None,
    ) -> Value:
        """Adds a step, unless its value is in a register already. `backward`: seconds for each input's gradient."""
        if step not in self._known:
            inputs = [self.registers[place] for place in step.inputs]
            spent = sum(cost for cost, register in zip(backward, inputs, strict=True) if register.live)
            for place in step.inputs:
                self._uses[place] += 1
            if of_input is None:
                of_input = any(register.of_input for register in inputs)
            live = any(register.live for register in inputs)
            self.registers.append(Register(self.size(labels), live, of_input, text))
            self._uses.append(0)
            self.steps.append(step)
            if self.repeated:
                if not of_input:
                    forward = spent = 0.0
                for place in step.inputs:  # the gradient of a weight is added up over the repetitions
                    if self.registers[place].live and not self.registers[place].of_input and of_input:
                        spent += self.machine.elementwise(3.0 * self.bytes(place))
            self.seconds_of.append((forward, spent))
            self._known[step] = len(self.registers) - 1
        return Value(self._known[step], labels)

    # ------------------------------------------------------------------ operations

    def scale(self, a: Value, number: float) -> Value:
        """A value times a number."""
        if number == 1.0:
            return a
        register = self.registers[a.register]
        text = f"-{register.text}" if number == -1.0 else f"{number:g} * {register.text}"
        cost = self.machine.elementwise(2.0 * self.bytes(a.register))
        return self._emit(Operation("scale", (a.register,), number), a.labels, text, cost, [cost])

    def reshape(self, a: Value, op: str, detail: tuple[Hashable, ...], labels: Labels) -> Value:
        """A value with axes split or joined: no element moves."""
        return self._emit(Operation(op, (a.register,), detail), labels, self.registers[a.register].text, 0.0, [0.0])

    def restore(self, a: Value, detail: tuple[Hashable, ...]) -> Value:
        """The result in the axes that the layer's output has; their sizes may be those of the input's."""
        found = self.reshape(a, "restore", detail, a.labels)
        step = self.steps[-1]
        self.steps[-1] = Operation(step.op, (*step.inputs, 0), step.detail)
        return found

    def add(self, a: Value, b: Value) -> Value:
        """The sum of two values of as many axes, whose sizes may be 1 on either side."""
        labels = tuple(
            left if self.sizes[left] >= self.sizes[right] else right
            for left, right in zip(a.labels, b.labels, strict=True)
        )
        moved = self.bytes(a.register) + self.bytes(b.register) + self.size(labels) * self.itemsize
        text = f"{self.registers[a.register].text} + {self.registers[b.register].text}"
        # The gradient of a sum is handed on as it is.
        step = Operation("add", (a.register, b.register))
        return self._emit(step, labels, text, self.machine.elementwise(moved), [0.0, 0.0])

    def digit(self, ids: Value, divisor: int, size: int | None) -> Value:
        """The part of each number that counts along one of several labels."""
        cost = self.machine.elementwise(2.0 * self.bytes(ids.register))
        text = f"{self.registers[ids.register].text} // {divisor}" + ("" if size is None else f" % {size}")
        return self._emit(Operation("digit", (ids.register,), (divisor, size)), ids.labels, text, cost, [0.0])

    def take(self, table: Value, ids: Value, label: int) -> Value:
        """The entries of a factor along a label, at the numbers in a register."""
        axis = table.labels.index(label)
        labels = table.labels[:axis] + ids.labels + table.labels[axis + 1 :]
        rows = self.size(labels) * self.itemsize * (4.0 if axis else 1.0)  # columns lie far apart in memory
        forward = self.machine.elementwise(rows * self.machine.gather)
        backward = forward + self.machine.elementwise(self.bytes(table.register))
        text = f"{self.registers[table.register].text}[{self.registers[ids.register].text}]"
        step = Operation("take", (table.register, ids.register), axis)
        return self._emit(step, labels, text, forward, [backward, 0.0])

    def mask(self, a: Value, mask: Value) -> Value:
        """A value times a number for each row; where that is zero, zero, whatever the value is."""
        cost = self.machine.elementwise(2.0 * self.bytes(a.register))
        text = f"{self._inside(a)} · {self.registers[mask.register].text}"
        places = tuple(a.labels.index(label) for label in mask.labels)
        step = Operation("mask", (a.register, mask.register), tuple(place in places for place in range(len(a.labels))))
        return self._emit(step, a.labels, text, cost, [cost, cost])

    def pick(self, table: Value, ids: Value, numbers: Value, label: int, other: float) -> Value:
        """The entries along a label, each from the table that the number of its row names, or `other` for none."""
        axis = table.labels.index(label)
        labels = ids.labels + table.labels[:axis] + table.labels[axis + 1 :]
        rows = self.size(labels) * self.itemsize
        forward = self.machine.elementwise(rows * (self.machine.gather + 2.0))
        backward = forward + self.machine.elementwise(self.bytes(table.register))
        of_table, of_numbers, of_ids = (self.registers[value.register].text for value in (table, numbers, ids))
        text = f"{of_table}[{of_numbers}, {of_ids}]"
        step = Operation("pick", (table.register, ids.register, numbers.register), (axis, other))
        return self._emit(step, labels, text, forward, [backward, 0.0, 0.0])

    def product(self, a: Value, b: Value, kept: frozenset[int], order: Labels | None = None) -> Value:
        """The product of two values, summed over the labels that nobody needs further.

        Args:
            a: One value.
            b: The other.
            kept: The labels that are needed further.
            order: The labels of the result in the order that it must have, if it must have one.
        """
        of_input = self.registers[a.register].of_input, self.registers[b.register].of_input
        if of_input == (False, True) or (not of_input[0] and set(a.labels) < set(b.labels)):
            a, b = b, a
        inner = [label for label in a.labels if label in b.labels and label not in kept]
        both = [label for label in a.labels if label in b.labels and label in kept]
        alone = any(label not in kept and label not in inner for label in (*a.labels, *b.labels))
        labels = tuple(label for label in a.labels if label in kept)
        labels += tuple(label for label in b.labels if label in kept and label not in labels)
        labels = labels if order is None else order
        inputs = (a.register, b.register)
        text = f"({self._inside(a)} · {self._inside(b)})"
        moved = self.bytes(a.register) + self.bytes(b.register) + self.size(labels) * self.itemsize
        if not inner:
            cost = self.machine.elementwise(moved)
            aligned = tuple(label for label in labels if label in b.labels) == b.labels
            if not alone and labels == a.labels and aligned and set(b.labels) <= set(a.labels):
                first = min((a.labels.index(label) for label in b.labels), default=len(a.labels))
                present = tuple(label in b.labels for label in a.labels[first:])
                return self._emit(Operation("multiply", inputs, present), labels, text, cost, [cost, cost])
            return self._emit(
                Operation("einsum", inputs, _equation([a.labels, b.labels], labels)), labels, text, cost, [cost, cost]
            )
        m = self.size(label for label in a.labels if label in kept and label not in both)
        n = self.size(label for label in b.labels if label in kept and label not in both)
        k, count = self.size(inner), self.size(both)
        costs = [self.machine.product(*sides, count, moved) for sides in ((m, n, k), (m, k, n), (k, n, m))]
        plain = len(b.labels) == 2 and tuple(inner) == b.labels[:1] and not alone and not both
        if plain and a.labels[-1] == inner[0] and labels == (*a.labels[:-1], b.labels[1]):
            return self._emit(Operation("matmul", inputs), labels, text, costs[0], costs[1:])
        equation = _equation([a.labels, b.labels], labels)
        return self._emit(Operation("einsum", inputs, equation), labels, text, costs[0], costs[1:])

    def _inside(self, a: Value) -> str:
        text = self.registers[a.register].text
        return f"({text})" if " + " in text and not text.startswith("(") else text

    def ordered(self, a: Value, labels: Labels) -> Value:
        """A value with its labels in this order, summed over those that are not in it."""
        if a.labels == labels:
            return a
        cost = self.machine.elementwise(self.bytes(a.register) + self.size(labels) * self.itemsize)
        step = Operation("einsum", (a.register,), _equation([a.labels], labels))
        return self._emit(step, labels, self.registers[a.register].text, cost, [cost])

    def convolve(self, a: Value, kernel: Value, labels: Labels, sides: tuple[int, int, int], count: int) -> Value:
        """The layer's own convolution with a kernel; `sides` are those of the matrix product that it amounts to."""
        m, n, k = sides
        moved = self.bytes(a.register) + self.bytes(kernel.register) + self.size(labels) * self.itemsize
        costs = [self.machine.product(*s, count, moved, THIN) for s in ((m, n, k), (m, k, n), (k, n, m))]
        text = f"conv({self.registers[a.register].text}, {self.registers[kernel.register].text})"
        return self._emit(Operation("convolve", (a.register, kernel.register)), labels, text, costs[0], costs[1:])


def _equation(inputs: Sequence[Labels], output: Labels) -> str:
    letters: dict[int, str] = {}
    for labels in inputs:
        for label in labels:
            letters.setdefault(label, _LETTERS[len(letters)])
    left = ",".join("".join(letters[label] for label in labels) for labels in inputs)
    return f"{left}->{''.join(letters[label] for label in output)}"
