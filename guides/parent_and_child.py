"""A parent layer and its children: four ways to compute with a parent's weights and one's own.

Run it with `python guides/parent_and_child.py`. Every part makes a model, trains it, saves it, loads it
and trains on; what is printed is computed as it runs.

The data is a regression that a known layer made, so that each part has something to learn.
"""

import pathlib
import tempfile

import keras
import numpy as np

import tether

ops = keras.ops


def data(rows=256, inputs=8, units=4, seed=0):
    """Inputs, and targets that a fixed layer with a little noise made of them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, inputs)).astype("float32")
    y = np.tanh(x @ rng.normal(size=(inputs, units)) / np.sqrt(inputs)) + 0.01 * rng.normal(size=(rows, units))
    return x, y.astype("float32")


def trained(model, x, y, epochs=5):
    """Trains a model, and on after a file; the losses, and the model of the file."""
    if not model.compiled:
        model.compile(keras.optimizers.Adam(0.01), "mse")
    first = model.fit(x, y, epochs=epochs, batch_size=32, verbose=0).history["loss"]
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "model.keras"
        model.save(file)
        again = keras.saving.load_model(file)
    np.testing.assert_allclose(again.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-5)
    second = again.fit(x, y, epochs=epochs, batch_size=32, verbose=0).history["loss"]
    return first + second, again


# --------------------------------------------------------------------------- 1. the parent's matrix, then one's own

# People write a layer that calls its parent and multiplies the result with a matrix of its own, keeps the parent
# as an attribute, and finds its weights counted twice and the file unreadable. Here the child's kernel *is* the
# product: `W @ S`, and its bias is `b @ S`. Both matrices are trained, each has one slot in the optimizer.


def parent_then_own(x, y):
    """`parent(x) @ own`, both trained."""
    parent = keras.layers.Dense(6, name="parent")
    parent.build((None, x.shape[1]))
    child = tether.inherit(parent, tether.forms.compose(y.shape[1]))
    inputs = keras.Input((x.shape[1],))
    model = keras.Model(inputs, child(inputs))
    before = keras.ops.convert_to_numpy(parent.kernel.value).copy()
    losses, again = trained(model, x, y)
    moved = float(np.max(np.abs(keras.ops.convert_to_numpy(parent.kernel.value) - before)))
    return {
        "kernel": child.kernel.expression.notation(),
        "weights": len(again.weights),
        "losses": losses,
        "moved": moved,
    }


# --------------------------------------------------------------------------- 2. the parent's weight times a factor

# One stored kernel, two layers: the child computes with three times the parent's. A step of the optimizer moves the
# kernel once, by the sum of both gradients, and the relation holds exactly, also in the file.


def parent_times_a_factor(x, y, factor=3.0):
    """The child's kernel is a multiple of the parent's, and stays it."""
    parent = keras.layers.Dense(y.shape[1], name="parent")
    parent.build((None, x.shape[1]))
    child = tether.inherit(parent, kernel=lambda w: factor * w)
    inputs = keras.Input((x.shape[1],))
    model = keras.Model(inputs, keras.layers.Add()([parent(inputs), child(inputs)]))
    losses, again = trained(model, x, y)
    one, other = (layer for layer in again.layers if isinstance(layer, keras.layers.Dense))
    ratio = keras.ops.convert_to_numpy(other.kernel.value) / keras.ops.convert_to_numpy(one.kernel.value)
    return {
        "kernel": child.kernel.expression.notation(), "weights": len(again.weights), "losses": losses,
        "ratio": (float(ratio.min()), float(ratio.max())),
    }  # fmt: skip


# --------------------------------------------------------------------------- 3. the parent's weight or one's own

# Which of two kernels computes is an argument of the call: a bool, a number, a name or a scalar tensor. `fit` and
# `predict` take the default. The side that is not chosen gets a gradient of zero, on every backend.


def parent_or_own(x, y):
    """`use_parent` picks the kernel at each call."""
    parent = keras.layers.Dense(y.shape[1], name="parent")
    parent.build((None, x.shape[1]))
    parent.trainable = False
    weight = tether.weight_of(parent, "kernel")
    own = tether.Weight(weight.numpy() * 0, name="own")
    child = tether.route(
        keras.layers.Dense(y.shape[1], name="child"),
        kernel={"own": own, "parent": weight.stop_gradient()},
        argument="use_parent",
    )
    inputs = keras.Input((x.shape[1],))
    model = keras.Model(inputs, child(inputs))
    before = weight.numpy()
    losses, again = trained(model, x, y)
    np.testing.assert_array_equal(weight.numpy(), before)
    layer = again.get_layer("child")
    bias = keras.ops.convert_to_numpy(layer.bias)
    with_parent = keras.ops.convert_to_numpy(layer(x, use_parent=True)) - bias
    np.testing.assert_allclose(with_parent, x @ before, atol=1e-4)
    difference = float(np.max(np.abs(keras.ops.convert_to_numpy(layer(x)) - bias - with_parent)))
    return {
        "kernel": child.kernel.expression.notation(), "weights": len(again.weights), "losses": losses,
        "difference": difference,
    }  # fmt: skip


# --------------------------------------------------------------------------- 4. the parent's outputs and one's own

# The child has the parent's units and some of its own beside them, in one kernel: one multiplication, one layer.


def outputs_side_by_side(x, y, own=2):
    """The parent's outputs, and new ones beside them."""
    parent = keras.layers.Dense(y.shape[1] - own, name="parent")
    parent.build((None, x.shape[1]))
    parent.trainable = False
    child = tether.inherit(parent, tether.forms.concatenate(own))
    inputs = keras.Input((x.shape[1],))
    model = keras.Model(inputs, child(inputs))
    losses, again = trained(model, x, y)
    same = np.array_equal(
        np.round(again.predict(x, verbose=0)[:, : parent.units], 4),
        np.round(keras.ops.convert_to_numpy(parent(x)), 4),
    )
    return {
        "kernel": child.kernel.expression.notation(), "weights": len(again.weights), "losses": losses,
        "units": child.units, "parent_unchanged": bool(same),
    }  # fmt: skip


PARTS = {
    "1. the parent's matrix, then one's own": parent_then_own,
    "2. the parent's weight times a factor": parent_times_a_factor,
    "3. the parent's weight or one's own": parent_or_own,
    "4. the parent's outputs and one's own": outputs_side_by_side,
}


def main():
    """Runs the four parts and prints what each found."""
    keras.utils.set_random_seed(0)
    x, y = data()
    for title, part in PARTS.items():
        found = part(x, y)
        losses = found.pop("losses")
        print(title)
        print(f"   loss {losses[0]:.4f} at first, {losses[4]:.4f} when saved, {losses[-1]:.4f} after training on")
        for name, value in found.items():
            print(f"   {name}: {value}")


if __name__ == "__main__":
    main()
