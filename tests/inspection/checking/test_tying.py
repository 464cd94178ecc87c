"""Which ties count as lost, and which factors as dead."""

import keras

import tether
from tests.inspection.checking.faults import Box, Holder, normal, tied_pair

layers = keras.layers


def check(model):
    return tether.check(model, rules=["lost-tie", "dead-factors", "view-kept-by-parent"])


def test_a_tie_that_waits_for_its_layer_is_not_lost():
    codec = tether.Weight(name="codec")
    assert not check(tether.tie(layers.Dense(6), kernel=codec))
    assert not check(keras.Sequential([tether.tie(layers.Dense(6), kernel=codec)]))


def test_a_tie_that_was_moved_or_undone_is_not_lost(rng):
    model, codec = tied_pair(rng)
    tether.tie(model, {"decode/kernel": codec})
    assert not check(model)
    tether.untie(model)
    assert not check(model)


class Boxed(layers.Layer):
    """Keeps its weight where no attribute tells."""

    def build(self, shape):
        object.__setattr__(self, "box", Box(self.add_weight(shape=(shape[-1], 6), name="kernel")))

    def call(self, x):
        return keras.ops.matmul(x, self.box.value)


def test_a_tie_in_an_object_of_the_layers_own_is_not_lost(rng):
    codec = tether.Weight(normal(rng, 6, 6), name="codec")
    first, second = (tether.tie(Boxed(), kernel=codec) for _ in range(2))
    assert not check(keras.Sequential([keras.Input((6,)), first, second]))


def test_a_tie_by_a_path_is_not_lost(rng):
    first, holder = layers.Dense(6), Holder()
    model = keras.Sequential([keras.Input((6,)), first, holder])
    tether.tie(model, {f"{holder.name}/inner/kernel": tether.weight_of(first, "kernel")})
    assert not check(model)


def test_a_view_replaced_by_a_variable_is_lost(rng):
    model, _ = tied_pair(rng)
    decode = model.layers[1]
    decode._tracker.unlock()
    decode._kernel = keras.Variable(normal(rng, 6, 6), name="kernel")
    decode._tracker.lock()
    (finding,) = check(model)
    assert finding.where == "decode/kernel" and "a variable of its own" in finding.why


def test_one_layer_may_keep_its_own_view_twice(rng):
    model, _ = tied_pair(rng)
    decode = model.layers[1]
    decode.also = decode.kernel
    assert not check(model)


# --------------------------------------------------------------------------- factors


def factors(rng, **expressions):
    """Layers whose kernels are made of the weights a, b and c."""
    a, b = tether.Weight((6, 2), "zeros", name="a"), tether.Weight((2, 6), "zeros", name="b")
    c = tether.Weight(normal(rng, 2, 6), name="c")
    base = tether.Weight(normal(rng, 6, 6), name="base")
    made = [
        tether.tie(layers.Dense(6, name=name), kernel=expression(a, b, c, base))
        for name, expression in expressions.items()
    ]
    return keras.Sequential([keras.Input((6,)), *made]), a, b


def test_a_zero_factor_beside_one_that_is_not_learns(rng):
    model, *_ = factors(rng, one=lambda a, b, c, base: base + a @ c)
    assert not check(model)


def test_a_factor_that_learns_elsewhere_frees_the_other(rng):
    model, *_ = factors(rng, one=lambda a, b, c, base: base + a @ b, two=lambda a, b, c, base: base.T + a @ c)
    assert not check(model)


def test_three_factors_and_a_number_between_them(rng):
    model, *_ = factors(rng, one=lambda a, b, c, base: base + (0.5 * (a @ c)) @ (c.T @ b))
    (finding,) = check(model)
    assert finding.rule == "dead-factors" and finding.where == "one/kernel" and "a and b" in finding.why


def test_factors_that_are_frozen_are_no_finding(rng):
    model, a, b = factors(rng, one=lambda a, b, c, base: base + a @ b)
    assert check(model)
    a.trainable = b.trainable = False
    assert not check(model)


def test_an_elementwise_product_of_zeros_is_dead(rng):
    model, *_ = factors(rng, one=lambda a, b, c, base: base + tether.ops.concatenate([a * b.T] * 3, axis=1))
    assert [finding.rule for finding in check(model)] == ["dead-factors"]
