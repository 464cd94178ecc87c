"""Tasks drawn from a known structure: a student that has it learns from few rows what independent ones cannot."""

import keras
import numpy as np
import pytest

import tether

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
