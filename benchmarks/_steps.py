"""A forward pass and a training step as each backend runs them: JAX and TensorFlow compiled, PyTorch eager."""

import keras
import numpy as np


def forward(model, x):
    """A function of no arguments that runs the model once and waits for the result; `x` may be a list of arrays."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        state = [v.value for v in model.trainable_variables], [v.value for v in model.non_trainable_variables]
        compiled = jax.jit(lambda t, n, x: model.stateless_call(t, n, x, training=False)[0])
        data = keras.tree.map_structure(jax.numpy.asarray, x)
        return lambda: jax.block_until_ready(compiled(*state, data))
    if backend == "tensorflow":
        import tensorflow as tf

        compiled = tf.function(lambda x: model(x, training=False), jit_compile=True)
        data = keras.tree.map_structure(tf.constant, x)
        return lambda: compiled(data)
    import torch

    data = keras.tree.map_structure(keras.ops.convert_to_tensor, x)

    def run():
        with torch.no_grad():
            y = model(data, training=False)
        _wait(torch)
        return y

    return run


def train(model, x, of_input=True):
    """A function of no arguments that computes a loss and its gradients, to the weights and the input, and waits.

    With `of_input=False` the input, which may be a list of arrays, gets no gradient.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        step, arguments = _jax_step(model, x, of_input)
        return lambda: jax.block_until_ready(step(*arguments))
    if backend == "tensorflow":
        import tensorflow as tf

        data = keras.tree.map_structure(tf.constant, x)
        variables = [v.value for v in model.trainable_variables]
        differentiated = of_input and data.dtype == tf.float32

        @tf.function(jit_compile=True)
        def step(x):
            with tf.GradientTape() as tape:
                if differentiated:
                    tape.watch(x)
                loss = tf.reduce_mean(tf.square(model(x, training=True)))
            sources = [*variables, x] if differentiated else variables
            found = tape.gradient(loss, sources)
            return loss, [tf.convert_to_tensor(g) for g in found]

        return lambda: step(data)
    import torch

    data = keras.tree.map_structure(keras.ops.convert_to_tensor, x)
    variables = [v.value for v in model.trainable_variables]
    differentiated = of_input and data.is_floating_point()

    def run():
        given = data.detach().requires_grad_() if differentiated else data
        loss = model(given, training=True).square().mean()
        found = torch.autograd.grad(
            loss, [*variables, given] if differentiated else variables, allow_unused=not of_input
        )
        _wait(torch)
        return loss, found

    return run


def _jax_step(model, x, of_input=True):
    """The compiled step, and what to call it with."""
    import jax

    def loss(trainable, state, x):
        y, _ = model.stateless_call(trainable, state, x, training=True)
        return keras.ops.mean(keras.ops.square(y))

    state = [v.value for v in model.trainable_variables], [v.value for v in model.non_trainable_variables]
    data = keras.tree.map_structure(jax.numpy.asarray, x)
    floats = (0, 2) if of_input and data.dtype == "float32" else (0,)
    return jax.jit(jax.value_and_grad(loss, argnums=floats)), (*state, data)


def _wait(torch):
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def xla_memory(model, x):
    """Bytes that XLA says the training step needs beside its arguments: JAX only."""
    step, arguments = _jax_step(model, x)
    compiled = step.lower(*arguments).compile()
    found = compiled.memory_analysis()
    return found.temp_size_in_bytes + found.output_size_in_bytes


def model_of(layer, shape, dtype="float32"):
    """A model of one layer, with a batch of any size."""
    inputs = keras.Input(batch_shape=(None, *shape[1:]), dtype=dtype)
    return keras.Model(inputs, layer(inputs))


def data(shape, vocabulary=None, seed=0):
    """An input: normal numbers, or numbers of words."""
    rng = np.random.default_rng(seed)
    if vocabulary is not None:
        return rng.integers(0, vocabulary, shape).astype("int32")
    return rng.normal(size=shape).astype("float32")
