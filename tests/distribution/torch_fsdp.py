"""What two processes of PyTorch do with sharded models; `test_torch_fsdp.py` runs it."""

import keras
import numpy as np
import torch
import torch.distributed as dist

import tether
from tests.distribution.programs import check
from tests.forms.cases import CASES, model_of

RNG = np.random.default_rng(0)
X, Y = RNG.integers(0, 12, (8, 4)), RNG.integers(0, 12, (8, 4))
WIDE = RNG.normal(size=(8, 6)).astype("float32")


def start(folder, number):
    return folder


def glorot(seed):
    return keras.initializers.GlorotUniform(seed)


def half(values):
    """This process's half of a batch."""
    return values[dist.get_rank() * 4 : dist.get_rank() * 4 + 4]


def whole(tensor):
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().cpu().double().numpy().copy()


class Block(keras.layers.Layer):
    """A block with a residual connection, and a dropout whose state is no weight."""

    def __init__(self, seed, shared=None, **kwargs):
        super().__init__(**kwargs)
        self.norm = keras.layers.LayerNormalization(name="norm")
        self.up = keras.layers.Dense(10, activation="tanh", kernel_initializer=glorot(seed), name="up")
        self.down = keras.layers.Dense(6, kernel_initializer=glorot(seed + 1), name="down")
        if shared is not None:
            tether.tie(self.up, kernel=shared)

    def build(self, shape):
        self.norm.build(shape)
        self.up.build(shape)
        self.down.build((*shape[:-1], 10))

    def call(self, x):
        return x + self.down(self.up(self.norm(x)))


def language_model(blocks=2, shared=False, **of_table):
    """An embedding tied to the head, around blocks that may share a kernel."""
    inputs = keras.Input((4,), dtype="int32")
    table = tether.Weight(name="table", initializer=keras.initializers.RandomNormal(seed=1), **of_table)
    kernel = tether.Weight((6, 10), glorot(5), name="kernel") if shared else None
    h = tether.tie(keras.layers.Embedding(12, 6, name="embed"), embeddings=table)(inputs)
    for number in range(blocks):
        h = Block(10 * number + 20, kernel, name=f"block_{number}")(h)
    return keras.Model(inputs, tether.tie(keras.layers.Dense(12, use_bias=False, name="head"), kernel=table.T)(h))


def loss_of(model, x, y, **call):
    outputs = model(torch.as_tensor(x), **call)
    if outputs.shape[-1] == 12 and outputs.ndim == 3:
        loss = torch.nn.functional.cross_entropy(outputs.float().reshape(-1, 12), torch.as_tensor(y).reshape(-1))
    else:
        loss = ((outputs.float() - torch.as_tensor(y)) ** 2).mean()
    return loss + sum(model.losses) if model.losses else loss


def gradients(model, by_name=False):
    """The gradients of what trains, whole, by place and shape, or by name."""
    found = {}
    for place, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.requires_grad:
            key = name if by_name else (place, *parameter.shape)
            found[key] = None if parameter.grad is None else whole(parameter.grad)
    return found


def close(right, found, tolerance):
    """Whether the difference is at most the tolerance times the largest number, or the tolerance."""
    return np.abs(right - found).max(initial=0) <= tolerance * max(1, np.abs(right).max(initial=0))


def same_step(make, x=X, y=Y, groups="blocks", tolerance=1e-6, optimizer=None, steps=2, **options):
    """Asserts that steps of a sharded model are those of one process with the whole batch; returns both models."""
    optimizer = optimizer or (lambda parameters: torch.optim.SGD(parameters, 0.5))
    alone, model = make(), make()
    assert tether.distribution.fully_shard(model, groups=groups, **options) is model
    ours, theirs = optimizer(list(model.parameters())), optimizer(list(alone.parameters()))
    for _ in range(steps):
        for each, one, data in ((ours, model, (half(x), half(y))), (theirs, alone, (x, y))):
            each.zero_grad()
            loss_of(one, *data).backward()
        right, found = gradients(alone), gradients(model)
        assert found.keys() == right.keys()
        for name, gradient in right.items():
            assert (gradient is None) == (found[name] is None), name
            assert gradient is None or close(gradient, found[name], tolerance), (name, gradient, found[name])
        ours.step(), theirs.step()
    with torch.no_grad():
        assert close(whole(alone(torch.as_tensor(x))), whole(model(torch.as_tensor(x))), 10 * tolerance)
    return alone, model


def local_bytes(model):
    return sum(
        (parameter.to_local() if hasattr(parameter, "to_local") else parameter).nbytes
        for parameter in model.parameters()
    )


@check
def a_tied_model_learns_as_in_one_process_and_each_stores_half(folder):
    alone, model = same_step(language_model)
    assert local_bytes(model) * 2 == local_bytes(alone)
    groups = tether.distribution.fsdp_module(model)
    assert len(list(groups.groups)) == 2  # the blocks; the table is the model's own


@check
def a_kernel_that_blocks_share_is_in_the_group_around_them(folder):
    _, model = same_step(lambda: language_model(3, shared=True))
    names = [name for name, _ in tether.distribution.fsdp_module(model).named_parameters(recurse=False)]
    assert [name.partition("_")[2] for name in names] == ["table", "kernel"]


@check
def one_group_is_as_good(folder):
    same_step(language_model, groups="model")


@check
def groups_are_named_by_patterns(folder):
    _, model = same_step(language_model, groups=["block_1", "block_0/down"])
    assert len(list(tether.distribution.fsdp_module(model).groups)) == 2


def slow(parameters):
    return torch.optim.SGD(parameters, 0.01)


@check
def every_form_of_a_frozen_base(folder):
    for name in CASES:
        rows, columns = CASES[name].shape
        x, y = RNG.normal(size=(8, rows)).astype("float32"), RNG.normal(size=(8, columns)).astype("float32")
        try:
            same_step(lambda name=name: model_of(name, use_bias=False)[0], x, y, optimizer=slow)
        except AssertionError as error:
            raise AssertionError(name) from error


def child_of(frozen):
    parent = keras.layers.Dense(6, kernel_initializer=glorot(3), name="parent")
    parent.build((None, 6))
    parent.trainable = not frozen
    child = tether.inherit(parent, kernel=lambda w: w + tether.low_rank(2, seed=3), name="child")
    inputs = keras.Input((6,))
    return keras.Model(inputs, child(keras.ops.tanh(parent(inputs))))


@check
def a_child_beside_its_parent(folder):
    same_step(lambda: child_of(frozen=True), WIDE, WIDE)
    same_step(lambda: child_of(frozen=False), WIDE, WIDE)


@check
def a_trained_number_is_whole_and_its_gradient_the_mean(folder):
    def make():
        strength = tether.Weight((), keras.initializers.Constant(0.7), name="strength")
        table = tether.Weight((6, 6), glorot(2), name="table")
        inputs = keras.Input((6,))
        return keras.Model(inputs, tether.tie(keras.layers.Dense(6, name="dense"), kernel=strength * table)(inputs))

    same_step(make, WIDE, WIDE, optimizer=lambda p: torch.optim.AdamW(p, 0.1))
    same_step(make, WIDE, WIDE, optimizer=lambda p: torch.optim.AdamW(p, 0.1, foreach=True))


@check
def adapters_on_frozen_bases(folder):
    def make():
        model = language_model()
        tether.adapters.add(model, "task", {"block_*/up/kernel": tether.low_rank(2, seed=1)}, freeze="all")
        return model

    _, model = same_step(make)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 4 and all("lora" in name for name in trained)
    assert len(list(tether.distribution.fsdp_module(model).groups)) == 2


@check
def a_bank_that_examples_choose_from(folder):
    def make():
        base = tether.Weight((6, 6), glorot(2), name="base")
        options = [base, base + tether.low_rank(2, seed=3), base + tether.low_rank(2, seed=4)]
        layer = tether.route(keras.layers.Dense(6, name="dense"), kernel=options)
        inputs, choice = keras.Input((6,)), keras.Input((), dtype="int32")
        return keras.Model([inputs, choice], layer(inputs, choice=choice))

    alone, model = make(), make()
    tether.distribution.fully_shard(model)
    choices = np.array([0, 1, 2, 1, 0, 0, 2, 2])
    for one, pick in ((alone, lambda v: v), (model, half)):
        outputs = one([torch.as_tensor(pick(WIDE)), torch.as_tensor(pick(choices))])
        ((outputs - torch.as_tensor(pick(WIDE))) ** 2).mean().backward()
    right, found = gradients(alone), gradients(model)
    for name in right:
        assert np.abs(right[name] - found[name]).max() < 1e-6, name


@check
def a_block_that_is_repeated_with_weights_of_its_own(folder):
    def make():
        inputs = keras.Input((6,))
        block = keras.Sequential([keras.layers.Dense(6, activation="tanh", kernel_initializer=glorot(4), name="d")])
        block.build((None, 6))
        body = tether.Repeat(block, times=3, vary={"d/kernel": tether.low_rank(2, seed=5)})
        return keras.Model(inputs, body(inputs))

    same_step(make, WIDE, WIDE)


@check
def a_layer_that_is_called_twice(folder):
    def make():
        inputs = keras.Input((6,))
        one, two = (Block(seed, name=f"b{seed}") for seed in (1, 5))
        return keras.Model(inputs, one(two(one(two(inputs)))))

    same_step(make, WIDE, WIDE)


@check
def penalties_on_weights(folder):
    def make():
        inputs = keras.Input((6,))
        one = keras.layers.Dense(6, kernel_regularizer="l2", kernel_initializer=glorot(1), name="one")
        two = keras.layers.Dense(6, kernel_initializer=glorot(2), name="two")
        model = keras.Model(inputs, two(one(inputs)))
        tether.transfer.soft_tie(model, "one/kernel", "two/kernel", strength=0.1)
        return model

    same_step(make, WIDE, WIDE)


@check
def keras_policies_of_mixed_precision(folder):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        same_step(language_model, tolerance=5e-3)
    finally:
        keras.config.set_dtype_policy("float32")


@check
def torch_policies_of_mixed_precision(folder):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = language_model()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    tether.distribution.fully_shard(model, mp_policy=policy)
    loss_of(model, half(X), half(Y)).backward()
    assert all(gradient is not None for gradient in gradients(model).values())
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters() if parameter.requires_grad)


@check
def gradients_accumulate_with_and_without_exchange(folder):
    alone, model, quiet = language_model(), language_model(), language_model()
    for one in (model, quiet):
        tether.distribution.fully_shard(one)
    inner = tether.distribution.fsdp_module(quiet)
    for part in (slice(0, 4), slice(4, 8)):
        loss_of(alone, X[part], Y[part]).backward()
    for number, part in enumerate((slice(0, 2), slice(2, 4))):
        loss_of(model, half(X)[part], half(Y)[part]).backward()
        inner.set_requires_gradient_sync(number == 1)
        loss_of(quiet, half(X)[part], half(Y)[part]).backward()
    for one in (model, quiet):
        for name, gradient in gradients(one).items():
            assert np.abs(gradient - gradients(alone)[name]).max() < 1e-6, name


def fitted(make, optimizer, x=X, y=Y, before=False, **compiling):
    """Models after `fit`: of one process, and sharded before or after `compile`."""
    alone, model = make(), make()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if not before:
        tether.distribution.fully_shard(model)
    for one in (alone, model):
        one.compile(optimizer(), loss, **compiling)
    if before:
        model.optimizer.build(model.trainable_variables)
        tether.distribution.fully_shard(model)
    alone.fit(x, y, batch_size=8, epochs=3, shuffle=False, verbose=0)
    model.fit(half(x), half(y), batch_size=4, epochs=3, shuffle=False, verbose=0)
    return alone, model


def assert_same_values(alone, model, tolerance=2e-5):
    for one, other in zip(alone.weights, model.weights, strict=True):
        difference = np.abs(one.numpy().astype("float64") - other.numpy().astype("float64")).max()
        assert difference <= tolerance, (one.path, difference)


@check
def fit_trains_with_every_kind_of_optimizer(folder):
    optimizers = keras.optimizers
    for make in (
        lambda: optimizers.SGD(0.5),
        lambda: optimizers.SGD(0.5, momentum=0.9, nesterov=True, gradient_accumulation_steps=2),
        lambda: optimizers.Adam(0.1, epsilon=1e-3),
        lambda: optimizers.AdamW(0.1, epsilon=1e-3, weight_decay=0.1, use_ema=True),
        lambda: optimizers.RMSprop(0.01, epsilon=1e-3),
        lambda: optimizers.Adagrad(0.1),
        lambda: optimizers.Lion(0.001),
    ):
        assert_same_values(*fitted(language_model, make))
    alone, model = fitted(language_model, lambda: optimizers.Adam(0.1, epsilon=1e-3), before=True)
    assert_same_values(alone, model)
    slots = [slot for slot in model.optimizer.variables if len(slot.shape)]
    assert all(hasattr(slot.value, "full_tensor") for slot in slots)
    assert np.abs(slots[0].numpy() - next(s for s in alone.optimizer.variables if len(s.shape)).numpy()).max() < 1e-6


@check
def evaluate_and_predict_between_steps(folder):
    alone, model = fitted(language_model, lambda: keras.optimizers.SGD(0.5))
    assert np.abs(model.predict(X, verbose=0) - alone.predict(X, verbose=0)).max() < 1e-5
    assert abs(model.evaluate(X, Y, verbose=0) - alone.evaluate(X, Y, verbose=0)) < 1e-5
    assert all(hasattr(parameter, "full_tensor") for parameter in model.parameters())
