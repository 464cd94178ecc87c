"""Tasks drawn from a known structure: a student that has it learns from few rows what independent ones cannot."""

import keras
import numpy as np
import pytest

import tether

pytestmark = pytest.mark.spread

TASKS, INPUTS, OUTPUTS, ROWS = 12, 16, 8, 10


def parent_and_differences(rng):
    """Each task's matrix is one parent plus a difference of rank 1, with entries a third as large."""
    parent = rng.normal(size=(INPUTS, OUTPUTS)) / np.sqrt(INPUTS)
    left, right = rng.normal(size=(TASKS, INPUTS, 1)), rng.normal(size=(TASKS, 1, OUTPUTS))
    return parent + 0.3 * left @ right / np.sqrt(INPUTS)


def shared_bases(rng):
    """Each task's matrix is a mix of the same two."""
    bases = rng.normal(size=(2, INPUTS, OUTPUTS)) / np.sqrt(INPUTS)
    return np.einsum("tk,kio->tio", rng.normal(size=(TASKS, 2)), bases)


def parent_plus_rank_one():
    """One parent, and for each task a column times a row."""
    parent = tether.Weight((INPUTS, OUTPUTS), "glorot_uniform", name="parent")
    left = tether.Weight((TASKS, INPUTS, 1), keras.initializers.RandomNormal(stddev=0.1), name="left")
    right = tether.Weight((TASKS, 1, OUTPUTS), keras.initializers.RandomNormal(stddev=0.1), name="right")
    return parent + left @ right


def mix_of_two():
    """Two bases, and for each task how much of each."""
    bases = tether.Weight((2, INPUTS, OUTPUTS), "glorot_uniform", name="bases")
    mix = tether.Weight((TASKS, 2), keras.initializers.RandomNormal(stddev=0.5), name="mix")
    return tether.ops.einsum("tk,kio->tio", mix, bases)


def independent():
    """A matrix for each task."""
    return tether.Weight((TASKS, INPUTS, OUTPUTS), keras.initializers.RandomNormal(stddev=0.01), name="own")


def test_error(structure, student, seed, steps=300):
    """The mean squared error on new rows of a student that was trained on ten rows a task."""
    rng = np.random.default_rng(seed)
    keras.utils.set_random_seed(seed)
    truth = structure(rng)
    x, new = (rng.normal(size=(rows, TASKS, INPUTS)).astype("float32") for rows in (ROWS, 500))
    y, wanted = (np.einsum("rti,tio->rto", rows, truth) for rows in (x, new))
    y = y + 0.05 * rng.normal(size=y.shape)
    layer = keras.layers.EinsumDense("rti,tio->rto", output_shape=(TASKS, OUTPUTS))
    model = keras.Sequential([keras.Input((TASKS, INPUTS)), tether.tie(layer, kernel=student())])
    rate = keras.optimizers.schedules.CosineDecay(0.05, steps)
    model.compile(keras.optimizers.Adam(rate), "mse", jit_compile=keras.backend.backend() == "jax")
    # All epochs as batches of one: what is measured is the learning, not Keras's epochs.
    model.fit(np.tile(x, (steps, 1, 1)), np.tile(y, (steps, 1, 1)), batch_size=ROWS, shuffle=False, verbose=0)
    return float(np.mean((model.predict(new, verbose=0) - wanted) ** 2))


test_error.__test__ = False


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("structure", "student"),
    [(parent_and_differences, parent_plus_rank_one), (shared_bases, mix_of_two)],
    ids=["parent plus rank 1", "two shared bases"],
)
def test_the_right_structure_has_at_most_a_quarter_of_the_error(structure, student, seed):
    tied, own = test_error(structure, student, seed), test_error(structure, independent, seed)
    print(f"{structure.__name__} {seed}: {tied:.4f} tied, {own:.4f} independent")
    assert tied <= own / 4, f"{tied:.4f} tied, {own:.4f} independent"


# --------------------------------------------------------------------------- a choice for each example


def drawn_tasks(seed):
    """A parent, and rows of twelve tasks that are it plus a difference of rank 1: to learn from, and to test with."""
    rng = np.random.default_rng(seed)
    parent = rng.normal(size=(INPUTS, OUTPUTS)).astype("float32") / np.sqrt(INPUTS)
    left, right = rng.normal(size=(TASKS, INPUTS, 1)), rng.normal(size=(TASKS, 1, OUTPUTS))
    truth = (parent + 0.3 * left @ right / np.sqrt(INPUTS)).astype("float32")
    x, new = (rng.normal(size=(TASKS, rows, INPUTS)).astype("float32") for rows in (2 * ROWS, 500))
    y = np.einsum("tri,tio->tro", x, truth) + 0.05 * rng.normal(size=(TASKS, 2 * ROWS, OUTPUTS))
    return parent, x, y.astype("float32"), new, np.einsum("tri,tio->tro", new, truth)


def learned(parent, x, y, new, steps=200):
    """What children of one parent, in one batch, say of new rows after they have learned from theirs."""
    count = len(x)
    base = tether.Weight(parent, trainable=False, name="parent")
    children = [base + tether.low_rank(1, seed=7) for _ in range(count)]
    layer = tether.route(keras.layers.Dense(OUTPUTS, use_bias=False), kernel=children)
    inputs, choice = keras.Input((INPUTS,)), keras.Input((), dtype="int32")
    model = keras.Model([inputs, choice], layer(inputs, choice=choice))
    rate = keras.optimizers.schedules.CosineDecay(0.05, steps)
    model.compile(keras.optimizers.Adam(rate, epsilon=1e-12), "mse", jit_compile=keras.backend.backend() == "jax")
    ids = np.repeat(np.arange(count, dtype="int32"), x.shape[1])
    rows = [np.tile(each, (steps, *(1,) * (each.ndim - 1))) for each in (x.reshape(-1, INPUTS), ids)]
    wanted = np.tile(y.reshape(-1, OUTPUTS), (steps, 1))
    model.fit(rows, wanted, batch_size=len(ids), shuffle=False, verbose=0)
    told = [new.reshape(-1, INPUTS), np.repeat(np.arange(count, dtype="int32"), new.shape[1])]
    return model.predict(told, batch_size=6000, verbose=0).reshape(*new.shape[:2], OUTPUTS)


@pytest.mark.parametrize("seed", [0, 1])
def test_children_in_mixed_batches_recover_their_tasks_as_those_trained_alone_do(seed):
    parent, x, y, new, wanted = drawn_tasks(seed)
    together = np.mean((learned(parent, x, y, new) - wanted) ** 2, axis=(1, 2))
    some = [0, 11]
    alone = np.array([np.mean((learned(parent, *(a[t : t + 1] for a in (x, y, new))) - wanted[t]) ** 2) for t in some])
    untouched = np.mean((np.einsum("tri,io->tro", new, parent) - wanted) ** 2)
    print(f"{seed}: {together.mean():.4f} in mixed batches, {untouched:.4f} of the parent; {together[some]} {alone}")
    assert together.mean() < untouched / 20
    np.testing.assert_allclose(together[some], alone, rtol=0.02)
