"""Random expressions of a given shape, drawn by a `random.Random`, for the planner's tests."""

import math

import keras
import numpy as np

import tether
from tether import ops

MAX_SIZE = 400


class Drawing:
    """Draws expressions over weights that are used again and again."""

    def __init__(self, random, seed=0, opaque=True):
        self.random, self.opaque = random, opaque
        self.rng = np.random.default_rng(seed)
        self.weights = {}

    def weight(self, shape):
        """A weight of this shape: a new one, or one that was drawn before."""
        known = self.weights.setdefault(shape, [])
        if not known or (len(known) < 2 and self.random.random() < 0.6):
            value = self.rng.uniform(0.4, 1.2, shape) * self.rng.choice([-1.0, 1.0], shape)
            known.append(tether.Weight(np.asarray(value, "float32"), name=f"w{len(self.all)}"))
        return self.random.choice(known)

    @property
    def all(self):
        return [weight for known in self.weights.values() for weight in known]

    def expression(self, shape, depth):
        """An expression of this shape."""
        if depth == 0:
            return self.weight(shape)
        kinds = ["sum", "sum", "multiply", "number", "transpose", "reshape", "slice", "gradient", "einsum"]
        kinds += ["matmul", "matmul"] if len(shape) == 2 else []
        kinds += ["opaque"] if self.opaque else []
        return getattr(self, f"_{self.random.choice(kinds)}")(shape, depth - 1)

    def _smaller(self, shape):
        """A shape that broadcasts to this one."""
        if self.random.random() < 0.5:
            return shape
        ones = tuple(1 if self.random.random() < 0.4 else size for size in shape)
        return ones[self.random.randrange(len(shape)) :] if self.random.random() < 0.4 else ones

    def _sum(self, shape, depth):
        a, b = self.expression(shape, depth), self.expression(self._smaller(shape), depth)
        a, b = (a, b) if self.random.random() < 0.5 else (b, a)
        return a + b if self.random.random() < 0.6 else a - b

    def _multiply(self, shape, depth):
        a, b = self.expression(shape, depth), self.expression(self._smaller(shape), max(depth - 1, 0))
        return a * b if self.random.random() < 0.6 else b * a

    def _number(self, shape, depth):
        a = self.expression(shape, depth)
        return self.random.choice([lambda: 0.5 * a, lambda: -a, lambda: a / 2.0, lambda: a * -1.5, lambda: a + 0.25])()

    def _transpose(self, shape, depth):
        order = self.random.sample(range(len(shape)), len(shape))
        before = tuple(shape[axis] for axis in order)
        return self.expression(before, depth).transpose(*(order.index(axis) for axis in range(len(shape))))

    def _reshape(self, shape, depth):
        count = math.prod(shape)
        n = self.random.choice([n for n in range(1, count + 1) if count % n == 0])
        before = (count // n, n) if self.random.random() < 0.7 else (n, 1, count // n)
        return self.expression(before, depth).reshape(shape)

    def _slice(self, shape, depth):
        before, key = [], []
        for size in shape:
            kind = self.random.choice(["all", "all", "part", "back", "new"])
            if kind == "new" and size == 1:
                key.append(None)
                continue
            extra = self.random.randrange(1, 3) if kind == "part" else 0
            before.append(size + extra)
            key.append(slice(extra, None) if extra else slice(None, None, -1) if kind == "back" else slice(None))
        if self.random.random() < 0.4 or not before:
            before.append(2)
            key.append(self.random.choice([0, -1]))
        if math.prod(before) > MAX_SIZE:
            return self.expression(shape, depth)
        return self.expression(tuple(before), depth)[tuple(key)]

    def _gradient(self, shape, depth):
        a = self.expression(shape, depth)
        return a.stop_gradient() if self.random.random() < 0.4 else a.scale_gradient(0.5)

    def _matmul(self, shape, depth):
        inner = self.random.choice([1, 2, 3])
        return self.expression((shape[0], inner), depth) @ self.expression((inner, shape[1]), depth)

    def _einsum(self, shape, depth):
        letters = "abcd"[: len(shape)]
        left = "".join(c for c in letters if self.random.random() < 0.6) or letters[0]
        right = "".join(c for c in letters if c not in left or self.random.random() < 0.2)
        right = "".join(self.random.sample(right + "z", len(right) + 1))
        left += "z" if self.random.random() < 0.7 else ""
        sizes = {**dict(zip(letters, shape, strict=True)), "z": 2}
        a, b = (self.expression(tuple(sizes[c] for c in part), depth) for part in (left, right))
        return ops.einsum(f"{left},{right}->{letters}", a, b)

    def _opaque(self, shape, depth):
        return ops.apply(keras.ops.tanh, self.expression(shape, depth))
