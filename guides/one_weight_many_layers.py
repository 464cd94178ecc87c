"""One weight in many layers: an external matrix, the `Lambda` case, and why a copy is not sharing.

Run it with `python guides/one_weight_many_layers.py`; what is printed is computed as it runs.
"""

import pathlib
import tempfile

import keras
import numpy as np

import tether

ops = keras.ops


def data(rows=128, seed=0):
    """A task of two targets that come from the same hidden matrix."""
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(6, 3))
    x = rng.normal(size=(rows, 6)).astype("float32")
    first = x @ matrix
    return x, first.astype("float32"), np.tanh(first @ matrix.T).astype("float32")


def reloaded(model):
    """The model of a file that was written and read."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "model.keras"
        model.save(file)
        return keras.saving.load_model(file)


# --------------------------------------------------------------------------- an external matrix in two layers

# A matrix that belongs to no layer: `tether.Weight`. Two layers compute with it, one with its transpose. It is
# tracked, counted, saved and trained once, whoever uses it.


def external_matrix(epochs=40):
    """A matrix of known values in two layers."""
    x, first, second = data()
    matrix = tether.Weight(np.random.default_rng(1).normal(size=(6, 3)).astype("float32"), name="matrix")
    inputs = keras.Input((6,))
    down = tether.tie(keras.layers.Dense(3, use_bias=False, name="down"), kernel=matrix)(inputs)
    up = tether.tie(keras.layers.Dense(6, use_bias=False, activation="tanh", name="up"), kernel=matrix.T)(down)
    model = keras.Model(inputs, [down, up])
    model.compile(keras.optimizers.Adam(0.05), ["mse", "mse"])
    history = model.fit(x, [first, second], epochs=epochs, verbose=0).history["loss"]
    again = reloaded(model)
    kernel, transposed = again.get_layer("down").kernel, again.get_layer("up").kernel
    again.set_weights([w + 1.0 for w in again.get_weights()])
    return {
        "parameters": model.count_params(),
        "loss": (history[0], history[-1]),
        "tied_after_a_file": bool(
            np.array_equal(ops.convert_to_numpy(kernel.value).T, ops.convert_to_numpy(transposed.value))
        ),
    }


# --------------------------------------------------------------------------- the Lambda case

# `keras.layers.Lambda(lambda h: ops.matmul(h, ops.transpose(layer.kernel)))` captures a variable that Keras does not
# see: it is not tracked, in a file it is lost, and on some backends it is a constant. `tether.Lambda` names it.


@keras.saving.register_keras_serializable(package="tether_guide")
def decoded(hidden, kernel):
    """`tanh(hidden @ kernelᵀ)`."""
    return ops.tanh(ops.matmul(hidden, ops.transpose(kernel)))


def lambda_case(epochs=10):
    """A function that decodes with the encoder's kernel."""
    x, _, second = data()
    inputs = keras.Input((6,))
    encode = keras.layers.Dense(3, use_bias=False, name="encode")
    hidden = encode(inputs)
    kernel = tether.weight_of(encode, "kernel")
    model = keras.Model(inputs, tether.Lambda(decoded, kernel=kernel)(hidden))
    model.compile(keras.optimizers.Adam(0.05), "mse")
    history = model.fit(x, second, epochs=epochs, verbose=0).history["loss"]
    again = reloaded(model)
    more = again.fit(x, second, epochs=epochs, verbose=0).history["loss"]
    return {"weights": len(again.weights), "losses": history + more}


# --------------------------------------------------------------------------- the copy case, and why it is not sharing

# `decoder.set_weights(encoder.get_weights())` makes two matrices of equal values. The first step of the optimizer
# moves them apart, since each has a gradient of its own. A copy is a good start; it is not a tie.


def copy_case(epochs=10):
    """How far two matrices are apart after training: copied, and shared."""
    found = {}
    x, first, second = data()
    for how in ("copied", "shared"):
        inputs = keras.Input((6,))
        down, up = keras.layers.Dense(3, use_bias=False), keras.layers.Dense(6, use_bias=False, activation="tanh")
        model = keras.Model(inputs, [down(inputs), up(down.output)])
        if how == "copied":
            tether.transfer.copy(down, up, fill=lambda value, start: value.T)
        else:
            tether.tie(up, kernel=tether.weight_of(down, "kernel").T)
        start = _distance(down, up)
        model.compile(keras.optimizers.Adam(0.05), ["mse", "mse"])
        model.fit(x, [first, second], epochs=epochs, verbose=0)
        found[how] = {"at first": start, "trained": _distance(down, up), "parameters": model.count_params()}
    return found


def _distance(down, up):
    one, other = (ops.convert_to_numpy(layer.kernel.value) for layer in (down, up))
    return float(np.max(np.abs(one - other.T)))


def main():
    """Runs the three cases and prints what each found."""
    keras.utils.set_random_seed(0)
    print("an external matrix in two layers:", external_matrix())
    found = lambda_case()
    print(f"the Lambda case: {found['weights']} weight, loss {found['losses'][0]:.3f} -> {found['losses'][-1]:.3f}")
    for how, distances in copy_case().items():
        print(f"{how}: {distances}")


if __name__ == "__main__":
    main()
