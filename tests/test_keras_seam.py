"""Each assumption about private Keras, on the oldest and the newest supported version."""

import contextlib
import copy
import gc
import importlib
import io
import json
import pkgutil
import re
import subprocess
import sys
import warnings
import weakref
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import keras
import ml_dtypes
import numpy as np
import pytest

import tether
from tests.support import gradients
from tether import TetherError, keras_seam
from tether.keras_seam import census, private, training
from tether.keras_seam.frames import OF_LAYERS
from tether.keras_seam.sharding import ShardedVariable

of_the_newer_keras = pytest.mark.skipif(
    keras.__version__ < "3.15",
    reason="compile asks no layer there, and optimizers are counted otherwise: see semantics.md",
)


def dense():
    layer = keras.layers.Dense(3)
    layer.build((None, 2))
    return layer


def model_of(layer):
    return keras.Sequential([keras.Input((2,)), layer])


class Spy(keras.layers.Dense):
    """Calls a function wherever Keras gives it a chance to."""

    probe = staticmethod(lambda: None)
    seen: list = []  # noqa: RUF012

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.note("init")

    def note(self, where):
        Spy.seen.append((where, Spy.probe()))

    @classmethod
    def from_config(cls, config):
        layer = super().from_config(config)
        layer.note("from_config")
        return layer

    def get_config(self):
        self.note("get_config")
        return super().get_config()

    def save_own_variables(self, store):
        self.note("save")
        super().save_own_variables(store)

    def load_own_variables(self, store):
        self.note("load")
        super().load_own_variables(store)

    def _get_own_losses(self):
        self.note("losses")
        return super()._get_own_losses()

    @property
    def metrics(self):
        self.note("metrics")
        return []


@pytest.fixture
def spied():
    Spy.seen = []
    yield
    Spy.probe = staticmethod(lambda: None)


def heard(where):
    return [found for place, found in Spy.seen if place == where]


def test_a_clone_is_one_scope_and_two_clones_are_two(spied):
    model = model_of(Spy(3))
    Spy.probe = staticmethod(keras_seam.copying_scope)
    assert keras_seam.copying_scope() is None
    keras.models.clone_model(model)
    keras.models.clone_model(model)
    first, second = heard("from_config")
    assert first is not None and second is not None and first is not second


def test_all_layers_of_a_load_are_in_one_scope_that_ends_with_it(spied, tmp_path):
    model = keras.Sequential([keras.Input((2,)), Spy(3), Spy(3)])
    model.save(tmp_path / "m.keras")
    Spy.seen = []
    Spy.probe = staticmethod(lambda: (keras_seam.copying_scope(), keras_seam.loading_scope()))
    keras.saving.load_model(tmp_path / "m.keras", custom_objects={"Spy": Spy})
    (a, _), (b, _) = heard("from_config")
    (_, c), (_, d) = heard("load")
    assert a is b is not None and c is d is not None
    assert keras_seam.copying_scope() is None and keras_seam.loading_scope() is None


def test_loading_weights_is_a_loading_scope(spied, tmp_path):
    model = model_of(Spy(3))
    model.save_weights(tmp_path / "m.weights.h5")
    Spy.probe = staticmethod(keras_seam.loading_scope)
    Spy.seen = []
    model.load_weights(tmp_path / "m.weights.h5")
    assert heard("load")[0] is not None


def test_writing_an_archive_is_a_saving_scope_that_knows_its_root(spied, tmp_path):
    model = model_of(Spy(3))
    Spy.seen = []
    Spy.probe = staticmethod(keras_seam.saving_scope)
    model.save(tmp_path / "m.keras")
    assert heard("get_config")[0] is heard("save")[0]
    assert heard("save")[0]["root"] is model
    Spy.seen = []
    model.save_weights(tmp_path / "m.weights.h5")
    assert heard("save") == [None]


def test_reading_losses_is_a_scope(spied):
    model = model_of(Spy(3))
    Spy.seen = []
    Spy.probe = staticmethod(keras_seam.losses_scope)
    assert model.losses == []
    first = heard("losses")[0]
    assert model.losses == []
    assert first is not None and heard("losses")[1] is not first


def test_keras_recursive_trainable_setter_is_told_from_a_user():
    class Child(keras.layers.Layer):
        by = None

        @property
        def trainable(self):
            return True

        @trainable.setter
        def trainable(self, value):
            self.by = keras_seam.set_by_a_container()

    class Parent(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.child = Child()

    parent = Parent()
    parent.trainable = False
    assert parent.child.by is True
    parent.child.trainable = False
    assert parent.child.by is False


def test_the_maker_is_the_outermost_keras_constructor():
    found = []

    class Inner(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            found.append(keras_seam.maker(self))

    class Outer(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

    outer = Outer()
    Inner()
    assert found[0] is outer and found[1] is None


def test_bidirectional_copies_its_argument_inside_its_constructor(spied):
    class SpyLSTM(keras.layers.LSTM):
        def get_config(self):
            Spy.seen.append(("config", keras_seam.inside_bidirectional_init()))
            return super().get_config()

    with keras.saving.custom_object_scope({"SpyLSTM": SpyLSTM}):
        both = keras.layers.Bidirectional(SpyLSTM(2))
        assert True in heard("config")
        Spy.seen = []
        both.get_config()
        assert heard("config") and True not in heard("config")


@pytest.mark.parametrize("path", ["bare", "dense/bare", "a/dense/bare", "a/b/c/dense/bare"])
def test_a_variable_is_made_under_a_path_whatever_scopes_are_open(path):
    """Known when the variable is made: a layout map looks it up then."""
    seen = []

    def start(shape, dtype=None):
        seen.append(keras_seam.current_path())
        return np.ones(shape, dtype)

    layer = keras.layers.Dense(2, name="inner")
    with keras.name_scope("outer"), keras_seam.name_scope(layer):
        with keras_seam.path_scope(path):
            inside = keras.Variable(start, shape=(2,), name="bare")
        again = keras.Variable(np.ones(2), name="scoped")
    assert inside.path == path and again.path == "outer/inner/scoped"
    assert seen == [path.rpartition("/")[0]]


def test_the_path_of_a_new_weight_is_that_of_the_open_scopes():
    layer = keras.layers.Dense(3, name="d")
    with keras_seam.name_scope(layer):
        assert keras_seam.current_path() == "d"


def test_automatic_variable_names_are_known():
    assert keras_seam.is_automatic_variable_name(keras.Variable(np.ones(2)).name)
    assert not keras_seam.is_automatic_variable_name("kernel")


def test_raw_values_follow_stateless_scopes_and_ignore_autocast():
    variable = keras.Variable(np.ones(2, "float32"))
    other = keras.ops.zeros(2)
    with keras_seam.AutocastScope("float16"):
        assert keras.backend.standardize_dtype(keras_seam.raw_value(variable).dtype) == "float32"
        assert keras_seam.stored_dtype(variable) == "float32"
    with keras.StatelessScope(state_mapping=[(variable, other)]):
        assert np.array_equal(keras.ops.convert_to_numpy(keras_seam.raw_value(variable)), np.zeros(2))


def test_a_layer_lists_its_own_variables_by_store():
    norm = keras.layers.BatchNormalization()
    norm.build((None, 2))
    lists = keras_seam.variable_lists(norm)
    assert [v.name for v in lists["trainable_variables"]] == ["gamma", "beta"]
    assert [v.name for v in lists["non_trainable_variables"]] == ["moving_mean", "moving_variance"]
    with keras_seam.listed_variables(norm, {store: [] for store in lists}):
        assert norm.weights == []
    assert len(norm.weights) == 4


def test_variables_are_untracked_and_put_back_at_their_place():
    layer = dense()
    kernel, bias = layer.weights
    keras_seam.untrack(layer, kernel)
    assert [v is bias for v in layer.weights] == [True]
    keras_seam.insert_tracked(layer, "trainable_variables", 0, kernel)
    assert layer.weights[0] is kernel and layer.weights[1] is bias
    assert layer._tracker.locked


def test_a_shielded_tracker_passes_over_a_class_also_in_containers():
    class Special(keras_seam.Variable):
        pass

    layer = keras.layers.Layer()
    keras_seam.shield_tracker(layer, Special)
    layer.items = [Special(np.ones(2)), keras.Variable(np.ones(3))]
    assert [tuple(v.shape) for v in layer.weights] == [(3,)]
    keras_seam.unshield_tracker(layer)
    layer.more = [Special(np.ones(4))]
    assert [tuple(v.shape) for v in layer.weights] == [(3,), (4,)]


def test_prepared_views_have_what_a_variable_has():
    class Bare(keras_seam.Variable):
        def __init__(self):
            keras_seam.prepare_view(self, name="n", path="p/n", shape=(2,), dtype="float32", autocast=True)

        @property
        def value(self):
            return keras.ops.ones(2)

        @property
        def trainable(self):
            return False

        @trainable.setter
        def trainable(self, value):
            pass

    made, real = Bare(), keras.Variable(np.ones(2, "float32"))
    missing = {name for name in vars(real) if not name.startswith("__")} - set(vars(made)) - {"_trainable"}
    missing = {name for name in missing if name.startswith("_") and not name.startswith("_self_")}
    assert missing <= {"_keras_api_export_path"}, missing
    assert made.name == "n" and made.path == "p/n" and tuple(made.shape) == (2,) and made.ndim == 1
    assert np.array_equal(keras.ops.convert_to_numpy(keras.ops.add(made, real)), np.full(2, 2.0))
    assert keras_seam.autocasts(made)


def test_containers_whose_config_is_that_of_their_layers():
    inputs = keras.Input((2,))
    functional = keras.Model(inputs, keras.layers.Dense(2)(inputs))

    class Own(keras.Model):
        def __init__(self, width):
            i = keras.Input((2,))
            super().__init__(i, keras.layers.Dense(width)(i))

        def get_config(self):
            return {"width": 2}

    assert keras_seam.holds_its_layers_configs(functional)
    assert keras_seam.holds_its_layers_configs(model_of(keras.layers.Dense(2)))
    assert not keras_seam.holds_its_layers_configs(Own(2))
    assert not keras_seam.holds_its_layers_configs(keras.layers.Dense(2))


def test_attributes_are_the_same_on_every_backend():
    class Holder(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.first = keras.layers.Dense(2)
            self.second = [keras.layers.Dense(2)]

    names = {name for name, _ in keras_seam.attributes(Holder())}
    assert {"first", "second"} <= names
    assert not names & {"_layers", "_modules", "_trainable_variables", "_self_unconditional_dependency_names"}


def test_classes_are_named_and_found_by_keras_own_rules():
    reference = keras_seam.class_reference(keras.layers.Dense)
    assert reference == {"module": "keras.layers", "class_name": "Dense", "registered_name": None}
    assert keras_seam.find_class(reference) is keras.layers.Dense
    with pytest.raises(Exception, match=r"[Cc]ould not (be )?locate"):
        keras_seam.find_class({"module": "os", "class_name": "system", "registered_name": "system"})


def test_tied_classes_are_written_under_one_name():
    class Other(keras.layers.Dense):
        pass

    keras_seam.register_made(Other, keras_seam.TIED_NAME)
    assert keras.saving.serialize_keras_object(Other(2))["registered_name"] == keras_seam.TIED_NAME


def test_the_default_mark_of_get_config_is_kept():
    class Auto(keras.layers.Layer):
        def __init__(self, width):
            super().__init__()
            self.width = width

    assert keras_seam.is_default(Auto.get_config)

    def get_config(self):
        return Auto.get_config(self)

    Kept = type("Kept", (Auto,), {"get_config": keras_seam.mark_like(get_config, Auto.get_config)})
    assert Kept(5).get_config()["width"] == 5


def test_save_and_load_in_memory():
    model = model_of(keras.layers.Dense(3))
    buffer = io.BytesIO()
    keras_seam.save_to(model, buffer)
    buffer.seek(0)
    loaded = keras_seam.load_from(buffer, compile=False)
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        assert np.array_equal(a, b)


def test_the_owner_of_a_call_lives_as_long_as_the_call():
    owners = []

    class Probe(keras.layers.Layer):
        def call(self, x):
            owners.append(keras_seam.call_owners())
            return x

    class Twice(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.a, self.b = Probe(), Probe()

        def call(self, x):
            return self.b(self.a(x))

    layer = Twice()
    layer(np.ones((1, 2), "float32"))
    layer(np.ones((1, 2), "float32"))
    eager = [o for o in owners if len(o) == 1]
    assert len(eager) >= 4
    *_, a, b, c, d = (o[-1] for o in eager)
    assert a is b and c is d and a is not c
    assert keras_seam.call_owners() == []
    owners.clear()
    with keras.StatelessScope() as scope:
        layer(np.ones((1, 2), "float32"))
    assert owners[0][0] is scope


def test_trace_tokens_differ_inside_a_trace():
    outside = keras_seam.trace_token()
    assert keras_seam.trace_token() == outside
    backend, seen = keras.backend.backend(), []
    if backend == "jax":
        import jax

        jax.jit(lambda x: (seen.append(keras_seam.trace_token()), x)[1])(1.0)
    elif backend == "tensorflow":
        import tensorflow as tf

        tf.function(lambda x: (seen.append(keras_seam.trace_token()), x)[1])(tf.constant(1.0))
    else:
        import torch

        with torch.no_grad():
            seen.append(keras_seam.trace_token())
    assert seen[0] != outside


def test_rnn_asks_its_cell_for_masks_before_its_loop_and_takes_them_back_after():
    order = []

    class Cell(keras.layers.GRUCell):
        def get_dropout_mask(self, step_input):
            order.append("before")
            return super().get_dropout_mask(step_input)

        def call(self, *args, **kwargs):
            order.append("step")
            return super().call(*args, **kwargs)

        def reset_dropout_mask(self):
            order.append("after")
            return super().reset_dropout_mask()

    keras.layers.RNN(Cell(2))(np.ones((1, 3, 2), "float32"))
    last = order[len(order) - 1 - order[::-1].index("before") :]
    assert last[0] == "before" and last[-1] == "after" and "step" in last


def test_quantize_asks_before_it_changes_anything():
    class Guarded(keras.layers.Dense):
        def _check_quantize_args(self, *args, **kwargs):
            raise RuntimeError("asked")

    layer = Guarded(2)
    layer.build((None, 2))
    with pytest.raises(RuntimeError, match="asked"):
        layer.quantize("int8")


class Watched(keras.layers.Layer):
    """A layer in the place of a weight."""

    _layers = keras_seam.WatchedSublayers()

    def call(self, x):
        return x

    def quantize(self, mode=None, type_check=True, config=None):
        self.in_a_model = keras_seam.is_quantizing_a_model()

    def _check_quantize_args(self, *args, **kwargs):
        pass


def test_quantizing_a_model_reads_the_sublayers_of_every_layer_before_it_changes_one(monkeypatch):
    watched, dense = Watched(), keras.layers.Dense(2)
    model = keras.Sequential([keras.Input((2,)), dense, watched])
    seen = []
    monkeypatch.setitem(keras_seam.quantizers, "model", lambda *given: seen.append((dense.quantization_mode, *given)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.quantize("int8", filters="dense|watched")
    ((mode_before, of, mode, config, filters),) = seen
    assert mode_before is None and dense.quantization_mode == "int8"
    assert of is model and mode == "int8" and config.mode == "int8" and filters == "dense|watched"
    assert watched.in_a_model
    watched.quantize("int8")
    assert not watched.in_a_model


def test_nobody_else_who_reads_sublayers_is_taken_for_quantizing(monkeypatch):
    asked, layer = [], Watched()
    monkeypatch.setitem(keras_seam.quantizers, "model", lambda *given: asked.append(given))
    layer.inner = keras.layers.Activation("relu")
    assert keras_seam.contained_layers(layer) == [layer, layer.inner] and keras_seam.sublayers(layer) == [layer.inner]
    keras.Sequential([keras.Input((2,)), layer]).summary(print_fn=lambda *args, **kwargs: None)
    assert not asked


def test_a_refusal_while_keras_lists_the_layers_gets_out_of_quantize(monkeypatch):
    dense = keras.layers.Dense(2)
    model = keras.Sequential([keras.Input((2,)), dense, Watched()])

    def refuse(*given):
        raise NotImplementedError("refused")  # of a layer, Keras would make this a warning

    monkeypatch.setitem(keras_seam.quantizers, "model", refuse)
    with pytest.raises(NotImplementedError, match="refused"):
        model.quantize("int8")
    assert dense.quantization_mode is None


def test_the_config_of_a_mode_says_its_mode():
    assert keras_seam.quantization_config("int4", None).mode == "int4"
    config = keras.quantizers.Int8QuantizationConfig()
    assert keras_seam.quantization_config(None, config) is config and config.weight_quantizer is None
    with pytest.raises(ValueError, match="int8"):
        keras_seam.quantization_config("int3", None)


def test_filters_of_quantize_are_patterns_of_names_or_functions():
    layer = keras.layers.Dense(2, name="first")
    for filters, expected in (
        (None, True),
        ("fir", True),
        ("x", False),
        (["x", "st$"], True),
        (lambda each: False, False),
    ):
        assert keras_seam.passes(layer, filters) is expected


def test_quantize_of_a_layer_can_be_taken_over_and_given_back(monkeypatch):
    layer, calls = keras.layers.Dense(2), []
    layer.build((None, 2))
    monkeypatch.setitem(keras_seam.quantizers, "layer", lambda *args, **kwargs: calls.append((args, kwargs)))
    keras_seam.take_over_quantize(layer)
    layer.quantize("int8", type_check=False)
    ((found, original, mode, config), options) = calls[0]
    assert (found, mode, config, options) == (layer, "int8", None, {"type_check": False})
    assert layer.quantization_mode is None
    keras_seam.give_back_quantize(layer)
    assert layer.quantize is original
    layer.quantize("int8")
    assert layer.quantization_mode == "int8" and len(calls) == 1


def test_build_ends_by_locking_the_state():
    ended = []

    class Locked(keras.layers.Dense):
        def _lock_state(self):
            ended.append(self.built)
            super()._lock_state()

    Locked(2).build((None, 2))
    assert ended == [True]


def test_deepcopy_of_a_model_goes_through_its_file(spied):
    model = model_of(keras.layers.Dense(3))
    other = copy.deepcopy(model)
    assert other is not model and np.array_equal(other.get_weights()[0], model.get_weights()[0])


def test_the_class_whose_method_is_at_work_on_a_layer_is_known():
    found = []

    class Child(keras.layers.Dense):
        def build(self, input_shape):
            super().build(input_shape)
            inner = keras.layers.Dense(2)
            inner.build(input_shape)
            self.gain = self.add_weight(name="gain", shape=())

        def add_weight(self, *args, **kwargs):
            found.append((kwargs["name"], list(keras_seam.running_methods(self))))
            return super().add_weight(*args, **kwargs)

    Child(3).build((None, 4))
    assert found == [
        ("kernel", [Child, keras.layers.Dense, Child]),
        ("bias", [Child, keras.layers.Dense, Child]),
        ("gain", [Child, Child]),
    ]
    assert list(keras_seam.running_methods(Child(3))) == []


def test_lora_locks_a_layer_inside_its_own_build_and_it_can_be_unlocked():
    class Child(keras.layers.Dense):
        def build(self, input_shape):
            assert not keras_seam.is_locked(self)
            super().build(input_shape)
            assert keras_seam.is_locked(self)
            keras_seam.unlock(self)
            self.gain = self.add_weight(name="gain", shape=())

    layer = Child(3, lora_rank=2)
    layer.build((None, 4))
    assert layer.weights[-1] is layer.gain and keras_seam.is_locked(layer)


def test_a_layer_lists_its_variables_before_its_constructor_runs():
    class Child(keras.layers.Dense):
        def __init__(self):
            assert keras_seam.variable_lists(self) == {"trainable_variables": [], "non_trainable_variables": []}
            super().__init__(3)

    Child()


def test_variables_assigned_in_a_stateless_scope_are_known_and_not_changed():
    layer = dense()
    before = [np.array(value) for value in layer.get_weights()]
    with keras.StatelessScope() as scope:
        layer.load_own_variables({"0": np.ones((2, 3), "float32"), "1": np.ones(3, "float32")})
        assert all(np.array_equal(scope.get_current_value(v), np.ones(v.shape)) for v in layer.weights)
    assert all(np.array_equal(a, b) for a, b in zip(before, layer.get_weights(), strict=True))


def test_layer_names_that_keras_made_up_are_told_from_given_ones():
    class MyBlock2D(keras.layers.Layer):
        pass

    model = keras.Sequential([keras.Input((2,)), dense()])
    made = [dense(), dense(), MyBlock2D(), MyBlock2D(), keras.layers.Conv2D(1, 1), keras.layers.LSTM(1), model]
    x = keras.Input((2,))
    made += [keras.Model(x, dense()(x)) for _ in range(2)]
    assert all(keras_seam.is_automatic_layer_name(layer) for layer in made), [layer.name for layer in made]
    given = [
        keras.layers.Dense(1, name=name) for name in ("head", "dense_head", "dense_1_child", "dense_", "my_dense_1")
    ]
    assert not any(keras_seam.is_automatic_layer_name(layer) for layer in given)


# --------------------------------------------------------------------------- calls, compilation, names


def test_a_training_call_is_told_from_another():
    seen = []

    class Looks(keras.layers.Layer):
        def call(self, x):
            seen.append(keras_seam.is_training_call())
            return x

    inner = Looks()
    outer = keras.Sequential([keras.Input((2,)), inner])
    seen.clear()
    x = np.ones((1, 2), "float32")
    outer(x, training=True)
    outer(x, training=False)
    outer(x)
    inner(x)
    assert seen == [True, False, False, False]
    assert not keras_seam.is_training_call()


def test_the_signature_of_a_call_can_be_read_again():
    layer = keras.layers.Dense(2)

    class Wider(keras.layers.Dense):
        def call(self, inputs, training=None, *, mask=None, extra=None):
            return super().call(inputs) * (1 if extra is None else extra)

    layer.__class__ = Wider
    assert "extra" not in keras_seam.call_parameters(layer)
    keras_seam.refresh_call_signature(layer)
    assert keras_seam.call_parameters(layer) == ["inputs", "training", "mask", "extra"]
    x = np.ones((1, 2), "float32")
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(layer(x, extra=2.0)), 2 * keras.ops.convert_to_numpy(layer(x)), rtol=1e-6
    )


def test_what_adds_to_the_variables_of_a_layer_is_counted():
    dense, dropout = keras.layers.Dense(2), keras.layers.Dropout(0.5)
    dense.build((None, 3))
    assert keras_seam.counts(dense) == (2, 0, 0)
    assert keras_seam.counts(dropout)[2] == 1
    assert keras_seam.counts(keras.Sequential([keras.Input((3,)), dense]))[2] >= 1


def test_a_name_is_given_once():
    assert len({keras_seam.unique_name("heir") for _ in range(3)}) == 3


class Asked(keras.layers.Dense):
    """A layer of which it is known whether it is tied, and who is told when it is asked whether it trains."""

    @property
    def trainable(self):
        keras_seam.notice_compiling()
        return True

    @trainable.setter
    def trainable(self, value):
        pass


def trained(layer, optimizer=None):
    model = keras.Sequential([keras.Input((2,)), layer])
    model.compile(optimizer or keras.optimizers.SGD(0.1), "mse")
    x = np.ones((4, 2), "float32")
    model.fit(x, x, verbose=0), model.evaluate(x, x, verbose=0), model.predict(x, verbose=0)
    return model, x


def test_compile_asks_each_layer_whether_it_trains_and_knows_its_optimizer_by_then():
    optimizer, other = keras.optimizers.SGD(0.1), keras.optimizers.SGD(0.1)
    model = keras.Sequential([keras.Input((2,)), Asked(2)])
    assert model.layers[0].trainable and not keras_seam.is_given_what_trains(optimizer, model)
    model.compile(optimizer, "mse")
    if keras.__version__ < "3.15":  # asks no layer then: `tether.check` finds what is decayed (decays-frozen-use)
        assert not keras_seam.is_given_what_trains(optimizer, model)
        return
    assert keras_seam.is_given_what_trains(optimizer, model)
    assert not keras_seam.is_given_what_trains(other, model)
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1))
    model.compile(scaled, "mse")
    assert keras_seam.is_given_what_trains(scaled, model)


@of_the_newer_keras
def test_layers_and_optimizers_are_counted():
    if keras.backend.backend() == "jax":
        import jax

        jax.clear_caches()  # or models of earlier tests, which they hold, go while this one counts
    gc.collect()
    layers, optimizers = (census.alive(codes) for codes in (OF_LAYERS, census._OF_OPTIMIZERS))
    kept = [keras.layers.Dense(1), keras.Sequential(), keras.layers.Dropout(0.5)]
    assert census.alive(OF_LAYERS) == layers + 3
    kept += [keras.optimizers.Adam(), keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())]
    assert census.alive(census._OF_OPTIMIZERS) == optimizers + 3
    trained(kept[0])
    assert census.alive(OF_LAYERS) >= layers + 4 and census.alive(training._OF_TRACES) > 0
    del kept
    gc.collect()
    assert census.alive(OF_LAYERS) == layers and census.alive(census._OF_OPTIMIZERS) == optimizers
    assert census.alive(()) == sys.maxsize  # a Keras in which nothing can be counted: everything is looked for


@pytest.fixture
def counted_from_here(monkeypatch):
    """What earlier tests have left that holds Keras's code, and is no layer or optimizer, is not counted."""
    gc.collect()
    census.find_new()
    seen = {OF_LAYERS: census._layers, census._OF_OPTIMIZERS: census._optimizers}
    held = {code: census.alive(code) - len(found) - census._count_orphans(code) for code, found in seen.items()}
    original = census.alive
    monkeypatch.setattr(census, "alive", lambda codes: original(codes) - max(held.get(codes, 0), 0))


@of_the_newer_keras
def test_looking_around_sees_every_layer_model_and_optimizer(counted_from_here, monkeypatch):
    held = {"model": trained(keras.layers.Dense(2))[0]}
    gc.collect()  # what is old is looked for too
    for module, seen in ((census, "_layers"), (census, "_optimizers"), (training, "_models")):
        monkeypatch.setattr(module, seen, weakref.WeakSet())
    monkeypatch.setattr(census, "_mark", None)  # nothing has been looked at
    census.find_new()
    assert held["model"] in training._models and held["model"].layers[0] in census._layers
    assert held["model"].optimizer in census._optimizers
    assert not census._is_something_new()
    held["more"] = [keras.layers.Dense(2), keras.optimizers.SGD()]
    assert census._is_something_new()


@of_the_newer_keras
def test_what_is_left_of_layers_that_are_gone_is_looked_for_once(counted_from_here, monkeypatch):
    kept = [keras.layers.Dense(1)._tracker, keras.optimizers.SGD()._tracker]  # hold the functions of what is gone
    gc.collect()
    census.find_new()
    looked, original = [], gc.get_objects
    monkeypatch.setattr(census.gc, "get_objects", lambda *generation: (looked.append(1), original(*generation))[1])
    census.find_new()
    assert not looked and not census.has_new_optimizers()
    layer, optimizer = keras.layers.Dense(1), keras.optimizers.SGD()
    census.find_new()
    assert looked and layer in census._layers and optimizer in census._optimizers
    looked.clear()
    del kept[:]
    gc.collect()
    another = keras.layers.Dense(1)
    census.find_new()
    assert looked and another in census._layers


@of_the_newer_keras
def test_what_is_frozen_for_the_garbage_collector_is_found_too():
    model, _ = trained(keras.layers.Dense(2))
    frozen = gc.get_freeze_count()
    gc.freeze()
    for layer in (model, model.layers[0]):
        census._layers.discard(layer)
    census.find_new()
    assert model in census._layers and model.layers[0] in census._layers and gc.get_freeze_count() > frozen


@of_the_newer_keras
def test_what_is_frozen_is_gone_through_once_for_each_time_that_something_is_frozen(monkeypatch):
    census.find_new()
    held = [code for code in (*OF_LAYERS, *census._OF_OPTIMIZERS) for _ in range(5)]  # which no search finds
    thawed, original = [], gc.unfreeze
    monkeypatch.setattr(census.gc, "unfreeze", lambda: (thawed.append(1), original())[1])
    gc.freeze()
    for _ in range(3):
        gc.collect()
        census.find_new()
    assert census._is_something_new() and thawed == [1]
    layer = keras.layers.Dense(2)
    gc.freeze()
    gc.collect()
    census.find_new()
    assert layer in census._layers and thawed == [1, 1]
    del held


@of_the_newer_keras
def test_what_was_made_lately_is_found_among_the_young_objects_alone(monkeypatch):
    gc.disable()  # what is young stays so
    try:
        census.find_new()
        monkeypatch.setattr(census.gc, "get_freeze_count", lambda: pytest.fail("takes as long as what is frozen"))
        monkeypatch.setattr(census, "_account_for", lambda everything: pytest.fail("takes as long as the heap"))
        layer, optimizer = keras.layers.Dense(2), keras.optimizers.Adam()
        census.find_new()
        assert layer in census._layers and optimizer in census._optimizers
    finally:
        gc.enable()


@of_the_newer_keras
def test_memory_is_gone_through_once_where_something_else_holds_the_code_of_keras(counted_from_here, monkeypatch):
    """Such as a traceback: there is more than layers and optimizers account for, and no search finds it."""
    census.find_new()
    held = [code for code in (*OF_LAYERS, *census._OF_OPTIMIZERS) for _ in range(5)]
    looked, original = [], gc.get_objects
    monkeypatch.setattr(
        census.gc, "get_objects", lambda *generation: (looked.append(generation), original(*generation))[1]
    )
    gc.collect()
    gc.disable()
    try:
        census.find_new()
        assert () in looked and census._is_something_new()
        looked.clear()
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
        for _ in range(3):
            census.find_new()
        assert model in census._layers and model.layers[0] in census._layers
        assert looked and () not in looked
        gc.collect()  # what is young is old from now on
        layer, optimizer = keras.layers.Dense(2), keras.optimizers.Adam()
        gc.collect()
        census.find_new()
        assert () in looked and layer in census._layers and optimizer in census._optimizers
    finally:
        gc.enable()
    del held
    census.find_new()
    assert not census._is_something_new()


def test_what_trains_evaluates_and_predicts_makes_its_function_first():
    layer = keras.layers.Dense(2)
    model, x = trained(layer)
    for use in (
        lambda: model.predict(x, verbose=0),
        lambda: model.predict_on_batch(x),
        lambda: model.evaluate(x, x, verbose=0),
        lambda: model.test_on_batch(x, x),
        lambda: model.fit(x, x, verbose=0),
        lambda: model.train_on_batch(x, x),
    ):
        functions = {name: getattr(model, name) for name in training._TRACES}
        use()
        assert {name: getattr(model, name) for name in training._TRACES} == functions
        keras_seam.before_change([layer])
        use()
        assert not functions.items() & {name: getattr(model, name) for name in training._TRACES}.items()
        model.fit(x, x, verbose=0), model.evaluate(x, x, verbose=0), model.predict(x, verbose=0)
        assert "make_train_function" not in vars(model)


def test_other_variables_than_the_optimizer_was_built_with_ask_for_compile():
    layer = keras.layers.Dense(2)
    model, x = trained(layer)
    keras_seam.before_change([layer])
    layer.kernel.trainable = False
    with pytest.raises(TetherError, match="Compile the model again before `fit`"):
        model.fit(x, x, verbose=0)
    layer.kernel.trainable = True
    model.fit(x, x, verbose=0)
    keras_seam.before_change([layer], resized=[layer.kernel])
    with pytest.raises(TetherError, match="Compile the model again before `fit`"):
        model.train_on_batch(x, x)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.train_on_batch(x, x)
    keras_seam.before_change([layer], resized=[layer.kernel], adjusted=model)
    model.train_on_batch(x, x)


def test_a_change_below_a_model_at_work_is_refused():
    layer, heard = keras.layers.Dense(2), []
    model, x = trained(layer)

    class Changes(keras.callbacks.Callback):
        def on_test_begin(self, logs=None):
            keras_seam.before_change([keras.layers.Dense(1)])
            with pytest.raises(TetherError, match=r"before or after `(fit|evaluate)`"):
                keras_seam.before_change([layer])
            heard.append(True)

    model.evaluate(x, x, verbose=0, callbacks=[Changes()])
    model.fit(x, x, validation_data=(x, x), verbose=0, callbacks=[Changes()])
    assert len(heard) == 2


@of_the_newer_keras
@pytest.mark.parametrize("kind", ["plain", "loss scale", "several"])
def test_an_optimizer_is_given_what_its_model_trains(kind, monkeypatch):
    layer = Asked(2)
    optimizer = inner = keras.optimizers.SGD(0.1, weight_decay=0.5, use_ema=True, ema_momentum=0.5)
    if kind == "loss scale":
        optimizer = keras.optimizers.LossScaleOptimizer(inner)
    if kind == "several":
        optimizer = keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(inner))
    monkeypatch.setitem(keras_seam.answers, "still", lambda model: [layer.kernel])
    model = keras.Sequential([keras.Input((2,)), layer])
    kernel, bias = (keras.ops.convert_to_numpy(v).copy() for v in (layer.kernel, layer.bias))
    model.compile(optimizer, "mse")
    x = np.ones((4, 2), "float32")
    model.fit(x, -x, verbose=0)
    assert np.array_equal(keras.ops.convert_to_numpy(layer.kernel), kernel)
    assert np.all(keras.ops.convert_to_numpy(layer.bias) != bias)
    assert len(keras_seam.optimized_variables(optimizer)) == 2


def of_everything():
    """A model with what Keras looks for when it saves: attributes, lists, dicts, lists in lists, one layer twice."""

    class Parts(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.zeta, self._hidden, self.alpha = dense(), dense(), keras.layers.Dropout(0.5)
            self.many = [keras.layers.Dense(3), keras.layers.EinsumDense("ab,bc->ac", 3), keras.layers.Dense(3)]
            self.named = {"b": keras.layers.Dense(3), "a": self.zeta}
            self.deep = [[keras.layers.Dense(3)], (keras.layers.Dense(3),)]
            self.both = keras.layers.Bidirectional(keras.layers.LSTM(2))

        def build(self, shape):
            for layer in (*self.many, self.named["b"], *self.deep[0], *self.deep[1]):
                layer.build((None, 2))
            self.both.build((None, 5, 2))
            self.own = self.add_weight(shape=(2,), name="own")

        def call(self, x):
            return x + self.own

    twice = keras.layers.Dense(2)
    x = keras.Input((2,))
    inner = keras.Model(x, keras.layers.BatchNormalization()(twice(x)))
    y = keras.Input((2,))
    model = keras.Model(y, Parts()(keras.Sequential([twice, keras.layers.Dense(2)])(inner(y))))
    model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()), "mse", metrics=["mae"])
    model.optimizer.build(model.trainable_variables)
    return model


def test_what_a_file_holds_is_known_without_writing_it(tmp_path, monkeypatch):
    model = of_everything()
    model.save_weights(tmp_path / "m.weights.h5")
    entries, names = set(), {}
    with h5py.File(tmp_path / "m.weights.h5") as file:

        def visit(place, item):
            if isinstance(item, h5py.Dataset):
                entries.add(place)
            elif "name" in item.attrs:
                names[place.removesuffix("vars").rstrip("/")] = item.attrs["name"]

        file.visititems(visit)
    objects = list(keras_seam.saved_objects(model))
    assert len({id(saveable) for _, saveable in objects}) == len(objects)
    found = set()
    for place, saveable in objects:
        if hasattr(saveable, "save_own_variables"):
            store = {}
            saveable.save_own_variables(store)
            found |= {f"{place}/vars/{key}" if place else f"vars/{key}" for key in store}
            assert names[place] == saveable.name
    assert found == entries
    assert len(names) == sum(hasattr(saveable, "save_own_variables") for _, saveable in objects)


def test_what_a_file_holds_comes_in_the_order_in_which_it_is_written(tmp_path, monkeypatch):
    model = of_everything()
    written, save = [], keras.layers.Layer.save_own_variables

    def noted(layer, store):
        written.append(id(layer))
        save(layer, store)

    monkeypatch.setattr(keras.layers.Layer, "save_own_variables", noted)
    model.save_weights(tmp_path / "m.weights.h5")
    assert len(set(written)) == len(written) > 10
    found = [id(saveable) for _, saveable in keras_seam.saved_objects(model)]
    assert [saveable for saveable in found if saveable in set(written)] == written


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: keras.optimizers.SGD(0.1), []),
        (lambda: keras.optimizers.SGD(0.1, momentum=0.9), ["momentums"]),
        (lambda: keras.optimizers.Adam(0.1, amsgrad=True), ["momentums", "velocities", "velocity_hats"]),
        (lambda: keras.optimizers.SGD(0.1, use_ema=True), ["model_variables_moving_average"]),
        (
            lambda: keras.optimizers.RMSprop(0.1, momentum=0.5, centered=True),
            ["average_gradients", "momentums", "velocities"],
        ),
        (lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=2), ["accumulated_gradients"]),
    ],
    ids=["none", "momentum", "amsgrad", "average", "centered", "accumulated"],
)
def test_what_an_optimizer_keeps_for_a_variable_is_known(make, names, scaled):
    layer = dense()
    optimizer = keras.optimizers.LossScaleOptimizer(make()) if scaled else make()
    assert keras_seam.optimizer_slots(optimizer) == {}
    optimizer.build([layer.kernel, layer.bias])
    found = keras_seam.optimizer_slots(optimizer)
    assert set(found) == {id(layer.kernel), id(layer.bias)}
    kept = {id(variable) for variable in optimizer.variables}
    for variable in (layer.kernel, layer.bias):
        slots = found[id(variable)]
        assert sorted(name for name, _ in slots) == sorted(names)
        assert all(tuple(slot.shape) == tuple(variable.shape) and id(slot) in kept for _, slot in slots)
    every = [id(slot) for slots in found.values() for _, slot in slots]
    assert len(set(every)) == len(every) == sum(tuple(variable.shape) != () for variable in optimizer.variables)


def test_a_variables_value_is_a_plain_tensor():
    variable = keras.Variable(np.eye(2, dtype="float32"))
    tensor = keras_seam.plain_tensor(variable.value)
    assert keras.ops.is_tensor(tensor)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(keras.ops.diagonal(tensor)), [1, 1])


def raw():
    variable = keras.Variable(np.zeros(4, "float32"))
    return variable, lambda: keras_seam.snapshot(keras_seam.raw_value(variable))


def test_a_snapshot_is_the_same_until_somebody_writes():
    variable, take = raw()
    before = take()
    assert keras_seam.is_same_snapshot(before, take())
    for _ in range(3):
        variable.assign(variable + 1)
        assert not keras_seam.is_same_snapshot(before, take())
        assert keras_seam.is_same_snapshot(take(), take())


@pytest.mark.parametrize("scaled", [False, True])
def test_slots_move_to_other_variables_and_the_optimizer_goes_on(scaled):
    layer, other = dense(), dense()
    inner = keras.optimizers.AdamW(0.1, weight_decay=0.5)
    inner.exclude_from_weight_decay([layer.kernel])
    optimizer = keras.optimizers.LossScaleOptimizer(inner) if scaled else inner
    optimizer.build([layer.kernel, layer.bias])
    for slot in (slot for slots in keras_seam.optimizer_slots(optimizer).values() for _, slot in slots):
        slot.assign(keras.ops.full(slot.shape, 2.0))
    kept = {id(slot) for _, slot in keras_seam.optimizer_slots(optimizer)[id(layer.bias)]}
    origin = keras_seam.SlotSource((layer.kernel,), lambda slots: slots[0] * 3)
    variables = [layer.bias, other.kernel]
    assert not keras_seam.move_slots(optimizer, [layer.bias, other.bias], {id(other.kernel): origin})
    assert [id(v) for v in keras_seam.optimized_variables(optimizer)] == [id(layer.kernel), id(layer.bias)]
    inner._use_weight_decay(layer.kernel)  # which is remembered
    assert keras_seam.move_slots(optimizer, variables, {id(other.kernel): origin})
    assert [id(v) for v in keras_seam.optimized_variables(optimizer)] == [id(layer.bias), id(other.kernel)]
    found = keras_seam.optimizer_slots(optimizer)
    assert {id(slot) for _, slot in found[id(layer.bias)]} == kept
    assert {name for name, _ in found[id(other.kernel)]} == {"momentums", "velocities"}
    for _, slot in found[id(other.kernel)]:
        np.testing.assert_array_equal(slot.numpy(), np.full((2, 3), 6.0))
    slots = {id(slot) for of in found.values() for _, slot in of}
    assert slots == {id(v) for v in optimizer.variables if v.shape != ()}
    assert not inner._use_weight_decay(other.kernel) and inner._use_weight_decay(layer.bias)
    fresh = type(optimizer).from_config(optimizer.get_config())
    fresh.build(variables)
    assert [v.shape for v in optimizer.variables] == [v.shape for v in fresh.variables]
    assert optimizer._tracker.config["variables"][1] is optimizer._variables
    before = other.kernel.numpy()
    inner.apply([keras.ops.ones(3), keras.ops.ones((2, 3))], variables)
    assert not np.array_equal(other.kernel.numpy(), before)
    extra = optimizer.add_variable((), name="more")
    assert any(extra is v for v in optimizer.variables)


def test_a_snapshot_sees_what_an_optimizer_writes():
    layer = dense()
    model = model_of(layer)
    model.compile("sgd", "mse")
    before = keras_seam.snapshot(keras_seam.raw_value(layer.kernel))
    model.fit(np.ones((4, 2)), np.ones((4, 3)), verbose=0)
    assert not keras_seam.is_same_snapshot(before, keras_seam.snapshot(keras_seam.raw_value(layer.kernel)))


def test_a_value_is_plain_only_where_no_gradient_is_recorded():
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        assert keras_seam.is_plain_eager()
        with tf.GradientTape():
            assert not keras_seam.is_plain_eager()
        seen = []
        tf.function(lambda: seen.append(keras_seam.is_plain_eager()))()
        assert seen == [False]
    elif backend == "torch":
        import torch

        assert not keras_seam.is_plain_eager()
        with torch.no_grad():
            assert keras_seam.is_plain_eager()
    else:
        import jax

        seen = []
        layer = dense()
        layer.call = lambda x: seen.append(keras_seam.is_plain_eager()) or x
        layer(np.ones((1, 2), "float32"))
        layer.stateless_call([v.value for v in layer.trainable_variables], [], np.ones((1, 2), "float32"))
        assert seen == [True, False]
        jax.jit(lambda x: seen.append(keras_seam.is_traced(x)) or x)(1.0)
        assert seen[-1] is True
        assert not keras_seam.is_traced(jax.numpy.ones(2))


@pytest.mark.parametrize("name", ["add", "subtract", "multiply", "matmul"])
def test_the_quick_operations_are_those_of_keras(name):
    mine, theirs = getattr(keras_seam, name), getattr(keras.ops, name)
    x = keras.Variable(np.arange(16.0).reshape(4, 4) / 7, dtype="float32")
    y = keras.Variable(np.arange(4.0), dtype="float32")
    half, whole = keras.ops.cast(y.value, "float16"), keras.ops.arange(4)
    for other in (y.value, y, half, whole, np.arange(4.0, dtype="float32"), x.value, *([2.0] * (name != "matmul"))):
        found, wanted = mine(x.value, other), theirs(x.value, other)
        assert keras.backend.standardize_dtype(found.dtype) == keras.backend.standardize_dtype(wanted.dtype)
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(found), keras.ops.convert_to_numpy(wanted))
    found, wanted = (
        keras.tree.map_structure(
            keras.ops.convert_to_numpy,
            gradients(lambda of=of: keras.ops.sum(keras.ops.square(of(x.value, y.value))), [x, y]),
        )
        for of in (mine, theirs)
    )
    keras.tree.map_structure(np.testing.assert_array_equal, found, wanted)
    assert mine(keras.Input((3, 3)), keras.Input((3, 3))).shape == (None, 3, 3)


def test_the_dtype_of_a_tensor_is_kerass():
    for dtype in ("float32", "float16", "bfloat16", "int32", "bool"):
        assert keras_seam.tensor_dtype(keras.ops.zeros((2,), dtype)) == dtype
        assert keras_seam.tensor_dtype(keras.Variable(np.zeros(2), dtype=dtype, trainable=False)) == dtype


def test_what_refuses_to_be_looked_into_is_part_of_no_structure():
    class Closed:
        shape, dtype = (2,), "float32"

    def refuse(closed):
        raise LookupError("closed")

    keras_seam.refuse_to_be_looked_into(Closed, refuse)
    x, closed = keras.Input((2,)), Closed()
    for look in (
        lambda: keras.tree.flatten({"a": [closed]}),
        lambda: keras.tree.map_structure(str, (closed,)),
        lambda: keras.ops.add(closed, keras.ops.ones((2,))),
        lambda: x + closed,
        lambda: dense()(closed),
        lambda: keras.Model(x, closed),
    ):
        with pytest.raises(LookupError, match="closed"):
            look()


def test_initializers_that_draw_at_random_are_known():
    drawn = ("glorot_uniform", "random_normal", "truncated_normal", "orthogonal", "he_normal")
    assert all(keras_seam.is_random(keras.initializers.get(name)) for name in drawn)
    assert not any(keras_seam.is_random(keras.initializers.get(name)) for name in ("zeros", "ones", "identity", None))


def test_a_function_is_traced_without_values():
    layer = dense()
    found = keras_seam.trace(layer, keras.KerasTensor((5, 2)))
    assert isinstance(found, keras.KerasTensor)
    assert found.shape == (5, 3)


def test_the_error_of_a_traced_function_is_its_own():
    error = KeyError("its own")

    def fails(x):
        raise error

    with pytest.raises(KeyError) as caught:
        keras_seam.trace(fails, keras.KerasTensor((5, 2)))
    assert caught.value is error


def test_a_mask_goes_with_a_tensor():
    x = keras.ops.ones((2, 3, 2))
    keras_seam.set_mask(x, keras.ops.convert_to_tensor([[True, True, False], [True, False, False]]))
    seen = []

    class Asks(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.supports_masking = True

        def call(self, x, mask=None):
            seen.append(mask)
            return x

    Asks()(x)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(seen[0]), [[True, True, False], [True, False, False]])


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="the other backends tell their layers")
def test_a_tensor_that_is_differentiated_says_so():
    import jax

    seen = []

    def function(x, y):
        seen.append(
            (keras_seam.is_differentiated(x), keras_seam.is_differentiated(y), keras_seam.is_differentiated(y, x))
        )
        return (x * y).sum()

    one = jax.numpy.ones(2)
    jax.jit(jax.value_and_grad(function))(one, one)
    jax.jvp(lambda x: function(x, one), (one,), (one,))
    jax.jit(function)(one, one)
    assert seen == [(True, False, True), (True, False, True), (False, False, False)]


def test_the_layers_whose_calls_are_in_progress_are_known():
    seen = []

    class Outer(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def call(self, x):
            return self.inner(x)

    class Inner(keras.layers.Layer):
        def call(self, x):
            with keras.name_scope("of_nobody"):
                seen.append(list(keras_seam.running_layers()))
            return x

    outer = Outer()
    outer(np.ones((2, 3), "float32"))
    assert seen[-1] == [outer.inner, outer]
    assert list(keras_seam.running_layers()) == []


class AddsItsInputs(keras.layers.Layer):
    def call(self, x):
        self.add_loss(keras.ops.mean(x))
        return x


def test_the_loss_of_a_training_step_is_computed_without_a_trace():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, activity_regularizer="l2"), AddsItsInputs()])
    assert not keras_seam.has_compiled_loss(model)
    model.compile("sgd", "mse")
    assert keras_seam.has_compiled_loss(model)
    x, y = np.ones((4, 2), "float32"), np.ones((4, 3), "float32")
    model(x)
    before = [float(keras.ops.convert_to_numpy(loss)) for loss in model.losses]
    compiled = model._compile_loss
    assert len(before) == 2 and not compiled.built
    with keras_seam.undisturbed(model):
        loss = keras_seam.training_loss(model, x, y, model(2 * x))
        assert model._compile_loss is not compiled
        assert model._compile_loss.built
    assert model._compile_loss is compiled
    assert not compiled.built
    assert [float(keras.ops.convert_to_numpy(loss)) for loss in model.losses] == before
    trained = model.train_on_batch(2 * x, y)
    assert float(keras.ops.convert_to_numpy(loss)) == pytest.approx(float(np.ravel(trained)[0]), rel=1e-5)


def test_several_outputs_have_the_same_loss_in_a_compiled_one_made_again():
    x = keras.Input((2,))
    a, b = keras.layers.Dense(1, name="a")(x), keras.layers.Dense(1, name="b")(x)
    model = keras.Model(x, {"a": a, "b": b})
    model.compile("sgd", {"a": "mse", "b": "mae"}, loss_weights={"a": 1.0, "b": 0.5})
    x, y = np.ones((4, 2), "float32"), {"a": np.ones((4, 1), "float32"), "b": np.zeros((4, 1), "float32")}
    with keras_seam.undisturbed(model):
        loss = keras_seam.training_loss(model, x, y, model(x))
    assert float(keras.ops.convert_to_numpy(loss)) == pytest.approx(
        model.train_on_batch(x, y, return_dict=True)["loss"], rel=1e-5
    )


def test_layers_compute_once_while_undisturbed():
    with keras.RematScope(mode="full"):
        model = model_of(keras.layers.Dense(3))
    modes = [layer._remat_mode for layer in keras_seam.contained_layers(model)]
    assert any(modes)
    with keras_seam.undisturbed(model):
        assert not any(layer._remat_mode for layer in keras_seam.contained_layers(model))
    assert [layer._remat_mode for layer in keras_seam.contained_layers(model)] == modes


def shared_between_graphs():
    layer, x, i = keras.layers.Dense(2, name="layer"), keras.Input((2,)), keras.Input((2,))
    return keras.Model(x, layer(keras.Model(i, layer(i), name="part")(x))), layer


def objects_in(config):
    if isinstance(config, dict):
        yield config
        for value in config.values():
            yield from objects_in(value)
    elif isinstance(config, (list, tuple)):
        for value in config:
            yield from objects_in(value)


def test_a_config_with_ids_names_one_layer_alike_in_all_places():
    model, layer = shared_between_graphs()
    ids = [
        found.get(keras_seam.SHARED_ID)
        for found in objects_in(keras_seam.config_with_ids(model))
        if found.get("class_name") == "Dense"
    ]
    assert ids == [id(layer)] * 2


def test_ids_make_one_object_of_what_a_config_has_twice():
    layer = keras.layers.Dense(2, name="layer")
    config = {**keras.saving.serialize_keras_object(layer), keras_seam.SHARED_ID: 7}
    seen = []

    class Reader:
        @staticmethod
        def from_config(config):
            seen.append(keras_seam.shared_object(7))
            return keras.layers.Identity()

    reader = {"class_name": "seam>Reader", "registered_name": "seam>Reader", "module": None, "config": {}}
    stack = keras.saving.serialize_keras_object(keras.Sequential([keras.Input((2,)), layer]))
    stack["config"]["layers"] = [stack["config"]["layers"][0], config, reader]
    again = keras_seam.deserialized(stack, {"seam>Reader": Reader})
    assert seen == [again.layers[0]]


def test_the_calls_of_a_layer_and_of_a_graph_are_known():
    model, layer = shared_between_graphs()
    assert keras_seam.calls_of(layer) == 2
    called = [operation.name for operation, _, _ in keras_seam.graph_of(model)]
    assert called[1:] == ["part", "layer"]
    (_, inputs, outputs) = keras_seam.graph_of(model)[-1]
    assert outputs[0] is model.outputs[0] and len(inputs) == 1


@pytest.mark.parametrize("size", [1, 4])
def test_a_variable_gets_another_shape_and_an_optimizer_goes_on(size):
    layer = dense()
    variable, layer.input_spec = layer.kernel, None
    optimizer = keras.optimizers.AdamW(0.1)
    optimizer.exclude_from_weight_decay([variable])
    optimizer.build([variable, layer.bias])
    value = np.arange(3.0 * size, dtype="float32").reshape(size, 3)
    held = layer(np.ones((1, 2), "float32"))  # on PyTorch a graph that knows the old shape
    for slot in keras_seam.optimizer_slots(optimizer)[id(variable)]:
        keras_seam.give_value(slot[1], np.zeros((size, 3), "float32"))
    keras_seam.give_value(variable, value)
    keras_seam.recognize_variables(optimizer)
    assert layer.kernel is variable and tuple(variable.shape) == (size, 3)
    assert np.array_equal(keras.ops.convert_to_numpy(variable), value)
    assert np.array_equal(keras.ops.convert_to_numpy(layer(np.ones((1, size), "float32"))), value.sum(0)[None])
    optimizer.apply([keras.ops.ones((size, 3)), keras.ops.zeros(3)])
    assert not np.array_equal(keras.ops.convert_to_numpy(variable), value)
    if keras.backend.backend() == "torch":
        layer(np.ones((1, size), "float32")).sum().backward()
        assert tuple(variable.value.grad.shape) == (size, 3) and held.grad_fn is not None
    assert keras_seam.is_excluded_from_decay(optimizer, variable)
    assert not keras_seam.is_excluded_from_decay(optimizer, layer.bias)
    if keras.backend.backend() == "torch":
        assert {tuple(p.shape) for p in layer.parameters()} == {(size, 3), (3,)}


def test_the_shapes_a_layer_was_built_for_can_be_changed():
    layer = dense()
    model_of(layer)
    assert layer.get_build_config()["input_shape"] == (None, 2)
    keras_seam.set_build_shapes(layer, {"input_shape": (None, 5)})
    assert layer.get_build_config()["input_shape"] == (None, 5)
    assert keras_seam.build_shapes(layer) == {"input_shape": (None, 5)}


def test_the_shapes_in_a_graph_are_worked_out_again():
    inner = keras.Sequential([keras.Input((2,)), first := keras.layers.Dense(3), keras.layers.Activation("tanh")])
    x = keras.Input((2,))
    model = keras.Model(x, keras.layers.Activation("relu")(inner(x)))
    first.units, undo = 5, []
    keras_seam.infer_graph(model, undo)
    assert model.output_shape == inner.output_shape == (None, 5)
    for step in reversed(undo):
        step()
    assert model.output_shape == inner.output_shape == (None, 3)


# --------------------------------------------------------------------------- notes and values of files


class Noting(keras.layers.Layer):
    """Writes a note beside its variable, and reads as Keras does."""

    def build(self, shape):
        self.w = self.add_weight(name="w", shape=(3,), initializer="zeros")

    def call(self, x):
        return x

    def save_own_variables(self, store):
        notes = keras_seam.entry_notes(store)
        if notes is not None:
            notes["note"] = "x" * 200_000  # more than an HDF5 header holds
        super().save_own_variables(store)


@pytest.mark.parametrize("file", ["m.keras", "m.weights.h5", "m.weights.json"])
def test_a_note_beside_an_entry_is_in_the_file_and_keras_ignores_it(file, tmp_path):
    model = keras.Sequential([keras.Input((3,)), Noting()])
    path = tmp_path / file
    if file.endswith("json"):
        model.save_weights(path, max_shard_size=1)
    else:
        (model.save if file.endswith("keras") else model.save_weights)(path)
    model.layers[0].w.assign([1.0, 2.0, 3.0])
    model.load_weights(path)
    assert keras.ops.convert_to_numpy(model.layers[0].w).tolist() == [0, 0, 0]
    stored = path
    if file.endswith("keras"):
        with zipfile.ZipFile(path) as archive:
            stored = io.BytesIO(archive.read("model.weights.h5"))
    elif file.endswith("json"):
        stored = next(tmp_path.glob("*.h5"))
    with h5py.File(stored) as opened:
        assert opened["layers/noting/vars"].attrs["note"] == "x" * 200_000


def test_stores_without_a_place_for_notes_have_none():
    assert keras_seam.entry_notes({}) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "bool"])
@pytest.mark.parametrize("kind", ["own", "read_only", "turned"])
def test_an_array_is_written_to_a_variable(kind, dtype):
    value = np.arange(6).reshape(2, 3).astype(getattr(ml_dtypes, dtype, dtype))
    variable = keras.Variable(np.zeros((2, 3)), dtype=dtype, trainable="float" in dtype)
    array = np.array(value.T).T if kind == "turned" else value.copy()
    if kind == "read_only":
        array.flags.writeable = False
    keras_seam.write(variable, array)
    if kind == "own":
        array[...] = 0  # the variable has a copy
    assert np.array_equal(np.asarray(keras_seam.on_host(keras_seam.plain_tensor(variable.value))), value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(3001, 1000), (1, 3_000_000), (3, 100), (0, 4), ()], ids=str)
def test_rows_are_written_to_a_variable(shape, dtype):
    value = np.random.default_rng(0).integers(0, 99, shape).astype(getattr(ml_dtypes, dtype, dtype))
    variable = keras.Variable(np.zeros(shape), dtype=dtype, trainable="float" in dtype)
    keras_seam.write_rows(variable, value.dtype, rows_of(value))
    found = np.asarray(keras_seam.on_host(keras_seam.plain_tensor(variable.value)))
    assert found.dtype == value.dtype and np.array_equal(found, value)


def rows_of(value):
    def rows(array, first):
        array[...] = value[first : first + len(array)] if value.ndim else value

    return rows


def test_who_has_the_value_of_a_variable_keeps_it_where_values_are_immutable():
    value = np.ones((1000, 1000), "float32")
    first, second = keras.Variable(np.zeros_like(value)), keras.Variable(np.zeros_like(value))
    second.assign(first.value)
    seen = keras.ops.convert_to_numpy(first.value).copy()
    held = keras_seam.raw_value(first)
    keras_seam.write_rows(first, value.dtype, rows_of(value))
    assert np.array_equal(keras.ops.convert_to_numpy(first.value), value)
    assert np.array_equal(keras.ops.convert_to_numpy(second.value), seen)
    if keras.backend.backend() == "jax":
        assert np.array_equal(np.asarray(held), seen)


def test_rows_that_cannot_be_read_leave_a_variable_that_can_be():
    variable = keras.Variable(np.zeros((3000, 1000), "float32"))

    def rows(array, first):
        if first:
            raise OSError
        array[...] = 1

    if keras.backend.backend() != "jax":  # which alone reads some of them at a time
        rows = raising
    with pytest.raises(OSError):
        keras_seam.write_rows(variable, np.dtype("float32"), rows)
    assert set(np.unique(keras.ops.convert_to_numpy(variable.value))) <= {0.0, 1.0}


def raising(array, first):
    raise OSError


def test_a_snapshot_sees_rows_that_are_written():
    variable = keras.Variable(np.zeros((1000, 1000), "float32"))
    before = keras_seam.snapshot(keras_seam.raw_value(variable))
    keras_seam.write_rows(variable, np.dtype("float32"), rows_of(np.ones((1000, 1000), "float32")))
    assert not keras_seam.is_same_snapshot(before, keras_seam.snapshot(keras_seam.raw_value(variable)))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="the others have no such mode")
def test_reading_a_variable_copies_nothing_after_rows_were_written():
    variable = keras.Variable(np.zeros((1000, 1000), "float32"))
    value = np.ones((1000, 1000), "float32")
    keras_seam.write_rows(variable, value.dtype, rows_of(value))
    one, two = (keras_seam.on_host(variable._value) for _ in range(2))
    assert one.ctypes.data == two.ctypes.data
    seen = one.copy()
    variable.assign_add(value)
    assert np.array_equal(one, seen) and np.array_equal(keras_seam.on_host(variable._value), 2 * value)


def test_a_value_is_known_to_be_what_a_variable_stores():
    first, second = keras.Variable(np.zeros((2, 3), "float32")), keras.Variable(np.zeros((2, 3), "float32"))
    assert keras_seam.is_stored_in(first._value, first)
    assert not keras_seam.is_stored_in(second._value, first)
    assert not keras_seam.is_stored_in(np.zeros((2, 3), "float32"), first)
    if keras.backend.backend() == "torch":
        assert keras_seam.is_stored_in(keras_seam.on_host(first._value), first)
        assert not keras_seam.is_stored_in(keras_seam.on_host(second._value), first)


def test_a_large_array_is_written_whole():
    value = np.random.default_rng(0).normal(size=(5001, 1001)).astype("float32")
    variable = keras.Variable(np.zeros_like(value))
    keras_seam.write(variable, value)
    assert np.array_equal(keras.ops.convert_to_numpy(variable.value), value)


# --------------------------------------------------------------------------- what a check looks at


@pytest.mark.parametrize("kind", ["functional", "sequential"])
def test_the_calls_of_a_graph_are_listed_with_their_arguments(kind):
    layer, array = dense(), np.ones(3, "float32")
    if kind == "sequential":
        ((called, args, kwargs),) = keras_seam.calls_in_graph(model_of(layer))
        assert called is layer and len(args) == 1 and kwargs == {}
        assert keras_seam.graph_outputs(model_of(layer)) == [layer]
        return
    x = keras.Input((2,))
    y = keras.ops.multiply(layer(x), array)
    calls = keras_seam.calls_in_graph(keras.Model(x, y))
    assert calls[0][0] is layer and len(calls) == 2
    assert any(value is array for value in calls[1][1])
    assert keras_seam.graph_outputs(keras.Model(x, [y, layer(x)])) == [calls[1][0], layer]
    assert keras_seam.calls_in_graph(layer) == [] == keras_seam.graph_outputs(layer)
    assert keras_seam.calls_in_graph(keras.Sequential([dense()])) == []


def test_own_attributes_leave_out_what_every_layer_and_every_compiled_model_has():
    class Mine(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.mine = 3

        def call(self, x):
            return x

    assert [name for name, _ in keras_seam.own_attributes(Mine()) if name not in ("build", "quantize")] == ["mine"]
    model = model_of(dense())
    before = {name for name, _ in keras_seam.own_attributes(model)}
    model.compile("adam", "mse")
    x = np.ones((2, 2), "float32")
    model.fit(x, np.ones((2, 3), "float32"), verbose=0)
    model.predict(x, verbose=0)
    model.evaluate(x, np.ones((2, 3), "float32"), verbose=0)
    assert {name for name, _ in keras_seam.own_attributes(model)} == before


def test_naming_what_layers_have_in_common_counts_no_layer():
    keras_seam.layers._common_attributes.cache_clear()
    keras.backend.clear_session()
    keras_seam.own_attributes(dense())
    assert keras.layers.Layer().name == "layer"


@pytest.mark.parametrize("scaled", [False, True])
def test_an_optimizer_names_the_variables_that_it_was_built_with_as_often_as_it_was_given_them(scaled):
    layer, optimizer = dense(), keras.optimizers.Adam()
    optimizer = keras.optimizers.LossScaleOptimizer(optimizer) if scaled else optimizer
    assert keras_seam.optimized_variables(optimizer) == []
    optimizer.build([layer.kernel, layer.bias, layer.kernel])
    found = keras_seam.optimized_variables(optimizer)
    assert [id(v) for v in found] == [id(v) for v in (layer.kernel, layer.bias, layer.kernel)]


def test_what_is_excluded_from_weight_decay_is_known():
    layer, optimizer = dense(), keras.optimizers.AdamW()
    assert keras_seam.decay_pattern(optimizer) is None
    assert not keras_seam.is_excluded_from_decay(optimizer, layer.bias)
    optimizer.exclude_from_weight_decay(var_list=[layer.bias], var_names=["kern", "gamma"])
    pattern = keras_seam.decay_pattern(optimizer)
    assert pattern.search("a/kernel") and not pattern.search("bias")
    assert keras_seam.is_excluded_from_decay(optimizer, layer.bias)
    assert not keras_seam.is_excluded_from_decay(optimizer, layer.kernel)


def test_the_layout_map_in_force_is_found():
    assert keras_seam.layout_map() is None and keras_seam.layout_argument((None, "model")) == {}
    if keras.backend.backend() != "jax":
        return
    with _on_one_device({"head/kernel": (None, "model")}) as mesh:
        assert list(keras_seam.layout_map()) == ["head/kernel"]
        assert tuple(keras_seam.layout_argument((None, "model"))["layout"].spec) == (None, "model")
        assert keras_seam.mesh_sizes(mesh) == {"model": 1}
    assert keras_seam.layout_map() is None


@contextlib.contextmanager
def _on_one_device(layouts):
    """A distribution over a mesh of one device, on the backend that has any."""
    mesh = keras.distribution.DeviceMesh((1,), ["model"], keras.distribution.list_devices()[:1])
    found = keras.distribution.LayoutMap(mesh)
    for key, spec in layouts.items():
        found[key] = spec
    keras.distribution.set_distribution(keras.distribution.ModelParallel(layout_map=found))
    try:
        yield mesh
    finally:
        keras.distribution.set_distribution(None)


def test_a_variable_is_laid_out_as_it_is_made_and_afterwards():
    plain = keras.Variable(np.ones((4, 2)))
    assert keras_seam.layout_of(plain) is None and keras_seam.devices_of(plain) is None
    assert keras_seam.is_all_here(plain) and keras_seam.lies_as(plain) is None
    if keras.backend.backend() != "jax":
        return
    with _on_one_device({"a": ("model", None)}) as mesh:
        named, other = keras.Variable(np.ones((4, 2)), name="a"), keras.Variable(np.ones((4, 2)), name="b")
        given = keras.Variable(np.ones((4, 2)), name="c", **keras_seam.layout_argument((None, "model")))
        assert keras_seam.layout_of(named) == ("model", None)
        assert keras_seam.layout_of(other) == (None, None) and keras_seam.devices_of(other) == {"model": 1}
        assert keras_seam.layout_of(given) == (None, "model")
        assert keras_seam.lay_out(other, (None, "model"), mesh) and not keras_seam.lay_out(other, (None, "model"), mesh)
        assert keras_seam.layout_of(other) == (None, "model") and keras_seam.is_all_here(other)
        keras_seam.give_value(other, np.zeros((4, 6), "float32"))
        assert keras_seam.layout_of(other) == (None, "model") and other.numpy().shape == tuple(other.shape) == (4, 6)
        optimizer = keras.optimizers.SGD(momentum=0.9)
        optimizer.build([given])
        assert [keras_seam.layout_of(slot) for slot in optimizer.variables if slot.shape] == [(None, "model")]


def test_what_is_made_as_if_not_leaves_no_trace():
    first = keras.layers.Dense(3)
    keras.utils.set_random_seed(3)
    with keras_seam.as_if_not_made():
        keras.layers.Dense(3).build((None, 4))
        keras.layers.Embedding(3, 4)
    second = keras.layers.Dense(3)
    second.build((None, 4))
    number = int(first.name.partition("_")[2] or 0)
    assert second.name == f"dense_{number + 1}"
    keras.utils.set_random_seed(3)
    third = keras.layers.Dense(3)
    third.build((None, 4))
    np.testing.assert_array_equal(second.get_weights()[0], third.get_weights()[0])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_an_array_on_the_host_has_the_values_and_the_memory_of_a_variable(dtype):
    variable = keras.Variable(np.arange(6).reshape(2, 3), dtype=dtype, trainable="float" in dtype)
    array = keras_seam.on_host(keras_seam.stored_value(variable))
    assert array.dtype.name == dtype and array.shape == (2, 3)
    np.testing.assert_array_equal(array.astype("float32"), np.arange(6).reshape(2, 3))
    again = keras_seam.on_host(keras_seam.stored_value(variable))
    assert np.shares_memory(array, again)


def test_a_tensor_of_a_trace_is_not_concrete():
    seen = []

    def function(x):
        seen.append(keras_seam.is_concrete(x))
        return x

    tensor = keras.ops.ones((2,))
    assert keras_seam.is_concrete(tensor)
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        jax.jit(function)(tensor)
        donated = jax.numpy.ones((3,)) + 1
        donated.delete()
        assert not keras_seam.is_concrete(donated)
    elif backend == "tensorflow":
        import tensorflow as tf

        tf.function(function)(tensor)
    else:
        import torch

        function(torch.ones(2, device="meta"))
    assert seen == [False]


def test_what_is_saved_is_listed_in_a_stateless_scope_too():
    model = model_of(dense())
    model.compile("adam", "mse")
    model.fit(np.ones((2, 2)), np.ones((2, 3)), verbose=0)
    places = [place for place, _ in keras_seam.saved_objects(model)]
    assert "optimizer" in places
    with keras.StatelessScope() as scope:
        assert [place for place, _ in keras_seam.saved_objects(model)] == places
        assert keras.src.backend.get_stateless_scope() is scope


def built(units=700):
    layer = keras.layers.Dense(units)
    layer.build((None, 600))
    return keras.ops.convert_to_numpy(layer.kernel)


def test_large_random_starts_are_left_out_in_one_thread_and_known():
    before = dict(vars(keras_seam.Variable))
    with keras_seam.random_starts_left_out(1 << 20) as left_out, ThreadPoolExecutor(1) as other:
        layer, assigned = keras.layers.Dense(700), keras.layers.Dense(700)
        for each in (layer, assigned):
            each.build((None, 600))
            assert not keras.ops.convert_to_numpy(each.kernel).any()
        assigned.kernel.assign(np.zeros((600, 700)))
        assert built(3).any() and other.submit(built).result().any()
        with keras_seam.random_starts_left_out(1 << 20) as inner:
            kept = keras.layers.Dense(700)
            kept.build((None, 600))
        ((known, _),) = inner
        assert known() is kept.kernel
        assert not built().any()
        gc.collect()  # nobody has that one any more
    ((known, start),) = left_out
    assert known() is layer.kernel
    start = keras.ops.convert_to_numpy(start())
    assert start.shape == (600, 700) and start.std() > 0.01
    assert dict(vars(keras_seam.Variable)) == before
    assert built().any()


class Around(keras.layers.Dense):
    """A layer of one's own with one of Keras's in it."""

    def build(self, shape):
        super().build(shape)
        self.inner = keras.layers.Dense(700, kernel_initializer=self.kernel_initializer)
        self.inner.build(shape)


def test_starts_that_layers_of_keras_seed_are_left_out():
    with keras_seam.random_starts_left_out(1 << 20) as left_out:
        attention = keras.layers.MultiHeadAttention(10, 60)
        attention.build((None, 3, 600), (None, 3, 600))
    assert len(left_out) == 4
    assert not keras.ops.convert_to_numpy(attention._query_dense.kernel).any()


def test_random_starts_are_drawn_again_after_a_failure_and_where_seeds_come_in_turn():
    before = dict(vars(keras_seam.Variable))
    with pytest.raises(ZeroDivisionError), keras_seam.random_starts_left_out(1 << 20):
        1 / 0  # noqa: B018
    assert dict(vars(keras_seam.Variable)) == before and built().any()
    with keras_seam.random_starts_left_out(1 << 20) as left_out:
        generator = keras.random.SeedGenerator(1)
        layer = keras.layers.Dense(700, kernel_initializer=keras.initializers.RandomNormal(seed=generator))
        layer.build((None, 600))
        own = Around(700, kernel_initializer=keras.initializers.RandomNormal(seed=1))
        own.build((None, 600))
        zeros = keras.layers.Dense(700, kernel_initializer="zeros")
        zeros.build((None, 600))
    assert keras.ops.convert_to_numpy(layer.kernel).any()
    assert keras.ops.convert_to_numpy(own.kernel).any() and keras.ops.convert_to_numpy(own.inner.kernel).any()
    assert left_out == []


# --------------------------------------------------------------------------- exporting


def test_the_signature_of_a_model_is_its_positional_arguments():
    x, y = keras.Input((2,), name="x"), keras.Input((2,), dtype="int32", name="y")
    model = keras.Model({"x": x, "y": y}, keras.layers.Dense(3)(keras.layers.Concatenate()([x, y])))
    (found,) = keras_seam.input_signature(model)
    assert {name: (spec.shape, spec.dtype, spec.name) for name, spec in found.items()} == {
        "x": ((None, 2), "float32", "x"),
        "y": ((None, 2), "int32", "y"),
    }
    (spec,) = keras_seam.input_signature(model_of(dense()))
    assert (spec.shape, spec.dtype) == ((None, 2), "float32")


def test_a_model_that_nobody_called_has_no_signature():
    class Uncalled(keras.Model):
        pass

    with pytest.raises((ValueError, TypeError)):
        keras_seam.input_signature(Uncalled())


def test_a_spec_is_made_of_a_spec_and_of_a_tensor():
    spec = keras.InputSpec(shape=(3, 2), dtype="float32")
    assert keras_seam.input_spec(spec) is spec
    made = keras_seam.input_spec(keras.KerasTensor((3, 2), dtype="int32"))
    assert (made.shape[1:], made.dtype) == ((2,), "int32")


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="Keras needs torch_xla for it")
@pytest.mark.filterwarnings("ignore")  # of TensorFlow's
def test_an_archive_stores_each_variable_once(tmp_path):
    import tensorflow as tf

    model = model_of(dense())
    archive = keras.export.ExportArchive()
    archive.track_and_add_endpoint("serve", model, keras_seam.input_signature(model))
    keras_seam.store_each_variable_once(archive)
    archive.write_out(str(tmp_path / "model"), verbose=False)
    found = tf.train.list_variables(str(tmp_path / "model/variables/variables"))
    assert sorted(tuple(shape) for name, shape in found if "VARIABLE" in name) == [(2, 3), (3,)]
    loaded = tf.saved_model.load(str(tmp_path / "model"))
    x = np.ones((4, 2), "float32")
    np.testing.assert_allclose(loaded.serve(x), keras.ops.convert_to_numpy(model(x)), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="tf2onnx reads TensorFlow")
def test_tf2onnx_is_mended_for_the_numpy_of_today():
    import tf2onnx

    keras_seam.mend_tf2onnx()
    assert tf2onnx.tfonnx.rewrite_constant_fold.__module__.startswith("keras.")


# --------------------------------------------------------------------------- what is private, and another Keras

ROOT = Path(__file__).parents[1]
NEEDED_BY_EVERY_TIE = {"get_global_attribute", "name_scope", "current_path", "GLOBAL_CUSTOM_NAMES"}


@pytest.mark.spread("torch")
def test_a_private_name_that_is_gone_costs_its_feature_and_not_the_package():
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.missing_names"],
        cwd=ROOT, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    outcomes = json.loads(ran.stdout.splitlines()[-1])
    assert set(outcomes) == {*private.LOOKED_UP, *private.METHODS}
    refused = {path: found for path, found in outcomes.items() if isinstance(found, str)}
    assert {path.rpartition(".")[2] for path in refused} == NEEDED_BY_EVERY_TIE
    for path, message in refused.items():
        assert f"{private.LOOKED_UP[path]} needs {path}, which Keras {keras.__version__} does not" in message
        assert "is tested on Keras 3." in message
    assert all(difference < 1e-5 for path, difference in outcomes.items() if path not in refused)


@pytest.mark.parametrize("path", sorted(private.LOOKED_UP))
def test_every_private_name_is_there(path):
    assert not private.is_missing(private.private(path, private.LOOKED_UP[path]))


def test_what_is_missing_says_so_when_it_is_used():
    for path in ("keras.src.saving.saving_lib._no_such", "keras.src.no_such_module.name"):
        missing = private.private(path, "A feature")
        del private.LOOKED_UP[path]
        assert private.is_missing(missing) and not hasattr(missing, "__code__")
        for use in (missing, lambda missing=missing: missing.attribute):
            with pytest.raises(
                tether.TetherError, match=rf"A feature needs {re.escape(path)}.*tested on Keras 3\.13 to"
            ):
                use()
    missing = private.private_method(keras.Layer, "_no_such", "A feature")
    del private.METHODS["_no_such"]
    with pytest.raises(tether.TetherError, match=r"A feature needs Layer\._no_such"):
        missing()


def test_private_methods_of_classes_are_there():
    of_torch = {"_track_variables"} if keras.backend.backend() == "torch" else set()
    assert set(private.METHODS) == {
        "_flatten_layers", "_initialize_with_initializer", "_unpickle_model", *of_torch,
    }  # fmt: skip
    assert all(callable(getattr(cls, name)) for name, cls in private.METHODS.items())


def test_without_the_method_by_which_variables_start_they_start_as_ever(monkeypatch):
    from tether.keras_seam import memory

    monkeypatch.setattr(memory, "_method", private.private_method(keras.Variable, "_no_such", "A start"))
    del private.METHODS["_no_such"]
    with keras_seam.random_starts_left_out(larger_than=0) as left_out:
        layer = dense()
    assert left_out == [] and np.any(keras.ops.convert_to_numpy(layer.kernel))


@pytest.mark.parametrize("version", ["3.12.9", "3.16.0.dev2026102704", "4.0", "unknown"])
def test_an_untested_keras_gets_a_warning_with_the_versions(version):
    with pytest.warns(UserWarning, match=rf"Keras {re.escape(version)} is installed.*tested on Keras 3\.13 to 3\."):
        private.warn_of_an_untested_keras(version)


@pytest.mark.parametrize("version", ["3.13.0", "3.14.1", "3.15.99"])
def test_a_tested_keras_gets_none(version):
    private.warn_of_an_untested_keras(version)


def test_the_oldest_and_the_newest_keras_are_those_that_the_tests_run_on():
    oldest = re.search(r"^OLDEST_KERAS := (\d+)\.(\d+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    newest = re.search(r"^keras==(\d+)\.(\d+)", (ROOT / "requirements/test.txt").read_text(encoding="utf-8"), re.M)
    assert tuple(map(int, oldest.groups())) == private.OLDEST
    assert tuple(map(int, newest.groups())) == private.NEWEST


def test_tether_defines_no_private_method_of_keras_again_but_those_that_are_listed():
    for module in pkgutil.walk_packages(tether.__path__, "tether."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    kinds = (keras.layers.Dense, keras.layers.LSTMCell, keras.layers.Embedding)
    tied = [tether.layers.tying.tied.tied_class(kind) for kind in kinds]
    tied.append(type(tether.adapters.learning_rates("adam")))
    found = set()
    for cls in {
        *tied,
        *below(keras_seam.KerasSaveable),
        *below(keras.Variable),
        *below(keras.initializers.Initializer),
        type("Sharded", (ShardedVariable, keras.Variable), {}),  # PyTorch's alone, made where a model is sharded
    }:
        mine = [base for base in cls.__mro__ if base.__module__.startswith("tether.")]
        theirs = [base for base in cls.__mro__ if base.__module__.startswith("keras.")]
        for name in {name for base in mine for name in vars(base) if re.fullmatch(r"_(?!tether)[a-z]\w*", name)}:
            if any(name in vars(base) for base in theirs):
                found.add(name)
    # Sub-layers and layouts are attributes of Keras's instances, and hidden methods are those of another backend.
    hidden = {"_layers", "_layout", "_trackable_children", "_parallel_update_step", "_default_save_signature"}
    assert found | hidden == set(private.OVERRIDDEN)


def below(cls):
    children = type.__subclasses__(cls)
    return {*children, *(found for child in children for found in below(child))}


def test_the_losses_of_a_model_ask_each_layer_for_its_own(spied):
    model = model_of(Spy(3))
    Spy.seen = []
    assert model.losses == [] and len(heard("losses")) == 1


def test_a_layer_keeps_its_sublayers_in_the_attribute_that_a_weight_watches():
    layer = keras.layers.Layer()
    layer.inner = keras.layers.Dense(2)
    assert vars(layer)["_layers"] == [layer.inner]


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="the others have no checkpoints of their own")
def test_a_checkpoint_of_tensorflow_asks_a_layer_for_what_is_in_it(tmp_path):
    import tensorflow as tf

    asked = []

    class Asked(keras.layers.Dense):
        def _trackable_children(self, *args, **kwargs):
            asked.append(self)
            return super()._trackable_children(*args, **kwargs)

    layer = Asked(2)
    layer.build((None, 2))
    tf.train.Checkpoint(layer=layer).write(str(tmp_path / "checkpoint"))
    assert layer in asked


def test_classes_without_a_public_name_are_found_by_those_that_have_one():
    saveable = keras_seam.KerasSaveable
    for kind in (keras.Layer, keras.Loss, keras.Metric, keras.Optimizer):
        assert issubclass(kind, saveable)
    assert saveable.__name__ == "KerasSaveable" and not issubclass(keras.Variable, saveable)
    x = keras.Input((2,))
    assert (
        type(keras.Model(x, keras.layers.Dense(1)(x))) is keras_seam.Functional
        and keras_seam.Functional.__name__ == "Functional"
    )
    assert not isinstance(keras.Sequential(), keras_seam.Functional)
    from tether.keras_seam.private import RandomInitializer

    drawing = (keras.initializers.GlorotUniform, keras.initializers.Orthogonal, keras.initializers.TruncatedNormal)
    assert all(issubclass(kind, RandomInitializer) for kind in drawing)
    assert not issubclass(keras.initializers.Zeros, RandomInitializer)
    assert type(keras.layers.Dense(2).add_weight(shape=(1,))) is keras_seam.Variable


def test_automatic_names_are_made_of_classes_as_keras_makes_them():
    from tether.keras_seam.private import to_snake_case

    for name in ("Dense", "LSTMCell", "Conv2DTranspose", "RMSNormalization", "My_Layer", "ABTest2D"):
        made = type(name, (keras.layers.Layer,), {})().name
        assert re.fullmatch(rf"{to_snake_case(name)}(_\d+)?", made), (name, made)


def test_an_error_in_a_traced_function_comes_out_as_it_is():
    def wrong(x):
        raise tether.TetherError("as it is")

    with pytest.raises(tether.TetherError, match=r"^as it is"):
        keras_seam.trace(wrong, keras.KerasTensor((2,)))


@pytest.mark.parametrize(
    "shapes", [((3, 2), (3, 4), (4, 2)), ((5, 3, 2), (5, 3, 4), (4, 2)), ((2,), (3, 4), (4, 2))], ids=str
)
def test_a_sum_with_a_product_is_what_both_give_apart(rng, shapes):
    y, a, b = (rng.normal(size=shape).astype("float32") for shape in shapes)
    found = keras_seam.add_product(*map(keras.ops.convert_to_tensor, (y, a, b)))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(found), y + a @ b, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (1,)], ids=str)
def test_entries_are_in_the_axes_of_their_numbers(rng, shape):
    table, numbers = rng.normal(size=(5, 2, 3)).astype("float32"), rng.integers(0, 5, shape).astype("int32")
    found = keras_seam.entries(keras.ops.convert_to_tensor(table), keras.ops.convert_to_tensor(numbers))
    assert tuple(found.shape) == (*shape, 2, 3)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(found), table[numbers])


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="only JAX lays variables out over devices")
def test_a_variable_finds_its_layout_before_it_has_a_value():
    distribution = keras.distribution.DataParallel(devices=keras.distribution.list_devices("cpu")[:1])
    with distribution.scope():
        variable = keras.Variable("zeros", shape=(2, 2))
        variable._layout = None
        variable._initialize_layout()
    assert variable._layout is not None
    assert keras_seam.sharding_of(variable) is None  # of one device there are no parts


def test_a_tensor_of_the_processor_is_in_memory():
    assert keras_seam.is_in_memory(keras.ops.convert_to_tensor([0, 1]))


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="PyTorch has a device without values")
def test_a_tensor_of_another_device_is_not_in_memory():
    import torch

    assert not keras_seam.is_in_memory(torch.zeros(2, device="meta"))


def test_what_an_object_writes_of_its_own_is_known_by_key():
    optimizer = keras.optimizers.SGD(momentum=0.5)
    optimizer.build([keras.Variable(np.ones((2, 3)), name="w")])
    found = keras_seam.own_values(optimizer)
    assert [tuple(np.shape(value)) for value in found.values()] == [tuple(v.shape) for v in optimizer.variables]
    assert not keras_seam.has_own_saving(optimizer)


# --------------------------------------------------------------------------- engines


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="FSDP2 is PyTorch's")
def test_a_variable_and_every_list_follow_another_parameter():
    import torch

    layer = dense()
    model = model_of(layer)
    (kernel,) = (variable for variable in layer.variables if variable.name == "kernel")
    places = keras_seam.listings([kernel], model)[id(kernel)]
    assert {id(module) for module, _ in places} >= {id(layer), id(model)}
    other = torch.nn.Parameter(keras_seam.parameter_of(kernel).detach() + 1)
    keras_seam.point(kernel, other, places)
    assert kernel.value is other and keras_seam.stray_parameters(model) == []
    assert all(any(one is other for one in module.parameters()) for module in (layer, model))
    keras_seam.point(kernel, torch.nn.Parameter(other.detach() + 1), [])
    assert [variable for _, variable in keras_seam.stray_parameters(model)] == [kernel]


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="FSDP2 is PyTorch's")
def test_an_optimizer_asks_a_variable_for_its_layout_before_each_slot():
    asked = []

    class Asked(keras.Variable):
        @property
        def _layout(self):
            asked.append(sys._getframe(1).f_code)
            return "layout"

    variable = keras.Variable(np.ones((2, 2)))
    variable.__class__ = Asked
    optimizer = keras.optimizers.Adam()
    optimizer.build([variable])
    assert len(asked) == 2 and set(asked) == {keras_seam.sharding._ADD_SLOT}
    slots = [slot for slot in optimizer.variables if tuple(slot.shape) == (2, 2)]
    assert len(slots) == 2
    keeps = hasattr(slots[0], "_layout")  # since Keras 3.14; before, the lists of slots are looked through
    assert [getattr(slot, "_layout", None) for slot in slots] == ["layout" if keeps else None] * 2
    lists = [value for name, value in vars(optimizer).items() if isinstance(value, list) and name != "_variables"]
    assert [len(value) for value in lists if any(value and value[0] is slot for slot in slots)] == [1, 1]


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="FSDP2 is PyTorch's")
def test_a_call_that_computes_shapes_is_told_from_one_that_computes_values():
    found = []

    class Told(keras.layers.Layer):
        def call(self, x):
            found.append(keras_seam.computes((x,)))
            return x

    Told()(keras.Input((2,)))
    keras.Model(inputs := keras.Input((2,)), Told()(inputs))(np.ones((1, 2), "float32"))
    with keras.StatelessScope():
        Told()(np.ones((1, 2), "float32"))
    assert found[-2:] == [True, False] and not any(found[:-2])
    assert not keras_seam.computes((keras.Input((2,)),))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="strategies are TensorFlow's")
def test_the_strategy_of_a_variable_is_known():
    import tensorflow as tf

    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        inside = dense()
        keras_seam.refuse_outside([inside])
    assert all(keras_seam.strategy_of(variable) is strategy for variable in inside.variables)
    assert keras_seam.strategy_of(dense().kernel) is None
    with pytest.raises(tether.errors.Unsupported, match=r"MirroredStrategy.*strategy\.scope\(\)"):
        keras_seam.refuse_outside([inside])
    keras_seam.refuse_outside([dense()])
    with pytest.raises(tether.errors.Unsupported, match="Nothing was changed"):
        keras_seam.refuse_mixed([keras.Sequential([keras.Input((2,)), inside, keras.layers.Dense(2)])])
    keras_seam.refuse_mixed([inside, dense()])
