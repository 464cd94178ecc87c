"""Planted faults: a model with each, the same model without it, and what the check has to say."""

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

import tether

layers = keras.layers
FAULTS: dict[str, "Fault"] = {}
ELSEWHERE: set[str] = set()
"""The rules of which another backend has the fault."""


@dataclass
class Fault:
    """A fault of one rule.

    `make(rng, faulty)` gives the model, and data or `None`; without the fault it is clean.
    """

    rule: str
    severity: str
    where: str
    make: Any
    mends: bool
    """Whether running the finding's `mend` makes the model clean; otherwise it shows what to write in one's code."""
    backend: str | None
    """The only backend that has it."""


def fault(rule, where, severity="error", *, mends=False, backend=None):
    def register(make):
        if backend not in (None, keras.backend.backend()):
            ELSEWHERE.add(rule)
            return make
        FAULTS[make.__name__] = Fault(rule, severity, where, make, mends, backend)
        return make

    return register


def normal(rng, *shape):
    return rng.normal(size=shape).astype("float32")


def tied_pair(rng, units=6):
    """A tied autoencoder on six inputs."""
    codec = tether.Weight(normal(rng, 6, units), name="codec")
    encode = tether.tie(layers.Dense(units, name="encode"), kernel=codec)
    decode = tether.tie(layers.Dense(6, name="decode"), kernel=codec.T)
    return keras.Sequential([keras.Input((6,)), encode, decode]), codec


def trained(model, rng, optimizer=None, inputs=6, outputs=6):
    """A model that has been compiled, and has made a step."""
    model.compile(optimizer or keras.optimizers.Adam(1e-3), "mse")
    model.fit(normal(rng, 4, inputs), normal(rng, 4, outputs), batch_size=4, verbose=0)
    return model


# --------------------------------------------------------------------------- what is captured


def lambda_model(rng, function, **weights):
    x = keras.Input((4,))
    h = layers.Dense(4, name="before")(x)
    layer = tether.Lambda(function, weights, name="scaled") if weights else layers.Lambda(function, name="scaled")
    return keras.Model(x, layer(h))


@fault("captured-variable", "scaled/function")
def a_variable_in_a_closure(rng, faulty):
    if not faulty:
        return lambda_model(rng, lambda x, w: x * w, w=tether.Weight((4,), "normal", name="w")), None
    w = keras.Variable(normal(rng, 4), name="w")
    return lambda_model(rng, lambda x: x * w), None


@fault("captured-variable", "scaled/function")
def a_variable_in_a_default(rng, faulty):
    if not faulty:
        return lambda_model(rng, lambda x, w: x * w, w=tether.Weight((4,), "normal", name="w")), None

    def scaled(x, w=keras.Variable(normal(rng, 4), name="w")):  # noqa: B008
        return x * w

    return lambda_model(rng, scaled), None


GLOBAL: Any = None


@fault("captured-variable", "scaled/function")
def a_global_variable(rng, faulty):
    global GLOBAL
    if not faulty:
        return lambda_model(rng, lambda x, w: x * w, w=tether.Weight((4,), "normal", name="w")), None
    GLOBAL = keras.Variable(normal(rng, 4), name="w")
    return lambda_model(rng, lambda x: (lambda: x * GLOBAL)()), None


@fault("captured-variable", "scaled/function")
def a_layer_in_a_closure(rng, faulty):
    inner = layers.Dense(4, name="inner")
    x = keras.Input((4,))
    layer = layers.Lambda(lambda t: inner(t), name="scaled") if faulty else inner
    return keras.Model(x, layer(layers.Dense(4, name="before")(x))), None


@fault("captured-variable", "multiply_op")
def a_variable_in_an_operation(rng, faulty):
    x = keras.Input((4,))
    h = layers.Dense(4, name="before")(x)
    if faulty:
        w = keras.Variable(normal(rng, 4), name="w")
        operation = keras.ops.multiply(h, w)
        operation._keras_history.operation.name = "multiply_op"
        return keras.Model(x, operation), None
    return lambda_model(rng, lambda x, w: x * w, w=tether.Weight((4,), "normal", name="w")), None


class Box:
    """An object of a program's own, where Keras does not look."""

    def __init__(self, value):
        self.value = value


class Scaling(layers.Layer):
    """Scales by a variable that it holds in one way or another."""

    def __init__(self, hold, **kwargs):
        super().__init__(**kwargs)
        self.held = hold
        if isinstance(hold, keras.Variable):
            self.scale = hold

    def call(self, x):
        held = self.held.value if isinstance(self.held, Box) else self.held
        return x * keras.ops.convert_to_tensor(held)


@fault("captured-variable", "scaling/held")
def a_variable_in_an_object(rng, faulty):
    variable = keras.Variable(normal(rng, 4), name="scale")
    layer = Scaling(Box(variable) if faulty else variable, name="scaling")
    return keras.Sequential([keras.Input((4,)), layer]), None


class Listing(layers.Layer):
    """Holds variables in a list, set with or without Keras looking on."""

    def __init__(self, variables, tracked, **kwargs):
        super().__init__(**kwargs)
        if tracked:
            self.scales = variables
        else:
            object.__setattr__(self, "scales", variables)

    def call(self, x):
        for scale in self.scales:
            x = x * scale
        return x


@fault("captured-variable", "listing/scales")
def a_list_set_past_the_tracker(rng, faulty):
    variables = [keras.Variable(normal(rng, 4), name="scale")]
    return keras.Sequential([keras.Input((4,)), Listing(variables, not faulty, name="listing")]), None


class Reading(layers.Layer):
    """Reads an expression over a weight that it does not hold itself, or does."""

    def __init__(self, weight, hold, **kwargs):
        super().__init__(**kwargs)
        if hold:
            self.weight = weight
        self.table = weight.T

    def call(self, x):
        return keras.ops.matmul(x, self.table.value)


@fault("captured-variable", "reading/table")
def an_expression_without_its_weight(rng, faulty):
    weight = tether.Weight(normal(rng, 3, 4), name="table")
    return keras.Sequential([keras.Input((4,)), Reading(weight, not faulty, name="reading")]), None


class Transposing(layers.Layer):
    """The recipe that people copy: a transposed kernel, made in `build`. Right is a weight, read in `call`."""

    def __init__(self, encoder, of=None, **kwargs):
        super().__init__(**kwargs)
        self.weight = tether.weight_of(encoder, "kernel") if of is None else None
        self.of = of
        object.__setattr__(self, "encoder", encoder)

    def build(self, input_shape):
        if self.of is not None:
            self.kernel = self.of(self.encoder.kernel)

    def call(self, x):
        return keras.ops.matmul(x, self.weight.T.value if self.of is None else self.kernel)


def copied_recipe(rng, of):
    encoder = layers.Dense(6, name="encode")
    x = keras.Input((5,))
    return keras.Model(x, Transposing(encoder, of, name="decode")(encoder(x))), None


@fault("frozen-constant", "decode/kernel")
def a_kernel_transposed_in_build(rng, faulty):
    return copied_recipe(rng, keras.ops.transpose if faulty else None)


@fault("frozen-constant", "decode/kernel")
def a_kernel_scaled_in_build(rng, faulty):
    return copied_recipe(rng, (lambda kernel: 0.3 * keras.ops.transpose(kernel)) if faulty else None)


@fault("frozen-constant", "decode/kernel", "warning")
def an_array_made_in_build(rng, faulty):
    return copied_recipe(rng, (lambda kernel: keras.ops.convert_to_numpy(kernel).T.copy()) if faulty else None)


def tied_logits(rng, head):
    embed = layers.Embedding(9, 4, name="embed")
    x = keras.Input((3,), dtype="int32")
    h = layers.GlobalAveragePooling1D()(embed(x))
    return keras.Model(x, head(h, embed)), None


@keras.saving.register_keras_serializable(package="checking")
def logits_of(h, table):
    return keras.ops.matmul(h, keras.ops.transpose(table))


@fault("frozen-constant", "logits_op")
def a_table_transposed_in_a_graph(rng, faulty):
    def head(h, embed):
        if not faulty:
            return tether.Lambda(logits_of, table=tether.weight_of(embed, "embeddings"))(h)
        logits = keras.ops.matmul(h, keras.ops.transpose(embed.embeddings))
        logits._keras_history.operation.name = "logits_op"
        return logits

    return tied_logits(rng, head)


@fault("frozen-constant", "head/function")
def a_table_transposed_before_a_lambda(rng, faulty):
    def head(h, embed):
        if not faulty:
            return tether.Lambda(logits_of, table=tether.weight_of(embed, "embeddings"))(h)
        table = keras.ops.transpose(embed.embeddings)
        return layers.Lambda(lambda t: keras.ops.matmul(t, table), name="head")(h)

    return tied_logits(rng, head)


# --------------------------------------------------------------------------- equal weights


@fault("equal-weights", "second/kernel", "warning", mends=True)
def a_copied_kernel(rng, faulty):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(6, name="first"), layers.Dense(6, name="second")])
    first, second = model.layers
    if faulty:
        first.kernel.assign(normal(rng, 6, 6))
        second.kernel.assign(first.kernel)
    return model, None


@fault("equal-weights", "second/kernel", "warning", mends=True)
def a_transposed_copy(rng, faulty):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(4, name="first"), layers.Dense(6, name="second")])
    first, second = model.layers
    if faulty:
        first.kernel.assign(normal(rng, 6, 4))
        second.kernel.assign(keras.ops.transpose(first.kernel))
    return model, None


@fault("equal-weights", "second/kernel", "warning", mends=True)
def a_scaled_and_turned_copy_of_a_convolution(rng, faulty):
    x = keras.Input((5, 5, 2))
    first, second = layers.Conv2D(3, 2, name="first"), layers.Conv2DTranspose(2, 2, name="second")
    model = keras.Model(x, second(first(x)))
    if faulty:
        kernel = normal(rng, 2, 2, 2, 3)
        first.kernel.assign(kernel)
        second.kernel.assign(-0.7 * kernel.transpose(1, 0, 2, 3).transpose(0, 1, 3, 2).transpose(0, 1, 3, 2))
    return model, None


@fault("equal-weights", "second/kernel", "hint")
def one_seed_for_two(rng, faulty):
    starts = [keras.initializers.GlorotUniform(seed=1 if faulty else seed) for seed in (1, 2)]
    first, second = (layers.Dense(6, kernel_initializer=start) for start in starts)
    first.name, second.name = "first", "second"
    return keras.Sequential([keras.Input((6,)), first, second]), None


@fault("equal-weights", "slow/kernel", "hint")
def a_frozen_copy(rng, faulty):
    x = keras.Input((6,))
    fast, slow = layers.Dense(6, name="fast"), layers.Dense(6, name="slow")
    model = keras.Model(x, [fast(x), slow(x)])
    slow.trainable = False
    if faulty:
        fast.kernel.assign(normal(rng, 6, 6))
        slow.kernel.assign(fast.kernel)
    return model, None


# --------------------------------------------------------------------------- ties


@fault("lost-tie", "decode/kernel", mends=True)
def a_view_overwritten_by_a_tensor(rng, faulty):
    model, _ = tied_pair(rng)
    if faulty:
        model.layers[1]._kernel = keras.ops.convert_to_tensor(normal(rng, 6, 6))
    return model, None


class Holder(layers.Layer):
    """Holds a layer that is tied from outside, by a path."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = layers.Dense(6, name="inner")

    def build(self, shape):
        self.inner.build(shape)

    def call(self, x):
        return self.inner(x)


@fault("lost-tie", "holder/inner/kernel", mends=True)
def a_tied_layer_that_was_replaced(rng, faulty):
    first, holder = layers.Dense(6, name="first"), Holder(name="holder")
    model = keras.Sequential([keras.Input((6,)), first, holder])
    tether.tie(holder, {"inner/kernel": tether.weight_of(first, "kernel")})
    if faulty:
        new = layers.Dense(6, name="inner")
        new.build((None, 6))
        holder._tracker.unlock()
        holder.inner = new
        holder._layers[:] = [layer for layer in holder._layers if layer is not holder._layers[0]]
        holder._tracker.lock()
    return model, None


@fault("lost-tie", "decode/kernel")
def a_tied_layer_of_another_class(rng, faulty):
    model, _ = tied_pair(rng)
    if faulty:
        model.layers[1].__class__ = layers.Dense
    return model, None


class Parent(layers.Layer):
    """Keeps its child's kernel as an attribute, or reads it where it needs it."""

    def __init__(self, child, keep, **kwargs):
        super().__init__(**kwargs)
        self.child, self.keep = child, keep

    def build(self, shape):
        self.child.build(shape)
        if self.keep:
            self.k = self.child.kernel

    def call(self, x):
        return self.child(x) + keras.ops.sum(self.k if self.keep else self.child.kernel)


@fault("view-kept-by-parent", "parent/k")
def a_parent_that_keeps_a_view(rng, faulty):
    codec = tether.Weight(normal(rng, 6, 6), name="codec")
    child = tether.tie(layers.Dense(6, name="child"), kernel=codec)
    other = tether.tie(layers.Dense(6, name="other"), kernel=codec.T)
    return keras.Sequential([keras.Input((6,)), Parent(child, faulty, name="parent"), other]), None


@fault("dead-factors", "low/kernel", mends=True)
def two_factors_of_zero(rng, faulty):
    base = tether.Weight(normal(rng, 6, 5), name="base", trainable=False)
    a = tether.Weight((6, 2), "zeros" if faulty else "normal", name="a")
    b = tether.Weight((2, 5), "zeros", name="b")
    low = tether.tie(layers.Dense(5, name="low"), kernel=base + 0.5 * a @ b)
    return keras.Sequential([keras.Input((6,)), low]), None


@fault("dead-factors", "dense", mends=True)
def keras_lora_that_came_back_as_zeros(rng, faulty):
    dense = layers.Dense(5, name="dense")
    model = keras.Sequential([keras.Input((6,)), dense])
    dense.enable_lora(2)
    if faulty:
        dense.lora_kernel_a.assign(np.zeros((6, 2)))
    return model, None


# --------------------------------------------------------------------------- storing


@fault("orphan-variable", "second/kernel", "warning")
def an_attribute_set_to_anothers_kernel(rng, faulty):
    first, second = layers.Dense(6, name="first"), layers.Dense(6, name="second")
    model = keras.Sequential([keras.Input((6,)), first, second])
    if faulty:
        second._tracker.unlock()
        second._kernel = keras.Variable(normal(rng, 6, 6), name="new")
        second._tracker.lock()
    return model, None


class Named(layers.Layer):
    """Makes two weights, of one name or of two."""

    def __init__(self, names, **kwargs):
        super().__init__(**kwargs)
        self.names = names

    def build(self, shape):
        self.a = self.add_weight(shape=(shape[-1],), name=self.names[0], initializer="normal")
        self.b = self.add_weight(shape=(shape[-1],), name=self.names[1], initializer="normal")

    def call(self, x):
        return x * self.a + self.b


@fault("unrecorded-tie", "lstm/lstm_cell/kernel", mends=True)
def a_tie_made_on_the_cell_of_a_recurrent_layer(rng, faulty):
    x = keras.Input((4, 3))
    lstm, flat = layers.LSTM(2, name="lstm"), layers.Dense(8, use_bias=False, name="flat")
    model = keras.Model(x, [lstm(x), flat(x)])
    kernel = tether.weight_of(lstm.cell, "kernel") if faulty else tether.weight_of(lstm, "cell/kernel")
    tether.tie(flat, kernel=kernel)
    return model, None


@fault("path-used-twice", "outer/named/a", "warning")
def two_weights_of_one_name(rng, faulty):
    named = Named("aa" if faulty else "ab", name="named")
    return keras.Sequential([keras.Input((6,)), named], name="outer"), None


@fault("stored-twice", "first/kernel", mends=True)
def a_variable_in_two_layers(rng, faulty):
    first, second = layers.Dense(6, name="first"), layers.Dense(6, name="second")
    model = keras.Sequential([keras.Input((6,)), first, second])
    if faulty:
        second._untrack_variable(second._kernel)
        second._tracker.unlock()
        second._kernel = first._kernel
        second._tracker.lock()
    return model, None


# --------------------------------------------------------------------------- freezing


class Decoder(layers.Layer):
    """Holds its encoder as an attribute, or a weight of it."""

    def __init__(self, encoder, own, **kwargs):
        super().__init__(**kwargs)
        self.kernel_weight = tether.weight_of(encoder, "kernel")
        self.bias = layers.Dense(6, name="bias")
        if own:
            self.encoder = encoder

    def build(self, shape):
        self.bias.build(shape)

    def call(self, x):
        return self.bias(keras.ops.matmul(x, self.kernel_weight.T.value))


@fault("frozen-through-another", "encode", "warning", mends=True)
def an_encoder_frozen_with_the_decoder_that_holds_it(rng, faulty):
    encode = layers.Dense(6, name="encode")
    x = keras.Input((6,))
    decode = Decoder(encode, faulty, name="decode")
    model = keras.Model(x, decode(encode(x)))
    decode.trainable = False
    return model, None


@fault("frozen-through-another", "first/kernel", "warning", mends=True)
def a_variable_frozen_by_one_of_two_holders(rng, faulty):
    model, _ = a_variable_in_two_layers(rng, True)
    if not faulty:
        tether.tie(model, {"second/kernel": tether.weight_of(model, "first/kernel")})
    model.layers[1].trainable = False
    return model, None


# --------------------------------------------------------------------------- optimizers


@fault("compiled-before-tied", "optimizer", mends=True)
def a_weight_tied_after_training(rng, faulty):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(6, name="first"), layers.Dense(6, name="second")])
    if faulty:
        trained(model, rng)
    codec = tether.Weight(normal(rng, 6, 6), name="codec")
    tether.tie(model, {"first/kernel": codec, "second/kernel": codec.T})
    return model if faulty else trained(model, rng), None


@fault("compiled-before-tied", "optimizer", mends=True)
def a_weight_that_is_gone_after_training(rng, faulty):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(6, name="first"), layers.Dense(6, name="second")])
    if faulty:
        trained(model, rng)
    tether.tie(model, {"second/kernel": tether.weight_of(model, "first/kernel").T})
    return model if faulty else trained(model, rng), None


@fault("stepped-twice", "codec", mends=True)
def a_list_that_names_a_weight_twice(rng, faulty):
    model, _ = tied_pair(rng)
    encode, decode = model.layers
    variables = encode.trainable_weights + decode.trainable_weights
    model.optimizer = keras.optimizers.Adam(0.1)
    model.optimizer.build(variables if faulty else tether.inspection.unique(variables))
    return model, None


@fault("decays-frozen-use", "w", "warning", mends=True)
def a_weight_that_only_another_model_trains(rng, faulty):
    w = tether.Weight(normal(rng, 6, 6), name="w")
    tether.tie(layers.Dense(6, name="elsewhere"), kernel=w).build((None, 6))
    reads = tether.tie(layers.Dense(6, name="reads"), kernel=w.stop_gradient())
    model = keras.Sequential([keras.Input((6,)), reads, layers.Dense(6, name="own")])
    model.optimizer = keras.optimizers.AdamW(1e-3)
    if not faulty:
        model.compile(model.optimizer, "mse")
    return model, None


@fault("misfit-slot", "optimizer", "warning", mends=True)
def slots_of_another_shape(rng, faulty):
    model = trained(keras.Sequential([keras.Input((6,)), layers.Dense(6, name="dense")]), rng)
    if faulty:
        dense = model.layers[0]
        dense.kernel._shape = (6, 8)
        dense.kernel._value = keras.Variable(normal(rng, 6, 8)).value
    return model, None


def language_model(rng, table=None, embeddings_initializer="uniform"):
    embed = layers.Embedding(12, 8, name="embed", embeddings_initializer=embeddings_initializer)
    head = layers.Dense(12, name="lm_head")
    x = keras.Input((4,), dtype="int32")
    model = keras.Model(x, head(layers.LayerNormalization(name="norm")(embed(x))))
    tether.tie(head, kernel=tether.weight_of(embed, "embeddings").T)
    return model


@fault("name-misses-alias", "lm_head/kernel", "warning")
def a_decay_exclusion_by_the_name_of_a_user(rng, faulty):
    model = language_model(rng)
    optimizer = keras.optimizers.AdamW(1e-3)
    if faulty:
        optimizer.exclude_from_weight_decay(var_names=["lm_head"])
    else:
        optimizer.exclude_from_weight_decay(var_list=tether.inspection.aliases(model).find("lm_head"))
    model.compile(optimizer, "mse")
    return model, None


# --------------------------------------------------------------------------- building


class Child(layers.Dense):
    """A Dense with a gain, whose build calls its parent's or does not."""

    def __init__(self, units, calls_parent, **kwargs):
        super().__init__(units, **kwargs)
        self.calls_parent = calls_parent

    def build(self, shape):
        if self.calls_parent:
            super().build(shape)
        self.gain = self.add_weight(shape=(self.units,), name="gain", initializer="ones")


@fault("parent-not-built", "child")
def a_child_without_its_parents_build(rng, faulty):
    child = Child(4, not faulty, name="child")
    child.build((None, 3))
    return child, None


@fault("spectral-norm-over-shared", "normed")
def a_spectral_norm_over_a_shared_kernel(rng, faulty):
    first, second = layers.Dense(6, name="first"), layers.Dense(6, name="second")
    normed = layers.SpectralNormalization(first, name="normed")
    model = keras.Sequential([keras.Input((6,)), normed, second])
    if faulty:
        second._untrack_variable(second._kernel)
        object.__setattr__(second, "_kernel", first._kernel)
    return model, None


@fault("spectral-norm-over-shared", "normed")
def a_layer_called_with_and_without_spectral_norm(rng, faulty):
    x = keras.Input((6,))
    layer = layers.Dense(6, name="layer")
    normed = layers.SpectralNormalization(layer, name="normed")
    y = normed(x)
    return keras.Model(x, layer(y) if faulty else layers.Dense(6, name="other")(y)), None


@fault("quantized-beside-float", "second/kernel", "warning")
def one_of_two_copies_quantised(rng, faulty):
    first, second = layers.Dense(16, name="first"), layers.Dense(16, name="second")
    model = keras.Sequential([keras.Input((16,)), first, second])
    if faulty:
        first.kernel.assign(normal(rng, 16, 16))
        second.kernel.assign(keras.ops.transpose(first.kernel))
    second.quantize("int8")
    return model, None


# --------------------------------------------------------------------------- training


class Unused(layers.Layer):
    """Two layers, one of which a call may leave out."""

    def __init__(self, uses, **kwargs):
        super().__init__(**kwargs)
        self.one, self.two, self.uses = layers.Dense(4, name="one"), layers.Dense(4, name="two"), uses

    def build(self, shape):
        self.one.build(shape)
        self.two.build(shape)

    def call(self, x):
        y = self.two(x)
        return self.one(x) + (y if self.uses else keras.ops.stop_gradient(y))


@fault("no-gradient", "unused/two/kernel", "warning")
def a_layer_cut_off_from_the_loss(rng, faulty):
    model = keras.Sequential([keras.Input((4,)), Unused(not faulty, name="unused")])
    return model, normal(rng, 8, 4)


class Either(layers.Layer):
    """Two tied layers, of which a call may leave out the second."""

    def __init__(self, both, **kwargs):
        super().__init__(**kwargs)
        codec = tether.Weight((4, 4), "normal", name="codec")
        self.one = tether.tie(layers.Dense(4, name="one"), kernel=codec)
        self.two = tether.tie(layers.Dense(4, use_bias=False, name="two"), kernel=codec.T)
        self.both = both

    def build(self, shape):
        self.one.build(shape)
        self.two.build(shape)

    def call(self, x):
        y = self.one(x)
        return self.two(y) if self.both else y


@fault("idle-use", "either/two/kernel", "hint")
def a_tied_layer_that_is_not_called(rng, faulty):
    return keras.Sequential([keras.Input((4,)), Either(not faulty, name="either")]), normal(rng, 8, 4)


@fault("many-uses", "encode/kernel", "hint", mends=True)
def two_uses_under_plain_descent(rng, faulty):
    model, _ = tied_pair(rng)
    model.compile(keras.optimizers.SGD(0.1) if faulty else keras.optimizers.Adam(0.1), "mse")
    return model, (normal(rng, 8, 6), normal(rng, 8, 6))


@fault("many-uses", "encode/kernel", "hint", mends=True)
def two_uses_under_clipping_by_the_global_norm(rng, faulty):
    model, _ = tied_pair(rng)
    model.compile(keras.optimizers.Adam(0.1, global_clipnorm=1.0 if faulty else None), "mse")
    return model, None


@fault("wide-table", "embed/embeddings", "warning", mends=True)
def a_tied_table_of_unit_variance(rng, faulty):
    embed = layers.Embedding(
        50, 64, name="embed", embeddings_initializer=keras.initializers.RandomNormal(stddev=1.0 if faulty else 0.05)
    )
    head = layers.Dense(50, name="head")
    x = keras.Input((4,), dtype="int32")
    model = keras.Model(x, head(layers.LayerNormalization(name="norm")(embed(x))))
    tether.tie(head, kernel=tether.weight_of(embed, "embeddings").T)
    return model, rng.integers(0, 50, (8, 4)).astype("int32")


# --------------------------------------------------------------------------- engines


@fault("replaced-parameter", "dense/kernel", backend="torch")
def a_parameter_in_the_place_of_another(rng, faulty):
    import torch

    dense = layers.Dense(4, name="dense")
    inputs = keras.Input((4,))
    model = keras.Model(inputs, dense(inputs))
    if faulty:
        key = next(key for key in model.torch_params if key.endswith("dense/kernel"))
        model.torch_params[key] = torch.nn.Parameter(model.torch_params[key].detach().clone())
    return model, None


@fault("outside-strategy", "dense/kernel", backend="tensorflow")
def a_layer_made_outside_of_the_scope(rng, faulty):
    import contextlib

    import tensorflow as tf

    scope = tf.distribute.MirroredStrategy(["CPU:0"]).scope
    inputs = keras.Input((4,))
    with scope():
        hidden = layers.Dense(4, name="first")(inputs)
    with contextlib.nullcontext() if faulty else scope():
        outputs = layers.Dense(4, name="dense")(hidden)
    return keras.Model(inputs, outputs), None
