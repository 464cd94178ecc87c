"""Two workers of TensorFlow's `MultiWorkerMirroredStrategy`; `test_tensorflow_mirrored.py` runs it."""

import keras
import numpy as np
import tensorflow as tf

STRATEGY = tf.distribute.MultiWorkerMirroredStrategy()  # before anything else is done with TensorFlow

import tether  # noqa: E402
from tests.distribution.programs import check  # noqa: E402

RNG = np.random.default_rng(0)
X, Y = (RNG.integers(0, 12, (8, 4)).astype("int32") for _ in range(2))


def start(folder, number):
    return number


def language_model():
    inputs = keras.Input((4,), dtype="int32")
    table = tether.Weight(name="table", initializer=keras.initializers.RandomNormal(seed=1))
    h = tether.tie(keras.layers.Embedding(12, 6, name="embed"), embeddings=table)(inputs)
    up = keras.layers.Dense(6, name="up", kernel_initializer=keras.initializers.GlorotUniform(2))
    up.build((None, 4, 6))
    h = tether.inherit(up, kernel=tether.low_rank(2, seed=3), name="child")(h)
    return keras.Model(inputs, tether.tie(keras.layers.Dense(12, use_bias=False, name="head"), kernel=table.T)(h))


def gradients(model, x, y):
    """The gradients of the mean loss of all eight examples."""
    with tf.GradientTape() as tape:
        each = keras.losses.sparse_categorical_crossentropy(y, model(x, training=True), from_logits=True)
        loss = tf.reduce_sum(each) / (len(X) * 4)
    return tape.gradient(loss, [variable.value for variable in model.trainable_variables])


@check
def a_loop_of_ones_own_learns_as_in_one_process(number):
    alone = language_model()
    for _ in range(3):
        for variable, gradient in zip(alone.trainable_variables, gradients(alone, X, Y), strict=True):
            variable.assign_sub(0.5 * tf.convert_to_tensor(gradient))
    with STRATEGY.scope():
        model = language_model()

    def step(x, y):
        found = [tf.convert_to_tensor(each) for each in gradients(model, x, y)]
        found = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, found)
        for variable, gradient in zip(model.trainable_variables, found, strict=True):
            variable.value.assign_sub(0.5 * gradient)

    run, own = tf.function(lambda x, y: STRATEGY.run(step, (x, y))), slice(4 * number, 4 * number + 4)
    for _ in range(3):
        run(tf.constant(X[own]), tf.constant(Y[own]))
    assert len(model.trainable_variables) == 5
    for ours, right in zip(model.trainable_variables, alone.trainable_variables, strict=True):
        np.testing.assert_allclose(ours.numpy(), right.numpy(), atol=1e-5, err_msg=ours.path)
