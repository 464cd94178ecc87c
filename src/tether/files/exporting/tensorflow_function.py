"""The model as a TensorFlow function, on the TensorFlow and JAX backends."""

from __future__ import annotations

from typing import Any

import keras

from tether.files.exporting.asking import Asked


def traced(asked: Asked, held: list[Any]) -> tuple[Any, list[str]]:
    """A function of the inputs and of the variables that are held out, with named outputs.

    Returns:
        The function, which has a signature, and the names of its arguments that stand for variables.
    """
    import tensorflow as tf

    names = [f"held_{at}" for at in range(len(held))]
    specs = [tf.TensorSpec(shape, dtype, name) for name, shape, dtype in asked.specs]
    specs += [
        tf.TensorSpec(tuple(variable.shape), variable.dtype, name) for name, variable in zip(names, held, strict=True)
    ]

    def compute(*tensors: Any) -> list[Any]:
        return asked.with_held(tensors, held)

    if keras.backend.backend() == "jax":
        compute = _through_jax(asked, held, compute)

    def serve(*tensors: Any) -> dict[str, Any]:
        return dict(zip(asked.output_names, compute(*tensors), strict=True))

    return tf.function(serve, input_signature=specs, autograph=False), names


def _through_jax(asked: Asked, held: list[Any], compute: Any) -> Any:
    from jax.experimental import jax2tf

    shapes = [f"({''.join(f'{size}, ' for size in shape)})" for shape, _ in asked.described(held)]
    return jax2tf.convert(compute, polymorphic_shapes=shapes, with_gradient=False)


__all__ = ["traced"]
