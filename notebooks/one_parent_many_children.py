# %% [markdown]
# # One parent, many children
#
# A trained layer, and new layers on its weights: shared as they are, with a part of their own, scaled by a factor for
# each output, or copied as a start. What they share is stored once.

# %%
import keras
import numpy as np

import tether

keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)
x = rng.normal(size=(512, 32)).astype("float32")
hidden = np.tanh(x @ rng.normal(size=(32, 16)).astype("float32") / 4)
tasks = [hidden @ rng.normal(size=(16, 1)).astype("float32") for _ in range(3)]

# %% [markdown]
# ## A parent
#
# Trained on the first task, then frozen.

# %%
parent = keras.layers.Dense(64, activation="tanh", name="parent")
first = keras.Sequential([keras.Input((32,)), parent, keras.layers.Dense(1)])
first.compile(keras.optimizers.Adam(0.01), "mse")
first.fit(x, tasks[0], epochs=20, verbose=0)
parent.trainable = False
values = [value.copy() for value in parent.get_weights()]

# %% [markdown]
# ## Children
#
# `inherit` makes a new layer. What of the parent is frozen stays frozen in the child, also in a copy, until its
# `trainable` is set. `child.inheritance` says what came from where.

# %%
children = {
    "shared": tether.inherit(parent, name="shared"),
    "low rank": tether.inherit(parent, kernel=lambda w: w + tether.low_rank(4), name="low_rank"),
    "scaled": tether.inherit(parent, kernel=lambda w: w * tether.forms.scale(), name="scaled"),
    "copied": tether.inherit(parent, share=False, name="copied"),
}
children["copied"].trainable = True
for name, child in children.items():
    own = tether.inspection.unique(child.trainable_weights)
    count = sum(int(np.prod(variable.shape)) for variable in own)
    print(f"{name:9}{count:>6,} numbers train; kernel = {child.kernel.expression.notation()}")
print(children["low rank"].inheritance)

# %% [markdown]
# ## Training them on other tasks
#
# All in one model: what is shared is in it once.

# %%
inputs = keras.Input((32,))
family = keras.Model(
    inputs, [keras.layers.Dense(1)(children[name](inputs)) for name in ("shared", "low rank", "scaled")]
)
family.compile(keras.optimizers.Adam(0.01), ["mse"] * 3)
targets = [tasks[1], tasks[1], tasks[2]]
start = family.evaluate(x, targets, verbose=0)[0]
family.fit(x, targets, epochs=20, verbose=0)
end = family.evaluate(x, targets, verbose=0)[0]
print(f"loss {start:.2f} to {end:.2f}")
tether.summary(family, shared_only=True)

# %% [markdown]
# ## What it saves
#
# A plain copy of the family has the parent's kernel three times.

# %%
plain = tether.materialize(family)
print(f"{family.count_params():,} stored numbers, {plain.count_params():,} without sharing")

# %%
assert end < start / 2
assert all(np.array_equal(one, other) for one, other in zip(values, parent.get_weights(), strict=True))
assert np.allclose(plain.predict(x, verbose=0)[1], family.predict(x, verbose=0)[1], atol=1e-4)
assert family.count_params() < plain.count_params() - 2 * 32 * 64 + 32 * 4 + 4 * 64 + 64 + 1
