"""What two processes of PyTorch do with files, changes and findings of sharded models, and under DDP."""

import keras
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

import tether
from tests.distribution import torch_fsdp
from tests.distribution.programs import check
from tests.distribution.torch_fsdp import (
    RNG,
    WIDE,
    X,
    Y,
    close,
    glorot,
    gradients,
    half,
    language_model,
    loss_of,
    whole,
)

sharded = tether.distribution.fully_shard
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def start(folder, number):
    return folder


def raises(kind, *words):
    """Expects an error that says these words."""

    class Expected:
        def __enter__(self):
            return self

        def __exit__(self, cls, error, trace):
            assert cls is not None and issubclass(cls, kind), error
            assert all(word in str(error) for word in words), str(error)
            return True

    return Expected()


def equal(one, other):
    for a, b in zip(one.weights, other.weights, strict=True):
        assert np.array_equal(a.numpy(), b.numpy()), a.path


def outputs(model):
    with torch.no_grad():
        return whole(model(torch.as_tensor(X)))


@check
def files_hold_the_whole_values(folder):
    alone, model = language_model(), sharded(language_model())
    for one, data in ((alone, (X, Y)), (model, (half(X), half(Y)))):
        one.compile(keras.optimizers.Adam(0.1, epsilon=1e-3), LOSS)
        one.fit(*data, batch_size=len(data[0]), verbose=0)
    custom = {"Block": torch_fsdp.Block}
    path = folder / "model.keras"
    tether.files.save_model(model, path)
    dist.barrier()
    again = keras.saving.load_model(path, custom_objects=custom)
    equal(again, model)
    for mine, theirs in zip(again.optimizer.variables, model.optimizer.variables, strict=True):
        assert np.array_equal(mine.numpy(), theirs.numpy()), mine.path
    assert close(outputs(alone), outputs(model), 1e-4)
    assert np.abs(outputs(again) - outputs(model)).max() < 1e-6
    values = tether.files.save_safetensors, tether.files.load_safetensors, "model.safetensors"
    plain = (
        type(model).save_weights,
        type(model).load_weights,
        f"of_{dist.get_rank()}.weights.h5",
    )  # Keras writes in place
    for save, load, name in (values, plain):
        save(model, folder / name)
        dist.barrier()
        fresh, divided = language_model(), sharded(language_model())
        for weight in (*fresh.weights, *divided.weights):
            weight.assign(np.zeros(weight.shape, weight.dtype))
        load(fresh, folder / name)
        load(divided, folder / name)
        equal(fresh, model)
        equal(divided, model)
        assert np.abs(outputs(divided) - outputs(model)).max() < 1e-6
    dist.barrier()


@check
def values_go_in_and_out_whole(folder):
    plain, model = language_model(), sharded(language_model())
    table = tether.weight_of(plain, "embed/embeddings")
    view = model.get_layer("head").kernel
    assert np.array_equal(view.numpy(), table.numpy().T)
    assert np.array_equal(keras.ops.convert_to_numpy(model.weights[0]), table.numpy())
    with tether.distribution.gathering():
        assert np.array_equal(keras.ops.convert_to_numpy(view.value), table.numpy().T)
    for one in (plain, model):
        one.set_weights([np.full(value.shape, number, value.dtype) for number, value in enumerate(one.get_weights())])
    equal(plain, model)
    for one in (plain, model):
        one.get_layer("head").kernel.assign(np.arange(72.0).reshape(6, 12))
    equal(plain, model)
    assert model.count_params() == plain.count_params()
    report = tether.transfer.copy(sharded(language_model(3)), language_model(3))
    assert report is not None
    assert "embed" in str(tether.summary(model))
    clone = keras.models.clone_model(model)
    tether.transfer.copy(model, clone)
    equal(clone, model)


@check
def uneven_parts_and_state(folder):
    def make():
        inputs = keras.Input((5,))
        h = keras.layers.Dense(3, kernel_initializer=glorot(1), name="first")(inputs)
        h = keras.layers.BatchNormalization(name="norm")(h)
        h = tether.tie(keras.layers.Dense(1, name="one"), kernel=tether.Weight((3, 1), glorot(3)))(h)
        base = tether.Weight((1, 7), glorot(2), name="base")
        normed = tether.forms.spectral_norm(seed=1)(base)
        return keras.Model(inputs, tether.tie(keras.layers.Dense(7, name="last"), kernel=normed)(h))

    x, y = RNG.normal(size=(8, 5)).astype("float32"), RNG.normal(size=(8, 7)).astype("float32")
    _, model = torch_fsdp.same_step(make, x, y, steps=2)
    loss_of(model, half(x), half(y), training=True).backward()
    state = model.non_trainable_variables
    assert state and all(not hasattr(v.value, "full_tensor") for v in state)
    tether.files.save_safetensors(model, folder / "uneven.safetensors")
    dist.barrier()
    other = sharded(make())
    tether.files.load_safetensors(other, folder / "uneven.safetensors")
    for a, b in zip(model.trainable_variables, other.trainable_variables, strict=True):
        assert np.array_equal(a.numpy(), b.numpy())


@check
def what_trains_can_change_and_what_is_tied_cannot(folder):
    model = language_model()
    tether.adapters.add(model, "task", {"block_*/up/kernel": tether.low_rank(2, seed=1)})
    alone = keras.models.clone_model(model)
    tether.transfer.copy(model, alone)
    sharded(model)
    for one in (alone, model):
        one.get_layer("block_0").trainable = False
    for one, data in ((alone, (X, Y)), (model, (half(X), half(Y)))):
        loss_of(one, *data).backward()
    right, found = gradients(alone, by_name=True), gradients(model, by_name=True)
    assert right.keys() == found.keys()
    assert all(close(right[key], found[key], 1e-6) for key in right)
    before = outputs(model)
    with tether.adapters.disabled(model):
        assert close(before, outputs(model), 1e-6)  # it starts at zero
    with raises(tether.errors.Unsupported, "fully_shard", "Nothing was changed"):
        tether.untie(model.get_layer("head"))
    with raises(tether.errors.Unsupported, "before `tether.distribution.fully_shard(model)`"):
        tether.adapters.add(model, "other", {"block_*/down/kernel": tether.low_rank(2)})
    with raises(tether.errors.Unsupported, "block_1/norm/gamma"):
        tether.weight_of(model, "block_1/norm/gamma")
    with raises(tether.errors.Unsupported, "table"):
        table = tether.weight_of(model, "embed/embeddings")
        tether.tie(keras.layers.Dense(12, use_bias=False), kernel=table.T).build((None, 6))
    with raises(tether.errors.Unsupported, "sharded already"):
        sharded(model)
    with raises(tether.TetherError, "sharded"):
        import copy

        copy.deepcopy(model.weights[0])
    assert np.abs(outputs(model) - before).max() < 1e-6


@check
def wrong_arguments_are_refused_and_change_nothing(folder):
    model = language_model()
    with raises(tether.errors.UnknownName, "blok_*", "block_0"):
        sharded(model, groups=["blok_*"])
    with raises(tether.TetherError, "'blocks'", "groups=7"):
        sharded(model, groups=7)
    with raises(tether.TetherError, "DeviceMesh", "mesh='cpu'"):
        sharded(model, mesh="cpu")
    with raises(tether.TetherError, "build(input_shape)"):
        sharded(keras.layers.Dense(3))
    with raises(tether.TetherError, "Keras model or layer"):
        sharded(torch.nn.Linear(2, 2))
    with raises(tether.TetherError, "fully_shard"):
        tether.distribution.fsdp_module(model)
    assert not any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    recurrent = keras.Sequential([keras.Input((4, 3)), keras.layers.LSTM(2, name="lstm")])
    with raises(tether.TetherError, "many times"):
        sharded(recurrent, groups=["lstm/*"])


@check
def a_model_that_torch_sharded_is_found_out(folder):
    model = language_model()
    torch.distributed.fsdp.fully_shard(model)
    model(torch.as_tensor(X))
    found = tether.check(model).by_rule("replaced-parameter")[0]
    assert (
        found.severity == "error" and "tether.distribution.fully_shard" in found.mend and "`fully_shard`" in found.why
    )
    ours = sharded(language_model())
    assert not tether.check(ours).errors, str(tether.check(ours).errors)
    outputs(ours)
    assert not tether.check(ours).by_rule("replaced-parameter")


@check
def a_slow_copy_follows(folder):
    def trained(shard, shard_target):
        model, target = language_model(), language_model()
        model, target = (sharded(model) if shard else model), (sharded(target) if shard_target else target)
        model.compile(keras.optimizers.SGD(0.5), LOSS)
        data = (half(X), half(Y)) if shard else (X, Y)
        follow = tether.transfer.Follow(target=target, source=model, momentum=0.5)
        model.fit(*data, batch_size=len(data[0]), epochs=2, verbose=0, callbacks=[follow])
        return target

    right = trained(False, False)
    for both in (True, False):
        found = trained(True, both)
        for a, b in zip(right.weights, found.weights, strict=True):
            assert np.abs(a.numpy() - b.numpy()).max() < 1e-5


@check
def limits_on_weights_and_gradients(folder):
    optimizers = keras.optimizers

    def make():
        inputs = keras.Input((6,))
        constrained = keras.layers.Dense(6, kernel_constraint="non_neg", kernel_initializer=glorot(1))(inputs)
        last = keras.layers.Dense(6, kernel_constraint=keras.constraints.MaxNorm(0.5), kernel_initializer=glorot(2))
        return keras.Model(inputs, last(constrained))

    for optimizer in (
        lambda: optimizers.SGD(0.5),
        lambda: optimizers.SGD(0.5, clipvalue=0.01),
        lambda: optimizers.SGD(0.5, clipnorm=0.01),
        lambda: optimizers.SGD(0.5, global_clipnorm=0.01),
        lambda: optimizers.LossScaleOptimizer(optimizers.SGD(0.5)),
    ):
        alone, model = make(), make()
        tether.transfer.copy(alone, model)
        sharded(model)
        for one, data in ((alone, (WIDE, WIDE)), (model, (half(WIDE), half(WIDE)))):
            one.compile(optimizer(), "mse")
            one.fit(*data, batch_size=len(data[0]), epochs=3, shuffle=False, verbose=0)
        torch_fsdp.assert_same_values(alone, model)


@check
def a_loop_with_an_optimizer_of_keras(folder):
    alone, model = language_model(), sharded(language_model())
    for one, data in ((alone, (X, Y)), (model, (half(X), half(Y)))):
        optimizer = keras.optimizers.Adam(0.1, epsilon=1e-3)
        for _ in range(2):
            one.zero_grad()
            loss_of(one, *data).backward()
            variables = one.trainable_variables
            with torch.no_grad():
                optimizer.apply([variable.value.grad for variable in variables], variables)
    torch_fsdp.assert_same_values(alone, model)
    with raises(tether.errors.Unsupported, "Adafactor", "sharded"):
        model.compile(keras.optimizers.Adafactor(0.1), LOSS)
        model.fit(half(X), half(Y), verbose=0)


@check
def masks_reach_the_layers_in_a_group(folder):
    class Inner(keras.layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.dense = keras.layers.Dense(6, kernel_initializer=glorot(1), name="dense")
            self.pool = keras.layers.GlobalAveragePooling1D(keepdims=True)

        def build(self, shape):
            self.dense.build(shape)

        def call(self, x):
            return x + self.pool(x) + self.dense(x)

        def compute_mask(self, inputs, mask=None):
            return mask

    def make():
        inputs = keras.Input((4,), dtype="int32")
        h = keras.layers.Embedding(
            12, 6, mask_zero=True, embeddings_initializer=keras.initializers.RandomNormal(seed=1)
        )(inputs)
        for number in range(2):
            h = Inner(name=f"inner_{number}")(h)
        return keras.Model(inputs, keras.layers.GlobalAveragePooling1D()(h))

    x = X.copy()
    x[:, 2:] = 0
    torch_fsdp.same_step(make, x, WIDE)


@check
def checkpoints_of_torch_hold_each_weight_once(folder):
    model = sharded(language_model())
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    loss_of(model, half(X), half(Y)).backward()
    optimizer.step()
    values, slots = get_state_dict(model, optimizer)
    assert len(values) == len({id(v) for v in values.values()}) == len(model.weights)
    dcp.save({"model": values, "optimizer": slots}, checkpoint_id=folder / "two")
    for other in (language_model(), sharded(language_model())):
        theirs = torch.optim.Adam(other.parameters(), 0.1)
        values, slots = get_state_dict(other, theirs)
        dcp.load({"model": values, "optimizer": slots}, checkpoint_id=folder / "two")
        set_state_dict(other, theirs, model_state_dict=values, optim_state_dict=slots)
        equal(other, model)
        assert np.abs(outputs(other) - outputs(model)).max() < 1e-6
        mine, moment = (next(iter(each.state_dict()["state"].values()))["exp_avg"] for each in (optimizer, theirs))
        assert np.array_equal(whole(mine), whole(moment))
    np.savez(folder / f"values_{dist.get_rank()}.npz", *[weight.numpy() for weight in model.weights])


@check
def a_checkpoint_of_one_process_is_read_by_two(folder):
    model = sharded(language_model())
    values = model.state_dict()
    dcp.load(values, checkpoint_id=folder / "one")
    model.load_state_dict(values)
    right = np.load(folder / "one.npz")
    assert all(np.array_equal(weight.numpy(), right[f"arr_{place}"]) for place, weight in enumerate(model.weights))


@check
def under_ddp_ties_adapters_and_routes_are_as_in_one_process(folder):
    def adapted():
        model = language_model()
        return tether.adapters.add(model, "task", {"block_*/up/kernel": tether.low_rank(2, seed=1)}, freeze="all")

    for make in (language_model, adapted):
        alone, model = make(), make()
        wrapped = DistributedDataParallel(model)
        for one, data in ((alone, (X, Y)), (wrapped, (half(X), half(Y)))):
            outputs = one(torch.as_tensor(data[0]))
            torch.nn.functional.cross_entropy(outputs.reshape(-1, 12), torch.as_tensor(data[1]).reshape(-1)).backward()
        right, found = gradients(alone), gradients(model)
        assert all(close(right[key], found[key], 1e-6) for key in right) and right.keys() == found.keys()

    def routed():
        weights = [tether.Weight((6, 6), glorot(seed), name=f"w{seed}") for seed in range(3)]
        layer = tether.route(
            keras.layers.Dense(6, name="dense"), kernel=[weights[0], weights[1], weights[1] + weights[2]]
        )
        layer.build((None, 6))
        return layer

    alone, layer = routed(), routed()
    wrapped = DistributedDataParallel(layer, find_unused_parameters=True)
    for choice in (2, 0):
        for one, x in ((alone, WIDE), (wrapped, half(WIDE))):
            (one(torch.as_tensor(x), choice=choice) ** 2).mean().backward()
    right, found = gradients(alone), gradients(layer)
    for key in right:
        zero = np.zeros(key[1:])
        one, other = (zero if each is None else each for each in (right[key], found[key]))
        assert close(one, other, 1e-6), key
