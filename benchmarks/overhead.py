"""What a tie costs: a tied model beside the same model written by hand, building, importing, a recurrent layer.

Run with `python -m benchmarks.overhead` and KERAS_BACKEND set. Bounds (asked for): a compiled step at
most 1.03 times the model by hand, PyTorch eager 1.10; building at most 1.2 times the plain model; a
recurrent layer with a composite kernel at most 1.10 times the kernel computed by hand outside the loop.
"""

import statistics
import subprocess
import sys

import keras
import numpy as np

import tether
from benchmarks._measure import compare, write

ops = keras.ops


class Transposed(keras.layers.Layer):
    """y = x Wᵀ + c with the matrix of another layer: the recipe that people write by hand today."""

    def __init__(self, owner, attribute, size):
        super().__init__()
        self.owner, self.attribute, self.size = owner, attribute, size

    def build(self, shape):
        self.bias = self.add_weight(name="bias", shape=(self.size,), initializer="zeros")

    def call(self, x):
        return ops.add(ops.matmul(x, ops.transpose(getattr(self.owner, self.attribute))), self.bias)


def dense_model(tied, size=784, width=256):
    inputs = keras.Input((size,))
    if not tied:
        encode = keras.layers.Dense(width, activation="relu")
        return keras.Model(inputs, Transposed(encode, "kernel", size)(encode(inputs)))
    codec = tether.Weight(name="codec")
    hidden = tether.tie(keras.layers.Dense(width, activation="relu"), kernel=codec)(inputs)
    return keras.Model(inputs, tether.tie(keras.layers.Dense(size), kernel=codec.T)(hidden))


def dense(tied):
    return dense_model(tied), np.random.rand(256, 784), None


class Mean(keras.layers.Layer):
    def call(self, x):
        return ops.mean(x, axis=1)


def embedding(tied, vocabulary=4000, width=128):
    inputs = keras.Input((32,), dtype="int32")
    x = np.random.randint(0, vocabulary, (64, 32))
    if not tied:
        lookup = keras.layers.Embedding(vocabulary, width)
        head = Transposed(lookup, "embeddings", vocabulary)
        return keras.Model(inputs, head(Mean()(lookup(inputs)))), x, vocabulary
    table = tether.Weight(name="table")
    hidden = Mean()(tether.tie(keras.layers.Embedding(vocabulary, width), embeddings=table)(inputs))
    return keras.Model(inputs, tether.tie(keras.layers.Dense(vocabulary), kernel=table.T)(hidden)), x, vocabulary


def conv(tied, filters=32, depth=4):
    """The same convolution at every depth, each with a norm of its own."""
    inputs = keras.Input((32, 32, filters))
    kernel = tether.Weight(name="kernel")
    shared = keras.layers.Conv2D(filters, 3, padding="same", use_bias=False)
    x = inputs
    for _ in range(depth):
        layer = shared
        if tied:
            layer = tether.tie(keras.layers.Conv2D(filters, 3, padding="same", use_bias=False), kernel=kernel)
        x = keras.layers.ReLU()(layer(x))
    return keras.Model(inputs, x), np.random.rand(16, 32, 32, filters), None


def attention(tied, width=128, heads=4, depth=2):
    """The same attention at every depth."""
    inputs = keras.Input((64, width))
    names = [
        f"{part}/{weight}" for part in ("query", "key", "value", "attention_output") for weight in ("kernel", "bias")
    ]
    weights = {name: tether.Weight(name=name.replace("/", ".")) for name in names}
    shared = keras.layers.MultiHeadAttention(heads, width // heads)
    x = inputs
    for _ in range(depth):
        layer = shared
        if tied:
            layer = tether.tie(keras.layers.MultiHeadAttention(heads, width // heads), weights)
        x = keras.layers.Add()([x, layer(x, x)])
    return keras.Model(inputs, x), np.random.rand(16, 64, width), None


def sides(make):
    """Both models with the same values, and their steps."""
    models = []
    for tied in (True, False):
        model, x, classes = make(tied)
        models.append(model)
    x = x.astype("int32" if classes else "float32")
    y = (
        np.random.randint(0, classes, (len(x),))
        if classes
        else np.zeros(models[0].output_shape[1:], "float32")[None].repeat(len(x), 0)
    )
    names = tether.inspection.aliases(models[0])
    for target in models[1].weights:
        end = "/".join(target.path.split("/")[-2:] if make is attention else target.path.split("/")[-1:])
        same = [w for w in names.find(f"{end}$") if w.shape == target.shape]
        target.assign(same[0].numpy() if same else np.zeros(target.shape))
    difference = float(np.max(np.abs(models[0].predict_on_batch(x) - models[1].predict_on_batch(x))))
    assert difference < 1e-4, difference
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True) if classes else "mse"
    difference = float(np.max(np.abs(models[0].predict_on_batch(x) - models[1].predict_on_batch(x))))
    assert difference < 1e-4, difference
    for model in models:
        model.compile(keras.optimizers.SGD(1e-4), loss)
    xs, ys = ops.convert_to_tensor(x), ops.convert_to_tensor(y)
    if keras.backend.backend() == "jax":
        xs, ys = x, y  # Keras places NumPy batches itself
    train = [lambda m=m: m.train_on_batch(xs, ys) for m in models]
    predict = [lambda m=m: m.predict_on_batch(xs) for m in models]
    return train, predict


def steps():
    rows = []
    for make in (dense, embedding, conv, attention):
        train, predict = sides(make)
        for what, pair in (("training step", train), ("inference", predict)):
            rows.append({"case": f"{make.__name__}: {what}", **compare(*pair)})
    return rows


def building():
    """Making and building a tied model beside a plain one with the same layers."""

    def plain():
        inputs = keras.Input((784,))
        hidden = keras.layers.Dense(256, activation="relu")(inputs)
        keras.Model(inputs, keras.layers.Dense(784)(hidden))

    return [
        {"case": "building: tied / plain untied", **compare(lambda: dense_model(True), plain)},
        {"case": "building: tied / by hand", **compare(lambda: dense_model(True), lambda: dense_model(False))},
    ]


class KernelOutside(keras.layers.LSTM):
    """The same Keras LSTM whose cell is handed a recurrent kernel that is computed once, outside the loop."""

    def build(self, sequences_shape, initial_state_shape=None):
        super().build(sequences_shape)
        units = self.units
        self.a = self.add_weight(name="a", shape=(units, 8))
        self.b = self.add_weight(name="b", shape=(8, 4 * units))

    def inner_loop(self, *args, **kwargs):
        stored = self.cell.recurrent_kernel
        object.__setattr__(self.cell, "recurrent_kernel", ops.add(stored, ops.matmul(self.a, self.b)))
        try:
            return super().inner_loop(*args, **kwargs)
        finally:
            object.__setattr__(self.cell, "recurrent_kernel", stored)


def recurrent(units=128, rank=8):
    def tied():
        inputs = keras.Input((64, 64))
        a = tether.Weight((units, rank), "glorot_uniform", name="a")
        b = tether.Weight((rank, 4 * units), "glorot_uniform", name="b")
        w = tether.Weight((units, 4 * units), "glorot_uniform", name="w")
        layer = tether.tie(keras.layers.LSTM(units), {"cell/recurrent_kernel": w + a @ b})
        return keras.Model(inputs, layer(inputs))

    def by_hand():
        inputs = keras.Input((64, 64))
        return keras.Model(inputs, KernelOutside(units)(inputs))

    models = [tied(), by_hand()]
    x = np.random.rand(32, 64, 64).astype("float32")
    y = np.zeros((32, units), "float32")
    for model in models:
        model.compile(keras.optimizers.SGD(1e-4), "mse")
    pair = [lambda m=m: m.train_on_batch(x, y) for m in models]
    return [{"case": "LSTM with W + A @ B, 64 steps: training step", **compare(*pair)}]


def importing(rounds=7):
    """What `import tether` adds to `import keras`, in fresh processes."""
    script = "import time, keras; t = time.perf_counter(); import tether; print(time.perf_counter() - t)"
    found = []
    for _ in range(rounds):
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        found.append(1e3 * float(run.stdout.split()[-1]))
    return [{"case": "import tether, after import keras (ms)", "ours_ms": statistics.median(found), "rounds": rounds}]


PARTS = {"steps": steps, "building": building, "recurrent": recurrent, "importing": importing}

if __name__ == "__main__":
    # `python benchmarks/overhead.py building` measures one part again.
    write("overhead", [row for name in sys.argv[1:] or PARTS for row in PARTS[name]()])
