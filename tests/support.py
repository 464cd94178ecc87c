"""Backend-independent helpers of the tests."""

import keras
import numpy as np


def numpy(value):
    return keras.ops.convert_to_numpy(value)


def gradients(loss_of, variables):
    """The loss and its gradients with respect to Keras variables, as NumPy arrays (None where there is none).

    `loss_of()` computes a scalar from the variables' present values, with calls of layers.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        def pure(values):
            with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
                return keras.ops.convert_to_tensor(loss_of())

        loss, grads = jax.value_and_grad(pure)([variable.value for variable in variables])
    elif backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch([variable.value for variable in variables])
            loss = loss_of()
        grads = tape.gradient(loss, [variable.value for variable in variables])
        grads = [None if g is None else tf.convert_to_tensor(g) for g in grads]
    else:
        loss = loss_of()
        import torch

        values = [variable.value for variable in variables]
        wanted = [value for value in values if value.requires_grad]
        grads = torch.autograd.grad(loss, wanted, allow_unused=True) if wanted and loss.requires_grad else ()
        found = dict(zip(map(id, wanted), grads, strict=bool(grads)))
        grads = [found.get(id(value)) for value in values]
    return float(numpy(loss)), [None if g is None else np.array(numpy(g)) for g in grads]


def assert_close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(numpy(a), numpy(b), rtol=tolerance, atol=tolerance)


def as_zero(gradient, shape):
    """A missing gradient counts as zero: JAX gives zeros where the others give None."""
    return np.zeros(shape, "float32") if gradient is None else gradient


def paths(model):
    return [variable.path for variable in model.weights]


def slot_count(optimizer):
    """How many variables the optimizer keeps for weights (momenta, averages), without its counters."""
    return sum(1 for variable in optimizer.variables if tuple(variable.shape) != ())
