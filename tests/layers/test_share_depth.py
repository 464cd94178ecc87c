"""Blocks of one structure share weights through the depth of a model."""

import copy

import keras
import numpy as np
import pytest

import tether
from tests.layers.test_sharing_layers import BLOCK, STACKS, Block, Stack, built, distinct, functional, snapshot, x
from tests.support import assert_close, gradients, numpy
from tether import keras_seam
from tether.errors import LostTie, ShapeMismatch, TetherError, UnknownName, Unsupported
from tether.layers.tying.state import View

pytestmark = pytest.mark.spread

L = keras.layers
NORM = 12
"""The numbers of a block that stay with each depth."""


def blocks_of(model):
    return [layer for layer in model.layers if isinstance(layer, Block)]


def randomized(model, seed=3):
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        weight.assign(rng.normal(size=weight.shape).astype("float32") / 2)
    return model


def kernels(layers, name="down"):
    return [numpy(getattr(layer, name).kernel.value) for layer in layers]


def dense_stack(depth=6, size=4):
    inputs = y = keras.Input((size,))
    for place in range(depth):
        y = L.Dense(size, activation="tanh", name=f"block_{place}")(y)
    return keras.Model(inputs, y)


# --------------------------------------------------------------------------- which blocks


@pytest.mark.parametrize(
    ("pattern", "depth", "letters"),
    [
        ("all", 6, "AAAAAA"),
        ("sequence:3", 6, "AABBCC"),
        ("sequence:2", 5, "AAABB"),
        ("cycle:3", 6, "ABCABC"),
        ("cycle:2", 5, "ABABA"),
        ("cycle_reverse:3", 6, "ABCCBA"),
        ("cycle_reverse:3", 9, "ABCABCCBA"),
        ("cycle_reverse:3", 5, "ABCCB"),
        ("sandwich", 6, "ABBBBC"),
    ],
)
def test_a_pattern_says_which_blocks_are_one(pattern, depth, letters):
    model = dense_stack(depth)
    report = tether.share_depth(model, pattern, blocks="block_*")
    assert report.letters == letters
    own = [layer.kernel.expression if isinstance(layer.kernel, View) else id(layer) for layer in model.layers[1:]]
    numbers = {}
    assert "".join("ABCDEF"[numbers.setdefault(each, len(numbers))] for each in own) == letters
    assert model.count_params() == report.after == len(set(letters)) * 20


def test_groups_leave_the_others_alone():
    model = dense_stack()
    before = kernel_of(model, 5)
    report = tether.share_depth(model, groups=[[4, 1], [2, 3]], blocks="block_*")
    assert report.letters == "ABCCBD"
    assert not isinstance(model.layers[6].kernel, View) and np.array_equal(kernel_of(model, 5), before)
    assert np.array_equal(kernel_of(model, 1), kernel_of(model, 4))
    assert report["kernel"].errors[0] == 0  # the first of a group keeps its value, in whichever order it is given


def kernel_of(model, place):
    return numpy(model.get_layer(f"block_{place}").kernel.value)


def test_many_blocks_are_numbered():
    report = tether.share_depth(dense_stack(30, 1), "cycle:28", blocks="block_*")
    assert report.letters.split() == [*map(str, range(1, 29)), "1", "2"]


# --------------------------------------------------------------------------- which weights


def test_norms_stay_with_each_depth():
    model = functional(4)
    report = tether.share_depth(model, "cycle:2", blocks="block_*")
    assert report.before == 4 * BLOCK and report.after == model.count_params() == 2 * BLOCK + 2 * NORM
    first, _, third, _ = blocks_of(model)
    assert first.down.bias.expression == third.down.bias.expression
    assert not isinstance(first.norm.gamma, View)
    assert report["norm/gamma"].how == "own" and report["down/kernel"].how == "shared"


@pytest.mark.parametrize(
    ("only", "keep", "shared"),
    [
        ("*attention*", "norms", 144 + 24),
        ("all-linear", "norms", 144 + 48 + 48),
        ("*", ["norms", "*bias"], 144 + 48 + 48),
        ("*", (), BLOCK),
        ("*kernel", (), 144 + 96),
        (["*", "!*attention*"], "norms", 48 + 8 + 48 + 6),
        ("*", ["norms", "!norm/beta"], BLOCK - 6),
        ("up/kernel", "norms", 48),
    ],
)
def test_only_and_keep_choose_weights(only, keep, shared):
    model = functional(3)
    report = tether.share_depth(model, blocks="block_*", only=only, keep=keep)
    assert report.before - report.after == 2 * shared


class Scaled(L.Layer):
    """What stays with a depth by its name, and what does not."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(4, 4), name="kernel")
        self.layer_scale = self.add_weight(shape=(4,), name="layer_scale")
        self.gate = self.add_weight(shape=(), name="gate")
        self.count = self.add_weight(shape=(4,), name="count", trainable=False)
        self.offset = self.add_weight(shape=(4,), name="offset")

    def call(self, y):
        return y + self.gate * self.layer_scale * (y @ self.kernel + self.offset)


@pytest.mark.parametrize(
    ("make", "own"),
    [
        (lambda: Scaled(), {"layer_scale", "gate", "count"}),
        (lambda: L.BatchNormalization(), {"gamma", "beta", "moving_mean", "moving_variance"}),
        (lambda: L.GroupNormalization(2), {"gamma", "beta"}),
        (lambda: L.RMSNormalization(), {"scale"}),
        (lambda: L.Dense(4), set()),
        (lambda: L.Conv1D(4, 3, padding="same"), set()),
        (lambda: L.PReLU(), {"alpha"}),
    ],
)
def test_what_belongs_to_the_depth(make, own):
    layers = [make() for _ in range(2)]
    for layer in layers:
        layer(np.ones((2, 4, 4) if isinstance(layer, L.Conv1D) else (2, 4), "float32"))
    names = {weight.name for weight in layers[0].weights}
    if names == own:
        with pytest.raises(UnknownName, match="None of the blocks' weights"):
            tether.share_depth(layers)
        assert distinct(*layers) == 2 * len(own)
        report = tether.share_depth(layers, keep=())
        assert {weight.name for weight in report.weights if weight.how == "shared"} == names
        assert distinct(*layers) == len(names)
        return
    report = tether.share_depth(layers)
    assert {weight.name for weight in report.weights if weight.how == "own"} == own


def test_statistics_of_a_depth_follow_its_own_inputs():
    layers = [keras.Sequential([keras.Input((4,)), L.Dense(4), L.BatchNormalization()]) for _ in range(2)]
    tether.share_depth(layers)
    for layer, factor in zip(layers, (1.0, 10.0), strict=True):
        layer(factor * np.random.default_rng(0).normal(size=(64, 4)).astype("float32"), training=True)
    one, two = (numpy(layer.layers[-1].moving_variance) for layer in layers)
    assert np.all(two > one)


# --------------------------------------------------------------------------- values


def test_the_first_of_a_group_gives_the_value():
    model = randomized(functional(4))
    before = kernels(blocks_of(model))
    report = tether.share_depth(model, "sequence:2", blocks="block_*")
    after = kernels(blocks_of(model))
    for place, of in enumerate((0, 0, 2, 2)):
        np.testing.assert_array_equal(after[place], before[of])
        error = np.linalg.norm(before[of] - before[place]) / np.linalg.norm(before[place])
        assert report["down/kernel"].errors[place] == pytest.approx(error, rel=1e-5)


def test_the_mean_of_a_group():
    model = randomized(functional(4))
    before = kernels(blocks_of(model))
    report = tether.share_depth(model, "cycle:2", blocks="block_*", values="mean")
    after = kernels(blocks_of(model))
    np.testing.assert_allclose(after[0], (before[0] + before[2]) / 2, atol=1e-6)
    np.testing.assert_allclose(after[3], (before[1] + before[3]) / 2, atol=1e-6)
    assert report["down/kernel"].errors[1] == pytest.approx(
        np.linalg.norm(after[1] - before[1]) / np.linalg.norm(before[1]), rel=1e-5
    )


@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank_parts_are_the_truncated_svd_of_the_differences(rank):
    model = randomized(functional(4))
    before = kernels(blocks_of(model))
    report = tether.share_depth(model, "cycle:2", blocks="block_*", values=tether.low_rank(rank))
    for place, value in enumerate(kernels(blocks_of(model))):
        mean = (before[place % 2] + before[place % 2 + 2]) / 2
        u, s, v = np.linalg.svd(before[place] - mean)
        np.testing.assert_allclose(value, mean + (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-5)
        left = np.sqrt(np.sum(s[rank:] ** 2)) / np.linalg.norm(before[place])
        assert report["down/kernel"].errors[place] == pytest.approx(left, rel=1e-3)
    assert report["down/bias"].how == "own" and report["attention/_query_dense/bias"].how == "own"


@pytest.mark.parametrize("rank", [6, 50])
def test_full_rank_is_the_parent_and_rank_zero_the_strict_tie(rank):
    model = randomized(functional(4))
    y = numpy(model(x()))
    report = tether.share_depth(model, "cycle:2", blocks="block_*", values=tether.low_rank(rank))
    assert report.error < 1e-5
    assert_close(model(x()), y, 1e-4)
    assert all(6 in weight.shape or "lora" not in weight.path for weight in model.weights)  # no rank above the full


def test_a_rank_loses_less_than_a_smaller_one():
    errors = []
    for values in ("mean", tether.low_rank(1), tether.low_rank(2), tether.low_rank(4)):
        model = randomized(functional(4))
        errors.append(tether.share_depth(model, "all", blocks="block_*", values=values)["up/kernel"].error)
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 2


def test_the_parts_stand_beside_their_depth_s_weight_and_train():
    model = randomized(functional(2))
    tether.share_depth(model, blocks="block_*", values=tether.low_rank(1), only="up/kernel")
    names = {weight.path for block in blocks_of(model) for weight in block.up.weights if "bias" not in weight.path}
    assert len(names) == 5 and {name.split("/")[0] for name in names} == {"block_0", "block_1"}
    before = [numpy(weight).copy() for weight in model.weights]
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(x(), x(1), verbose=0)
    moved = {w.path for w, old in zip(model.weights, before, strict=True) if not np.array_equal(numpy(w), old)}
    assert names <= moved


def test_reduced_precision_keeps_its_dtype():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = randomized(functional(2))
    tether.share_depth(model, blocks="block_*", values=tether.low_rank(2))
    assert keras.backend.standardize_dtype(model(x()).dtype) == "bfloat16"
    assert {weight.dtype for weight in model.weights} == {"float32"}


# --------------------------------------------------------------------------- training


def test_the_gradient_is_the_sum_over_uses():
    model, plain = randomized(functional(4)), randomized(functional(4))
    tether.share_depth(model, "cycle:2", blocks="block_*", keep=())
    for place, block in enumerate(blocks_of(plain)):
        block.set_weights(blocks_of(model)[place % 2].get_weights())

    def of(root):
        return gradients(lambda: keras.ops.mean(root(x()) ** 2), root.trainable_weights)[1]

    tied, own = of(model), of(plain)
    count = len(tied) // 2
    for place, gradient in enumerate(tied):
        total = own[place] + own[place + 2 * count]
        np.testing.assert_allclose(gradient, total, rtol=1e-3, atol=1e-3 * np.abs(total).max())


@pytest.mark.parametrize("values", ["mean", tether.low_rank(1)], ids=["mean", "low rank"])
def test_a_compiled_model_asks_to_compile_again_after_other_values(values):
    model = functional()
    model.compile("adam", "mse")
    model.fit(x(), x(1), verbose=0)
    tether.share_depth(model, blocks="block_*", values=values)
    with pytest.raises(TetherError, match="compile"):
        model.fit(x(), x(1), verbose=0)
    model.compile("adam", "mse")
    model.fit(x(), x(1), verbose=0)
    assert len(set(map(id, model.optimizer.variables))) == 2 + 2 * len(model.trainable_weights)


@pytest.mark.parametrize("pattern", ["all", "cycle:2"])
@pytest.mark.parametrize(
    "make",
    [lambda: keras.optimizers.Adam(0.01), lambda: keras.optimizers.SGD(0.01, momentum=0.9)],
    ids=["Adam", "momentum"],
)
def test_a_compiled_model_goes_on_with_the_slots_of_the_weights_that_are_left(make, pattern):
    model = functional()
    model.compile(make(), "mse")
    model.fit(x(), x(1), epochs=2, verbose=0)
    before = slots(model)
    tether.share_depth(model, pattern, blocks="block_*")
    after = slots(model)
    assert set(after) == {w.path for w in model.trainable_weights} and len(after) < len(before)
    for path, kept in after.items():
        assert kept
        for name, value in kept.items():
            np.testing.assert_array_equal(value, before[path][name])
    model.fit(x(), x(1), verbose=0)
    steps = model.optimizer.iterations
    assert int(keras.ops.convert_to_numpy(steps)) == 3
    assert all(
        not np.array_equal(slots(model)[path][name], after[path][name]) for path in after for name in after[path]
    )


def slots(model):
    """What the optimizer keeps, by the paths of the weights."""
    known = {id(v): v.path for v in keras_seam.optimized_variables(model.optimizer)}
    kept = keras_seam.optimizer_slots(model.optimizer)
    return {
        known[key]: {name: np.array(keras.ops.convert_to_numpy(slot)) for name, slot in of} for key, of in kept.items()
    }


@pytest.mark.parametrize("values", ["first", "mean", tether.low_rank(1)], ids=["first", "mean", "low rank"])
def test_frozen_uses_stay_frozen(values):
    model = randomized(functional(3))
    one, two, _ = blocks_of(model)
    two.up.trainable = False
    tether.share_depth(model, blocks="block_*", values=values)
    assert not two.up.kernel.trainable and one.up.kernel.trainable and two.down.kernel.trainable
    if values == "first":
        for block in blocks_of(model):
            block.trainable = False
        assert not model.trainable_weights


# --------------------------------------------------------------------------- surviving


@pytest.mark.thin(2)
@pytest.mark.parametrize("values", ["mean", tether.low_rank(2)], ids=["mean", "low rank"])
@pytest.mark.parametrize("kind", STACKS)
@pytest.mark.parametrize("how", ["keras", "weights", "safetensors", "clone", "deepcopy", "untie", "materialize"])
def test_it_survives(kind, how, values, tmp_path):
    model = randomized(STACKS[kind]())
    model(x())
    pattern = "blocks/*" if kind == "subclass" else "block_*"
    report = tether.share_depth(model, "cycle:2", blocks=pattern, values=values)
    y, count = numpy(model(x())), model.count_params()
    assert count == report.after
    again = model
    if how == "keras":
        model.save(tmp_path / "m.keras")
        again = keras.saving.load_model(tmp_path / "m.keras")
    elif how == "weights":
        model.save_weights(tmp_path / "m.weights.h5")
        randomized(model, 9).load_weights(tmp_path / "m.weights.h5")
    elif how == "safetensors":
        tether.files.save_safetensors(model, tmp_path / "m.safetensors")
        tether.files.load_safetensors(randomized(model, 9), tmp_path / "m.safetensors")
    elif how == "clone":
        again = keras.models.clone_model(model)
        again(x())
        again.set_weights(model.get_weights())
    elif how == "deepcopy":
        again = copy.deepcopy(model)
    elif how == "untie":
        count = report.before
        tether.untie(model)
    else:
        count = report.before
        again = tether.materialize(model)
    assert_close(again(x()), y)
    assert again.count_params() == count
    again.compile("sgd", "mse")
    again.fit(x(), x(1), verbose=0)


def test_it_can_be_shared_again_and_further():
    model = randomized(functional(4))
    tether.share_depth(model, "sequence:2", blocks="block_*", values="mean")
    tether.share_depth(model, "all", blocks="block_*", values="mean")
    assert model.count_params() == BLOCK + 3 * NORM
    tether.share_depth(model, "cycle:2", blocks="block_*")
    assert model.count_params() == BLOCK + 3 * NORM


def test_a_list_of_blocks_that_a_constructor_makes_is_recorded_further_out(tmp_path):
    model = randomized(built(Stack()))
    tether.share_depth(model.blocks)
    with pytest.raises(LostTie, match=r"tether\.files\.save_model"):
        model.save(tmp_path / "m.keras")
    tether.files.save_model(model, tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    assert again.count_params() == model.count_params()
    assert_close(again(x()), model(x()))


# --------------------------------------------------------------------------- failing


@pytest.mark.parametrize(
    ("layers", "arguments", "error", "said"),
    [
        (lambda: [built(), built(use_bias=False)], {}, UnknownName, "'down/bias'.*made otherwise"),
        (lambda: [built(), built(), built(hidden=7)], {}, ShapeMismatch, r"'up/kernel'.*\(6, 8\).*\(6, 7\)"),
        (lambda: [built()], {}, TetherError, "two blocks or more"),
        (lambda: [built()] * 2, {}, TetherError, "given twice"),
        (lambda: [built(), 3], {}, TetherError, "takes a Keras layer"),
        (lambda: "block_*", {}, TetherError, "blocks in their order"),
        (lambda: functional(), {}, TetherError, r"blocks='block_\*'"),
        (lambda: functional(), {"blocks": "layer_*"}, UnknownName, "No layer of"),
        (lambda: [built(), built()], {"blocks": "block_*"}, TetherError, "of a list"),
        (lambda: [built(), built()], {"pattern": "cycle"}, TetherError, "'cycle:2'"),
        (lambda: [built(), built()], {"pattern": "cycle:3"}, TetherError, "1 to 2"),
        (lambda: [built(), built()], {"pattern": "cycle:0"}, TetherError, "1 to 2"),
        (lambda: [built(), built()], {"pattern": "zigzag"}, TetherError, "'sandwich'"),
        (lambda: [built(), built()], {"pattern": 2}, TetherError, "'sandwich'"),
        (lambda: [built(), built(), built()], {"pattern": "sandwich"}, TetherError, "between the first and the last"),
        (lambda: [built(), built()], {"groups": [[0, 2]]}, TetherError, "0 to 1"),
        (lambda: [built(), built()], {"groups": [[0, 1], [1]]}, TetherError, "each once"),
        (lambda: [built(), built()], {"groups": 3}, TetherError, "`groups`"),
        (lambda: [built(), built()], {"groups": [[0, 1]], "pattern": "cycle:2"}, TetherError, "not both"),
        (lambda: [built(), built()], {"only": "*kernal"}, UnknownName, "kernal"),
        (lambda: [built(), built()], {"keep": ["norms", "*biased"]}, UnknownName, "biased"),
        (lambda: [built(), built()], {"keep": "*"}, UnknownName, "None of the blocks' weights"),
        (lambda: [built(), built()], {"values": "last"}, TetherError, "'first', 'mean'"),
        (lambda: [built(), built()], {"values": tether.low_rank(2, start="pissa")}, TetherError, "start"),
        (lambda: [built(), _quantized()], {}, Unsupported, "quantised"),
        (lambda: [built(), _constrained()], {"values": tether.low_rank(2)}, Unsupported, "constrains"),
        (lambda: [_tied_outside(), built()], {"values": "mean"}, Unsupported, "outside"),
        (lambda: [_doubled(), built()], {"values": "mean"}, Unsupported, r"2\.0 \*|2 \*"),
    ],
)
def test_a_failure_changes_nothing(layers, arguments, error, said):
    given = layers()
    around = [layer for layer in (given if isinstance(given, list) else [given]) if isinstance(layer, L.Layer)]
    before = snapshot(*around)
    with pytest.raises(error, match=said):
        tether.share_depth(given, **arguments)
    assert snapshot(*around) == before


def _quantized():
    block = built()
    block.up.quantize("int8")
    return block


def _constrained():
    block = Block()
    block.up = L.Dense(8, kernel_constraint="non_neg")
    return built(block)


_outside = []


def _tied_outside():
    block, other = built(), L.Dense(8, name="outside")
    other.build((None, 6))
    _outside.append(tether.tie(other, kernel=tether.weight_of(block, "up/kernel")))
    return block


def _doubled():
    block = built()
    return tether.tie(block, {"up/kernel": 2 * tether.weight_of(block, "up/kernel")})


def test_a_failure_while_tying_puts_everything_back(monkeypatch):
    model = randomized(functional(3))
    before, y = snapshot(model, *blocks_of(model)), numpy(model(x()))
    from tether.layers.depth import share_depth

    def fail(*_):
        real(*_)
        raise RuntimeError("half way")

    real = share_depth.tie
    monkeypatch.setattr(share_depth, "tie", fail)
    with pytest.raises(RuntimeError):
        tether.share_depth(model, blocks="block_*", values=tether.low_rank(2))
    assert snapshot(model, *blocks_of(model)) == before
    assert_close(model(x()), y)
    model.compile("sgd", "mse")
    model.fit(x(), x(1), verbose=0)


# --------------------------------------------------------------------------- the report


def test_the_report_shows_itself():
    report = tether.share_depth(randomized(functional(4)), "cycle:2", blocks="block_*", values=tether.low_rank(1))
    text, page = repr(report), report._repr_html_()
    for said in ("ABAB", "block_0 to block_3", "up/kernel", "(6, 8)", "mean + low_rank(1)", f"{report.after:,} after"):
        assert said in text and said in page
    with pytest.raises(KeyError):
        report["kernel"]


# --------------------------------------------------------------------------- known truth


class Residual(L.Layer):
    """`h + tanh(h W + b)`."""

    def __init__(self, size, **kwargs):
        super().__init__(**kwargs)
        self.dense = L.Dense(size, "tanh", kernel_initializer=keras.initializers.RandomNormal(stddev=0.05))

    def build(self, shape):
        self.dense.build(shape)

    def call(self, h):
        return h + self.dense(h)


def error_of_a_student(seed, *, shares, size=8, depth=4, rows=40, epochs=400):
    """The error on new rows of a student of a residual tanh layer that is used four times, after 40 noisy rows."""
    rng = np.random.default_rng(seed)
    keras.utils.set_random_seed(seed)
    w, b = rng.normal(size=(size, size)) / np.sqrt(size), 0.1 * rng.normal(size=size)

    def truth(h):
        for _ in range(depth):
            h = h + np.tanh(h @ w + b)
        return h

    inputs, new = (rng.normal(size=(count, size)).astype("float32") for count in (rows, 500))
    outputs = truth(inputs) + 0.05 * rng.normal(size=inputs.shape)
    model = keras.Sequential([keras.Input((size,)), *(Residual(size) for _ in range(depth))])
    if shares:
        tether.share_depth(model, blocks="residual*")
    rate = keras.optimizers.schedules.CosineDecay(0.05, epochs)
    model.compile(keras.optimizers.Adam(rate), "mse", jit_compile=keras.backend.backend() == "jax")
    model.fit(np.tile(inputs, (epochs, 1)), np.tile(outputs, (epochs, 1)), batch_size=rows, shuffle=False, verbose=0)
    return float(np.mean((model.predict(new, verbose=0) - truth(new)) ** 2))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_student_of_the_right_structure_learns_what_independent_layers_cannot(seed):
    tied, own = error_of_a_student(seed, shares=True), error_of_a_student(seed, shares=False)
    print(f"{seed}: {tied:.4f} shared, {own:.4f} independent")
    assert tied <= own / 4, f"{tied:.4f} shared, {own:.4f} independent"


# --------------------------------------------------------------------------- blocks that are not built


class Own(L.Layer):
    """A block whose layers build themselves when it is called first."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm, self.dense = L.LayerNormalization(), L.Dense(6)

    def call(self, h):
        return h + self.dense(self.norm(h))


@keras.saving.register_keras_serializable("tests.share_depth")
class Shared(keras.Model):
    """A model that shares the depth of its blocks itself."""

    def __init__(self, depth=4, **kwargs):
        super().__init__(**kwargs)
        self.depth = depth
        self.blocks = [Block(name=f"block_{place}") for place in range(depth)]
        tether.share_depth(self.blocks, "cycle:2")

    def build(self, shape):
        for block in self.blocks:
            block.build(shape)

    def call(self, h):
        for block in self.blocks:
            h = block(h)
        return h

    def get_config(self):
        return {**super().get_config(), "depth": self.depth}


@pytest.mark.parametrize("backwards", [False, True], ids=["in order", "backwards"])
@pytest.mark.parametrize("cls", [Block, Own])
def test_blocks_that_are_not_built_share_when_they_are(cls, backwards, tmp_path):
    blocks = [cls(name=f"block_{place}") for place in range(4)]
    report = tether.share_depth(blocks, "cycle:2")
    assert report.letters == "ABAB" and "not built yet" in repr(report)
    inputs = y = keras.Input((5, 6))
    for block in reversed(blocks) if backwards else blocks:
        y = block(y)
    model = keras.Model(inputs, y)
    one = blocks[0].count_params()
    assert model.count_params() == 2 * one + 2 * NORM
    gammas = [block.norm.gamma for block in blocks]
    assert not any(isinstance(gamma, View) for gamma in gammas)
    model.compile("sgd", "mse")
    model.fit(x(), x(1), verbose=0)
    if cls is Block:
        model.save(tmp_path / "m.keras")
        again = keras.saving.load_model(tmp_path / "m.keras")
        assert again.count_params() == model.count_params()
        assert_close(again(x()), model(x()))


@pytest.mark.parametrize("make", [Stack, lambda: keras.Sequential([Block(name=f"block_{i}") for i in range(3)])])
def test_a_model_that_is_not_built_shares_when_it_is(make, tmp_path):
    model = make()
    tether.share_depth(model, blocks="block*" if make is not Stack else "blocks/*")
    with pytest.raises(Unsupported, match="no config says"):
        keras.models.clone_model(model)
    model(x())
    assert model.count_params() == BLOCK + 2 * NORM
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    assert again.count_params() == model.count_params()
    assert_close(again(x()), model(x()))


def test_a_constructor_shares_the_depth_of_its_blocks(tmp_path):
    model = Shared()
    assert keras.models.clone_model(model) is not model
    model(x())
    assert model.count_params() == 2 * BLOCK + 2 * NORM
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    assert again.count_params() == model.count_params()
    assert_close(again(x()), model(x()))


def test_untie_ends_the_waiting():
    blocks = [Block() for _ in range(2)]
    tether.share_depth(blocks)
    for block in blocks:
        tether.untie(block)
    assert {type(block) for block in blocks} == {Block}
    assert distinct(*(built(block) for block in blocks)) == 2 * len(blocks[0].weights)


class Later(Own):
    def build(self, shape):
        """Leaves its layers to the first call."""


@pytest.mark.parametrize(
    ("layers", "arguments", "error", "said"),
    [
        (lambda: [Block(), Block()], {"values": "mean"}, TetherError, "no values yet"),
        (lambda: [Block(), built()], {}, TetherError, "all blocks first, or none"),
        (lambda: [Block(), Block()], {"groups": [[0], [1]]}, UnknownName, "two blocks"),
        (lambda: [Block(), Block(use_bias=False)], {}, UnknownName, "no weight 'bias'"),
        (lambda: [Block(use_bias=False), Block()], {}, UnknownName, "'down/bias' is in"),
        (lambda: [Block(), Block(hidden=7)], {}, ShapeMismatch, "shape"),
        (lambda: [Later(), Later()], {}, TetherError, "to be built later"),
        (lambda: [Block(), Block()], {"only": "nothing"}, UnknownName, "None of the weights"),
    ],
)
def test_what_cannot_be_shared_is_told_at_the_latest_when_it_is_built(layers, arguments, error, said):
    given = layers()
    with pytest.raises(error, match=said):
        tether.share_depth(given, **arguments)
        for layer in given:
            layer.build((None, 5, 6))
