"""Checkpoints whose sharing is another than the model's."""

import json

import keras
import numpy as np
import pytest

import tether
from tests.files import hostile
from tests.files.models import autoencoder, randomize, stack, state
from tests.support import assert_close, numpy
from tether import keras_seam
from tether.errors import InvalidConfig, ShapeMismatch, TetherError, Unsupported, ValueConflict
from tether.layers.family.named import named_weights

pytestmark = pytest.mark.spread

layers = keras.layers


def as_keras(model, path):
    model.save(path / "m.keras")
    return path / "m.keras"


def as_weights(model, path):
    model.save_weights(path / "m.weights.h5")
    return path / "m.weights.h5"


def as_shards(model, path):
    model.save_weights(path / "m.weights.json", max_shard_size=1e-7)  # 107 bytes: a weight or two in each
    return path / "m.weights.json"


def as_npz(model, path):
    """What Keras's archives have as `model.weights.npz`."""
    found = {}
    for place, saved in keras_seam.saved_objects(model):
        if isinstance(saved, (layers.Layer, keras.random.SeedGenerator)):
            found[place or "__root__"] = {}
            saved.save_own_variables(found[place or "__root__"])
    np.savez(path / "m.npz", **{p: {k: numpy(v) for k, v in e.items()} for p, e in found.items()})
    return path / "m.npz"


def as_old(model, path):
    model.save(path / "m.h5")
    return path / "m.h5"


def as_old_weights(model, path):
    as_old(model, path).rename(path / "m.weights.h5")
    return path / "m.weights.h5"


UNTIED_FORMATS = [as_keras, as_weights, as_shards, as_npz, as_old, as_old_weights]
TIED_FORMATS = [as_keras, as_weights, as_shards]
every_format = pytest.mark.parametrize("write", UNTIED_FORMATS, ids=lambda f: f.__name__)
every_format_with_ties = pytest.mark.parametrize("write", TIED_FORMATS, ids=lambda f: f.__name__)
every_model = pytest.mark.parametrize("make", [autoencoder, stack], ids=lambda f: f.__name__)

SHARED = {autoencoder: ("encode/kernel", "decode/kernel"), stack: ("embed/embeddings", "head/kernel")}
INPUTS = {autoencoder: np.ones((2, 5), "float32"), stack: np.array([[1, 2, 6, 0]], "int32")}


def variable(model, path):
    """A weight's variable or view, by path."""
    return next(named.variable for named in named_weights(model) if named.name == path)


def agreeing(make, rng):
    """An untied model whose two shared weights say the same."""
    model = randomize(make(tied=False), rng)
    first, second = (variable(model, path) for path in SHARED[make])
    second.assign(np.swapaxes(numpy(first), 0, 1))
    return model


@every_format
@every_model
def test_an_untied_file_fills_a_tied_model(make, write, rng, tmp_path):
    source, target = agreeing(make, rng), randomize(make(tied=True), rng)
    report = tether.files.load_untied(target, write(source, tmp_path))
    assert_close(target(INPUTS[make]), source(INPUTS[make]))
    assert len(report.loaded) == len(target.weights) and not report.missing and not report.conflicting
    assert max(len(each.sources) for each in report.loaded) == 2


@every_format_with_ties
@every_model
def test_a_tied_file_fills_both_users_of_an_untied_model(make, write, rng, tmp_path):
    source, target = randomize(make(tied=True), rng), randomize(make(tied=False), rng)
    report = tether.files.load_untied(target, write(source, tmp_path))
    assert_close(target(INPUTS[make]), source(INPUTS[make]))
    assert len(report.loaded) == len(target.weights) and not report.skipped and not report.missing
    assert "by the tie" in str(report)


@pytest.mark.parametrize("tied", [True, False])
@every_format_with_ties
@every_model
def test_a_file_of_the_same_sharing_is_loaded(make, write, tied, rng, tmp_path):
    source, target = randomize(make(tied), rng), randomize(make(tied), rng)
    report = tether.files.load_untied(target, write(source, tmp_path))
    for mine, theirs in zip(target.get_weights(), source.get_weights(), strict=True):
        assert np.array_equal(mine, theirs)
    assert len(report.loaded) == len(target.weights) and not report.skipped


def disagreeing(rng, tmp_path, write=as_weights):
    source = randomize(autoencoder(tied=False), rng)
    return source, write(source, tmp_path)


@every_format
def test_values_that_differ_are_an_error_that_says_by_how_much(write, rng, tmp_path):
    source, path = disagreeing(rng, tmp_path, write)
    target = randomize(autoencoder(tied=True), rng)
    before = state(target)
    by = np.abs(numpy(source.layers[1].kernel) - numpy(source.layers[2].kernel).T).max()
    with pytest.raises(ValueConflict, match=f"codec: .* differ by up to {by:.3g}.*resolve='first'"):
        tether.files.load_untied(target, path)
    assert state(target) == before


def test_the_smallest_difference_is_one(rng, tmp_path):
    source = agreeing(autoencoder, rng)
    kernel = numpy(source.layers[2].kernel).copy()
    kernel[0, 0] = np.nextafter(kernel[0, 0], np.float32(9))
    source.layers[2].kernel.assign(kernel)
    path = as_weights(source, tmp_path)
    with pytest.raises(ValueConflict):
        tether.files.load_untied(autoencoder(tied=True), path)
    assert tether.files.load_untied(autoencoder(tied=True), path, resolve="first").conflicting[0].difference < 1e-6


def larger(name, arrays):
    assert name == "codec"
    return np.maximum(*arrays)


@pytest.mark.parametrize(
    ("resolve", "expected"),
    [("first", lambda a, b: a), ("mean", lambda a, b: (a + b) / 2), (larger, np.maximum)],
    ids=["first", "mean", "function"],
)
def test_values_that_differ_are_resolved(resolve, expected, rng, tmp_path):
    source, path = disagreeing(rng, tmp_path)
    target = autoencoder(tied=True)
    report = tether.files.load_untied(target, path, resolve=resolve)
    a, b = numpy(source.layers[1].kernel), numpy(source.layers[2].kernel).T
    assert_close(target.layers[1].kernel, expected(a, b))
    assert np.array_equal(numpy(target.layers[2].kernel), numpy(target.layers[1].kernel).T)
    (conflict,) = report.conflicting
    assert conflict.name == "codec" and conflict.difference == pytest.approx(np.abs(a - b).max())
    assert len(conflict.sources) == 2 and f"{conflict.difference:.3g}" in str(report)


def test_a_function_that_returns_something_else_changes_nothing(rng, tmp_path):
    _, path = disagreeing(rng, tmp_path)
    target = randomize(autoencoder(tied=True), rng)
    before = state(target)
    for wrong in (lambda name, arrays: arrays[0].T, lambda name, arrays: arrays[0].astype("int32")):
        with pytest.raises(ShapeMismatch, match="returns an array of shape"):
            tether.files.load_untied(target, path, resolve=wrong)
    with pytest.raises(ZeroDivisionError):
        tether.files.load_untied(target, path, resolve=lambda name, arrays: 1 // 0)
    assert state(target) == before


def test_an_unknown_rule_is_refused(rng, tmp_path):
    _, path = disagreeing(rng, tmp_path)
    with pytest.raises(TetherError, match="'error', 'first', 'mean'"):
        tether.files.load_untied(autoencoder(tied=True), path, resolve="last")


def test_nan_is_a_value(rng, tmp_path):
    source = agreeing(autoencoder, rng)
    kernel = numpy(source.layers[1].kernel).copy()
    kernel[0, 0] = np.nan
    source.layers[1].kernel.assign(kernel)
    with pytest.raises(ValueConflict, match="nan"):
        tether.files.load_untied(autoencoder(tied=True), as_weights(source, tmp_path))
    source.layers[2].kernel.assign(kernel.T)
    target = autoencoder(tied=True)
    tether.files.load_untied(target, as_weights(source, tmp_path))
    assert np.array_equal(numpy(target.layers[1].kernel), kernel, equal_nan=True)


def test_a_multiple_agrees_if_it_is_what_the_expression_gives(rng, tmp_path):
    """0.1 w divided by 0.1 is w only after rounding."""

    def pair(tied):
        x = keras.Input((4,))
        a, b = layers.Dense(3, name="a"), layers.Dense(3, name="b")
        if tied:
            w = tether.Weight(name="w")
            tether.tie(a, kernel=w)
            tether.tie(b, kernel=0.1 * w)
        return keras.Model(x, [a(x), b(x)])

    tied = randomize(pair(True), rng)
    plain = pair(False)
    tether.files.load_untied(plain, as_weights(tied, tmp_path))
    assert np.array_equal(numpy(plain.layers[2].kernel), numpy(tied.layers[2].kernel))
    again = pair(True)
    assert not tether.files.load_untied(again, as_weights(plain, tmp_path)).conflicting
    assert np.array_equal(numpy(again.layers[1].kernel), numpy(tied.layers[1].kernel))
    plain.layers[2].kernel.assign(1.001 * numpy(plain.layers[2].kernel))
    with pytest.raises(ValueConflict):
        tether.files.load_untied(again, as_weights(plain, tmp_path))


def sums(tied):
    x = keras.Input((4,))
    a, b, c = (layers.Dense(3, name=name) for name in "abc")
    if tied:
        v, w = tether.Weight(name="v"), tether.Weight(name="w")
        tether.tie(a, kernel=v)
        tether.tie(b, kernel=w)
        tether.tie(c, kernel=v @ tether.Weight(np.eye(3, dtype="float32"), name="eye") + w)
    return keras.Model(x, [a(x), b(x), c(x)])


def test_a_view_without_an_inverse_is_checked_against_what_was_loaded(rng, tmp_path):
    source = randomize(sums(False), rng)
    a, b, c = (layer.kernel for layer in source.layers[1:])
    c.assign(numpy(a) + numpy(b))
    target = sums(True)
    report = tether.files.load_untied(target, as_weights(source, tmp_path), strict=False)
    assert report.missing == ("eye",) and not report.conflicting
    assert_close(target.layers[3].kernel, c)
    c.assign(numpy(c) + 0.25)
    before = state(target)
    with pytest.raises(ValueConflict, match=r"c/kernel = .* differ by up to 0\.25"):
        tether.files.load_untied(target, as_weights(source, tmp_path), strict=False)
    assert state(target) == before
    report = tether.files.load_untied(target, as_weights(source, tmp_path), strict=False, resolve="first")
    assert report.conflicting[0].difference == pytest.approx(0.25)


def test_a_plain_file_fills_the_base_of_an_adapter(rng, tmp_path):
    source = randomize(autoencoder(tied=False), rng)
    path = as_weights(source, tmp_path)
    base = autoencoder(tied=False)
    base.trainable = False
    child = tether.inherit(base, {"*/kernel": tether.low_rank(2)})
    report = tether.files.load_untied(child, path)
    assert_close(child(INPUTS[autoencoder]), source(INPUTS[autoencoder]))
    assert sum("lora" in name for name in report.missing) == 4


def test_what_the_file_has_more_or_less_is_an_error_unless_asked_for(rng, tmp_path):
    small = keras.Sequential([keras.Input((5,)), layers.Dense(3)])
    large = keras.Sequential([keras.Input((5,)), layers.Dense(3), layers.Dense(2)])
    small_file = as_weights(randomize(small, rng), tmp_path).rename(tmp_path / "small.weights.h5")
    large_file = as_weights(randomize(large, rng), tmp_path)
    before = state(small), state(large)
    with pytest.raises(TetherError, match=r"has no value for '.*dense_.*kernel'.*strict=False"):
        tether.files.load_untied(large, small_file)
    with pytest.raises(TetherError, match=r"no place for: 'layers/dense_1/vars/0'"):
        tether.files.load_untied(small, large_file)
    assert (state(small), state(large)) == before
    assert len(tether.files.load_untied(large, small_file, strict=False).missing) == 2
    assert len(tether.files.load_untied(small, large_file, strict=False).skipped) == 2


def test_another_shape_and_another_kind_of_number_are_refused(rng, tmp_path):
    path = as_weights(randomize(autoencoder(tied=False), rng), tmp_path)
    other = keras.Sequential([keras.Input((5,)), layers.Dense(4), layers.Dense(5)])
    before = state(other)
    with pytest.raises(ShapeMismatch, match=r"\(5, 4\).*layers/dense/vars/0.*\(5, 3\)"):
        tether.files.load_untied(other, path)
    assert state(other) == before
    counts = keras.Sequential([keras.Input((5,)), layers.Dense(3)])
    with_ints = np.ones((5, 3), "int32")
    np.savez(tmp_path / "ints.npz", **{"layers/dense": {"0": with_ints, "1": np.zeros(3, "float32")}})
    with pytest.raises(TetherError, match=r"float32.*int32"):
        tether.files.load_untied(counts, tmp_path / "ints.npz")


def test_sixteen_bits_are_kept(rng, tmp_path):
    source, target = (autoencoder(tied, dtype="bfloat16") for tied in (False, True))
    kernel = rng.normal(size=(5, 3)).astype("float32")
    source.layers[1].kernel.assign(kernel)
    source.layers[2].kernel.assign(kernel.T)
    tether.files.load_untied(target, as_weights(source, tmp_path))
    assert np.array_equal(numpy(target.layers[1].kernel), numpy(source.layers[1].kernel))
    wide = autoencoder(tied=False)
    tether.files.load_untied(wide, as_weights(target, tmp_path))
    assert np.array_equal(numpy(wide.layers[2].kernel), numpy(source.layers[2].kernel).astype("float32"))


def test_optimizer_state_is_left_out_without_an_error(rng, tmp_path):
    source = agreeing(autoencoder, rng)
    source.compile("adam", "mse")
    x = INPUTS[autoencoder]
    source.fit(x, x, verbose=0)
    source.layers[2].kernel.assign(numpy(source.layers[1].kernel).T)
    target = autoencoder(tied=True)
    report = tether.files.load_untied(target, as_keras(source, tmp_path))
    assert report.skipped and all("optimizer" in name for name in report.skipped)


def test_a_normalization_uses_what_was_loaded(rng, tmp_path):
    def make():
        return keras.Sequential([keras.Input((3,)), layers.Normalization(name="scale"), layers.Dense(2)])

    source, target = make(), make()
    source.layers[0].adapt(rng.normal(3.0, 2.0, size=(50, 3)).astype("float32"))
    tether.files.load_untied(target, as_weights(source, tmp_path))
    assert_close(target(np.ones((1, 3), "float32")), source(np.ones((1, 3), "float32")))


def test_old_files_match_by_order_and_say_what_does_not_fit(rng, tmp_path):
    path = as_old(randomize(autoencoder(tied=False), rng), tmp_path)
    with pytest.raises(TetherError, match=r"2 layers with weights \(encode, decode\), the model 1"):
        tether.files.load_untied(keras.Sequential([keras.Input((5,)), layers.Dense(3)]), path)
    without = keras.Sequential([keras.Input((5,)), layers.Dense(3, use_bias=False), layers.Dense(5)])
    with pytest.raises(TetherError, match=r"'encode' .* has 2 weights, and 'dense.*' has 1"):
        tether.files.load_untied(without, path)


def test_files_that_are_none_are_refused(tmp_path):
    model = autoencoder(tied=True)
    before = state(model)
    with pytest.raises(TetherError, match="no file"):
        tether.files.load_untied(model, tmp_path / "absent.weights.h5")
    (tmp_path / "x.weights.h5").write_bytes(b"no hdf5")
    with pytest.raises(InvalidConfig, match="damaged"):
        tether.files.load_untied(model, tmp_path / "x.weights.h5")
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(Unsupported, match="end with"):
        tether.files.load_untied(model, tmp_path / "x.bin")
    (tmp_path / "x.weights.json").write_text('{"weight_map": {"a": "../elsewhere.h5"}}')
    with pytest.raises(InvalidConfig, match="beside it"):
        tether.files.load_untied(model, tmp_path / "x.weights.json")
    with pytest.raises(TetherError, match="not built"):
        tether.files.load_untied(layers.Dense(3), tmp_path / "x.weights.h5")
    assert state(model) == before


class Attack:
    def __reduce__(self):
        return (open, ("stolen", "w"))


def test_a_pickle_in_an_npz_makes_nothing_but_arrays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("evil.npz", **{"layers/dense": {"0": Attack()}})
    with pytest.raises(InvalidConfig, match="which is no array"):
        tether.files.load_untied(autoencoder(tied=True), "evil.npz")
    assert not (tmp_path / "stolen").exists()


def test_links_in_an_hdf5_file_are_not_followed(tmp_path):
    import h5py

    with h5py.File(tmp_path / "x.weights.h5", "w") as file:
        file["layers"] = h5py.ExternalLink("other.h5", "/")
    with pytest.raises(InvalidConfig, match="link"):
        tether.files.load_untied(autoencoder(tied=True), tmp_path / "x.weights.h5")


# --------------------------------------------------------------------------- the notes of tied layers


def with_notes(path, change):
    """Changes the notes in a file: `change` gets all attributes of a group."""
    import h5py

    with h5py.File(path, "r+") as file:
        file.visititems(lambda _, item: change(item.attrs) if isinstance(item, h5py.Group) else None)
    return path


def drop(attributes):
    for key in ("tether", "tether_uid"):
        attributes.pop(key, None)


def test_a_file_without_notes_is_read_as_before(rng, tmp_path):
    source, target = randomize(autoencoder(tied=True), rng), autoencoder(tied=True)
    path = with_notes(as_weights(source, tmp_path), drop)
    target.load_weights(path)
    assert np.array_equal(numpy(target.layers[2].kernel), numpy(source.layers[2].kernel))
    assert not tether.files.load_untied(randomize(target, rng), path).skipped
    assert np.array_equal(numpy(target.layers[2].kernel), numpy(source.layers[2].kernel))
    with pytest.raises(TetherError, match=r"has no value for 'encode.*/kernel', 'decode.*/kernel'"):
        tether.files.load_untied(autoencoder(tied=False), path)


@pytest.mark.parametrize("make", [autoencoder, stack], ids=lambda f: f.__name__)
@pytest.mark.parametrize("into", [True, False], ids=["into_tied", "into_untied"])
def test_an_archive_without_notes_says_in_its_config_what_is_tied(into, make, rng, tmp_path):
    source, target = randomize(make(tied=True), rng), randomize(make(tied=into), rng)
    tether.files.save_model(source, tmp_path / "m.keras")
    without_notes(tmp_path / "m.keras")
    report = tether.files.load_untied(target, tmp_path / "m.keras")
    assert not report.skipped and not report.missing
    for mine, theirs in zip(target.layers, source.layers, strict=True):
        for name in ("kernel", "embeddings"):
            if hasattr(theirs, name):
                assert np.array_equal(numpy(getattr(mine, name)), numpy(getattr(theirs, name)))


def without_notes(path):
    hostile.with_values(lambda file: file.visititems(lambda _, item: drop(item.attrs)))(path)


def test_an_archive_without_notes_whose_config_makes_no_model_is_a_clear_error(rng, tmp_path):
    path = tmp_path / "m.keras"
    tether.files.save_model(autoencoder(tied=True), path)
    without_notes(path)
    hostile.with_config(lambda config: hostile.layer(config, "encode")["config"].update(units="many"))(path)
    target = randomize(autoencoder(tied=False), rng)
    before = target.get_weights()
    with pytest.raises(InvalidConfig, match="no model can be made"):
        tether.files.load_untied(target, path)
    assert all(np.array_equal(a, b) for a, b in zip(target.get_weights(), before, strict=True))


def test_a_file_with_notes_is_loaded_by_keras(rng, tmp_path):
    source, target = randomize(autoencoder(tied=True), rng), autoencoder(tied=True)
    target.load_weights(as_weights(source, tmp_path))
    assert [value.tobytes() for value in target.get_weights()] == [v.tobytes() for v in source.get_weights()]


NOTES = {
    "no JSON": "{",
    "nested without end": "[" * 100_000,
    "another version": json.dumps({"version": 2, "ties": {}}),
    "no dict": "[]",
    "a tie that is none": json.dumps({"version": 1, "ties": {"0": 3}}),
    "an unknown dtype": json.dumps({"version": 1, "ties": {"0": {"dtype": "os", "steps": []}}}),
    "an unknown weight": json.dumps({"version": 1, "ties": {"0": {"dtype": "float32", "steps": [{"weight": "x"}]}}}),
    "a cycle": json.dumps(
        {"version": 1, "ties": {"0": {"dtype": "float32", "steps": [{"op": "negative", "of": [0]}]}}}
    ),
    "code": json.dumps(
        {
            "version": 1,
            "ties": {
                "0": {"dtype": "float32", "steps": [{"number": 1}, {"op": "apply", "of": [0], "function": "os>x"}]}
            },
        }
    ),
}


@pytest.mark.parametrize("note", NOTES.values(), ids=NOTES)
def test_notes_of_a_stranger_change_nothing(note, rng, tmp_path):
    def change(attributes):
        if "tether" in attributes:
            attributes["tether"] = note

    path = with_notes(as_weights(randomize(autoencoder(tied=True), rng), tmp_path), change)
    for tied in (True, False):
        model = randomize(autoencoder(tied), rng)
        before = state(model)
        with pytest.raises(InvalidConfig):
            tether.files.load_untied(model, path)
        assert state(model) == before


def test_a_damaged_chunk_is_found_before_anything_is_assigned(rng, tmp_path):
    import h5py

    path = tmp_path / "x.weights.h5"
    value = np.arange(15, dtype="float32").reshape(5, 3)
    with h5py.File(path, "w") as file:
        for layer, shape in (("dense", (5, 3)), ("dense_1", (3, 5))):
            group = file.create_group(f"layers/{layer}/vars")
            group.create_dataset("0", data=value.reshape(shape), compression="gzip", fletcher32=True)
            group.create_dataset("1", data=np.zeros(shape[1], "float32"))
        place = file["layers/dense_1/vars/0"].id.get_chunk_info(0).byte_offset
    model = autoencoder(tied=False)
    tether.files.load_untied(model, path)
    before = state(model)
    data = bytearray(path.read_bytes())
    data[place + 12] ^= 0xFF
    path.write_bytes(bytes(data))
    with pytest.raises(InvalidConfig, match="damaged"):
        tether.files.load_untied(model, path)
    assert state(model) == before


class Table(layers.Layer):
    """Writes an array that is no variable."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.table = np.arange(3)

    def call(self, x):
        return x

    def save_own_variables(self, store):
        store["table"] = self.table


def test_a_layer_that_writes_something_of_its_own_has_to_read_it_itself(tmp_path):
    model = keras.Sequential([keras.Input((3,)), Table(name="table"), layers.Dense(2)])
    path = as_weights(model, tmp_path)
    before = state(model)
    with pytest.raises(Unsupported, match=r"'table' writes more than variables.*load_weights"):
        tether.files.load_untied(model, path)
    assert state(model) == before
