"""What a machine needs for a step: the constants of the cost model, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass

import keras


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
