"""Rows B13 to B16 of the scenarios: files of parts, of untied and of tied models."""

import json

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file

import tether
from tests.kinds import for_each
from tests.scenarios.test_b_one_weight_two_layers import KINDS
from tests.support import assert_close, numpy
from tether.errors import ValueConflict

layers = keras.layers

every_kind = for_each(among=KINDS)


def tied_pair(kind):
    """Two layers of a kind on one weight, in one model."""
    model, first, second = kind.pair()
    tether.tie(second, {kind.path: tether.weight_of(first, kind.path)})
    return model, first, second


def randomize(model, rng):
    for variable in model.weights:
        variable.assign(rng.normal(size=variable.shape).astype("float32"))


def outputs(model, kind, rng_seed=3):
    return [numpy(y) for y in model(kind.inputs(np.random.default_rng(rng_seed)))]


# --------------------------------------------------------------------------- B13


@every_kind
def test_b13_parts_that_were_saved_apart_are_tied_again(kind, rng, tmp_path):
    _, first, second = tied_pair(kind)
    parts = []
    for name, layer in (("first", first), ("second", second)):
        x = kind.symbol()
        y = layer(x, x) if isinstance(layer, layers.MultiHeadAttention) else layer(x)
        tether.files.save_model(keras.Model(x, y, name=name), tmp_path / f"{name}.keras")
        parts.append(keras.saving.load_model(tmp_path / f"{name}.keras"))
    one, two = (kind.read(part.layers[-1]) for part in parts)
    assert np.array_equal(numpy(one.value), numpy(two.value))
    assert one.expression.weights_used() != two.expression.weights_used()
    report = tether.files.retie(*parts)
    assert len(report.loaded) == 1 and not report.conflicting
    one, two = (kind.read(part.layers[-1]) for part in parts)
    (weight,) = one.expression.weights_used()
    assert two.expression.weights_used() == (weight,) and len(weight.uses) == 2
    weight.assign(rng.normal(size=weight.shape).astype("float32"))
    assert np.array_equal(numpy(one.value), numpy(two.value))


@every_kind
def test_b13_parts_that_went_apart_are_not_joined_unasked(kind, rng, tmp_path):
    _, first, second = tied_pair(kind)
    tether.files.save_model(first, tmp_path / "first.keras")
    tether.files.save_model(second, tmp_path / "second.keras")
    parts = [keras.saving.load_model(tmp_path / f"{name}.keras") for name in ("first", "second")]
    (weight,) = kind.read(parts[1]).expression.weights_used()
    weight.assign(weight.numpy() + 1.0)
    with pytest.raises(ValueConflict, match="differ by up to 1"):
        tether.files.retie(*parts)
    assert kind.read(parts[1]).expression is weight
    report = tether.files.retie(*parts, resolve="mean")
    assert report.conflicting[0].difference == pytest.approx(1.0, rel=1e-5)
    assert len({kind.read(part).expression.uid for part in parts}) == 1


# --------------------------------------------------------------------------- B14


def write(model, kind_of_file, tmp_path):
    path = tmp_path / {"keras": "m.keras", "weights": "m.weights.h5", "safetensors": "m.safetensors"}[kind_of_file]
    if kind_of_file == "safetensors":
        tether.files.save_safetensors(model, path)
    elif kind_of_file == "keras":
        tether.files.save_model(model, path)
    else:
        model.save_weights(path)
    return path


def read(model, path, **options):
    load = tether.files.load_safetensors if path.suffix == ".safetensors" else tether.files.load_untied
    return load(model, path, **options)


every_file = pytest.mark.parametrize("file", ["keras", "weights", "safetensors"])


def named_apart(kind):
    """A pair whose layers have the same names in every model, as files by name need them."""
    model, first, second = kind.pair()
    for name, layer in (("first", first), ("second", second)):
        layer.name = name
    return model, first, second


@every_file
@every_kind
def test_b14_two_different_copies_are_a_named_error(kind, file, rng, tmp_path):
    source, first, second = named_apart(kind)
    randomize(source, rng)
    a, b = numpy(kind.read(first)), numpy(kind.read(second))
    path = write(source, file, tmp_path)
    target, one, two = named_apart(kind)
    tether.tie(two, {kind.path: tether.weight_of(one, kind.path)})
    randomize(target, rng)
    before = [value.tobytes() for value in target.get_weights()]
    with pytest.raises(ValueConflict, match=f"differ by up to {np.abs(a - b).max():.3g}"):
        read(target, path)
    assert [value.tobytes() for value in target.get_weights()] == before
    for resolve, expected in {"first": a, "mean": (a + b) / 2, "min": np.minimum(a, b)}.items():
        rule = (lambda name, arrays: np.minimum(*arrays)) if resolve == "min" else resolve
        report = read(target, path, resolve=rule)
        assert_close(kind.read(one), expected, 1e-6)
        assert np.array_equal(numpy(kind.read(two)), numpy(kind.read(one)))
        assert [c.difference for c in report.conflicting] == [pytest.approx(np.abs(a - b).max(), rel=1e-6)]


@every_file
@every_kind
def test_b14_copies_that_agree_are_loaded(kind, file, rng, tmp_path):
    source, first, second = named_apart(kind)
    randomize(source, rng)
    kind.read(second).assign(numpy(kind.read(first)))
    target, one, two = named_apart(kind)
    tether.tie(two, {kind.path: tether.weight_of(one, kind.path)})
    report = read(target, write(source, file, tmp_path))
    assert not report.conflicting and not report.missing
    for mine, theirs in zip(outputs(target, kind), outputs(source, kind), strict=True):
        assert np.array_equal(mine, theirs)


# --------------------------------------------------------------------------- B15


@every_file
@every_kind
def test_b15_a_tied_checkpoint_fills_both_layers_of_an_untied_model(kind, file, rng, tmp_path):
    source, first, second = named_apart(kind)
    tether.tie(second, {kind.path: 0.5 * tether.weight_of(first, kind.path)})
    randomize(source, rng)
    target, _, _ = named_apart(kind)
    report = read(target, write(source, file, tmp_path))
    assert len(report.loaded) == len(target.weights) and not report.skipped and not report.missing
    for mine, theirs in zip(outputs(target, kind), outputs(source, kind), strict=True):
        assert_close(mine, theirs, 1e-6)
    assert not any(variable is other for variable in target.weights for other in source.weights)


@every_file
@every_kind
def test_b15_and_one_that_is_tied_otherwise(kind, file, rng, tmp_path):
    """Of the file one layer is half the other; in the model the other is twice the first."""
    source, first, second = named_apart(kind)
    tether.tie(second, {kind.path: 0.5 * tether.weight_of(first, kind.path)})
    randomize(source, rng)
    target, one, two = named_apart(kind)
    tether.tie(one, {kind.path: 2.0 * tether.weight_of(two, kind.path)})
    assert not read(target, write(source, file, tmp_path)).conflicting
    for mine, theirs in zip(outputs(target, kind), outputs(source, kind), strict=True):
        assert_close(mine, theirs, 1e-6)


# --------------------------------------------------------------------------- B16


@every_kind
def test_b16_safetensors_hold_a_shared_weight_once(kind, rng, tmp_path):
    model, first, second = named_apart(kind)
    tether.tie(second, {kind.path: tether.weight_of(first, kind.path)})
    path = write(model, "safetensors", tmp_path)
    found = load_file(path)
    assert sum(array.size for array in found.values()) == model.count_params()
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 8 + header + 4 * model.count_params()
    plan = json.loads(json.loads(path.read_bytes()[8 : 8 + header])["__metadata__"]["tether"])
    (tied,) = plan["ties"]
    assert tied.startswith("second.")


def test_b16_a_sharded_checkpoint_holds_a_shared_weight_once(rng, tmp_path):
    import h5py

    codec = tether.Weight(name="codec")
    x = keras.Input((20,))
    h = tether.tie(layers.Dense(30), kernel=codec)(x)
    model = keras.Model(x, tether.tie(layers.Dense(20), kernel=codec.T)(h))
    model.save_weights(tmp_path / "m.weights.json", max_shard_size=2500 / 2**30)
    sizes = []
    for shard in tmp_path.glob("*.h5"):
        with h5py.File(shard) as file:
            file.visititems(lambda _, item: sizes.append(item.size) if isinstance(item, h5py.Dataset) else None)
    assert sorted(sizes) == [20, 30, 600]
