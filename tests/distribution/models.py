"""Models for several devices, and what is asked of how they lie there."""

import contextlib
import math
import re

import jax
import keras
import numpy as np

import tether

D, layers = keras.distribution, keras.layers
SIZES = {"f64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s8": 1, "u8": 1, "pred": 1}
_COLLECTIVE = re.compile(
    r"= (\(?[^=]*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)


def mesh_of(*shape):
    """A mesh of these sizes: one axis for the batch and one for the model."""
    count = math.prod(shape)
    return D.DeviceMesh(shape, ["batch", "model"], D.list_devices("cpu")[:count])


def plain_map(mesh, layouts):
    """A layout map as people write it by hand."""
    found = D.LayoutMap(mesh)
    for key, spec in layouts.items():
        found[key] = spec
    return found


def scope(layouts):
    """The scope in which variables are made as a map says."""
    return D.ModelParallel(layout_map=layouts, batch_dim_name="batch").scope()


def local(variable):
    """The shape of the part of a variable that is on the first device."""
    return tuple(variable.value.addressable_shards[0].data.shape)


def shards(model):
    """The shape on one device of each variable of a model, by path."""
    return {variable.path: local(variable) for variable in model.weights}


def bytes_here(variables):
    """The bytes that variables take on the first device."""
    return sum(variable.value.addressable_shards[0].data.nbytes for variable in variables)


def seeded(seed):
    return keras.initializers.GlorotUniform(seed=seed)


def tied_pair(rows=32, columns=8, length=4):
    """A table for the tokens and, transposed, for the logits."""
    table = tether.Weight(name="table", initializer=seeded(1))
    i = keras.Input((length,), dtype="int32")
    h = tether.tie(layers.Embedding(rows, columns, name="embed"), embeddings=table)(i)
    head = layers.Dense(rows, use_bias=False, name="head")
    return keras.Model(i, tether.tie(head, kernel=table.T)(h))


def child(form, units=128, inputs=64, *, frozen=False):
    """A layer that adds a form to the kernel of another one, `up`."""
    up = layers.Dense(units, use_bias=False, name="up", kernel_initializer=seeded(2))
    up.build((None, inputs))
    up.trainable = not frozen
    return keras.Sequential([keras.Input((inputs,)), tether.inherit(up, kernel=form, name="child")])


# --------------------------------------------------------------------------- the compiled text


def collectives(text):
    """What devices tell each other in a compiled step: the kind, and the bytes of the result on one device."""
    found = []
    for line in text.splitlines():
        met = _COLLECTIVE.search(line)
        if met is not None:
            sizes = re.findall(r"(\w+)\[([\d,]*)\]", met.group(1))
            count = sum(SIZES[dtype] * math.prod(int(n) for n in size.split(",") if n) for dtype, size in sizes)
            found.append((met.group(2), count))
    return found


def step_text(model, mesh, x, y, loss=None):
    """The compiled text of the gradients of a step."""
    sharding = jax.sharding.NamedSharding(mesh.backend_mesh, jax.sharding.PartitionSpec("batch"))
    x, y = jax.device_put(x, sharding), jax.device_put(y, sharding)
    trainable = [variable.value for variable in model.trainable_variables]
    others = [variable.value for variable in model.non_trainable_variables]
    laid = [value.sharding for value in trainable]

    def of_step(trainable, others, x, y):
        def total(trainable):
            out, _ = model.stateless_call(trainable, others, x, training=True)
            return keras.ops.sum(keras.ops.square(out - y)) if loss is None else loss(out, y)

        found = jax.grad(total)(trainable)
        # As in `fit`, where what comes out of a step is laid out as what went in.
        return [jax.lax.with_sharding_constraint(each, how) for each, how in zip(found, laid, strict=True)]

    return jax.jit(of_step).lower(trainable, others, x, y).compile().as_text()


# --------------------------------------------------------------------------- training


def trained(build, data, distribution=None, *, steps=3, optimizer=None):
    """Losses of a training, the outputs after it, and the model."""
    x, y = data
    with contextlib.nullcontext() if distribution is None else distribution.scope():
        model = build()
        model.compile(optimizer() if optimizer else keras.optimizers.SGD(0.1), "mse")
        count = len(next(iter(keras.tree.flatten(x)))) // steps
        losses = model.fit(x, y, batch_size=count, epochs=1, shuffle=False, verbose=0).history["loss"]
        return losses, np.asarray(model.predict(x, batch_size=count, verbose=0)), model
