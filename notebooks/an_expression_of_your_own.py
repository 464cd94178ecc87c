# %% [markdown]
# # An expression of your own
#
# What a layer computes with can be any function of stored weights. Here it is a circulant matrix: each row is the one
# above, shifted by one, so the matrix has `n` numbers of its own instead of `n²`, and a layer that multiplies by it
# treats all positions on a ring alike.

# %%
import keras
import numpy as np

import tether

keras.utils.set_random_seed(0)
ring = tether.Weight((12,), "glorot_uniform", name="ring")

# %% [markdown]
# ## Made of what there is
#
# Expressions have NumPy's operators and slices, and `tether.ops` has more functions. Shapes are checked when the
# expression is written; nothing is computed before a layer is called.

# %%
rows = [ring] + [tether.ops.concatenate([ring[-shift:], ring[:-shift]]) for shift in range(1, 12)]
circulant = tether.ops.stack(rows)
print(circulant.shape, "second row:", rows[1].notation())

# %% [markdown]
# ## As a function of your own
#
# `tether.ops.apply` takes a function of `keras.ops` that is registered with Keras, so that a file can name it.


# %%
@keras.saving.register_keras_serializable(package="notebook")
def circulant_of(values):
    size = values.shape[0]
    return keras.ops.take(values, (np.arange(size)[None, :] - np.arange(size)[:, None]) % size)


applied = tether.ops.apply(circulant_of, ring)
print("the same matrix:", np.array_equal(applied.numpy(), circulant.numpy()))

# %% [markdown]
# ## In a layer
#
# The layer learns to take the mean of neighbours on the ring. Only the twelve numbers are stored.

# %%
layer = tether.tie(keras.layers.Dense(12, use_bias=False, name="ring_layer"), kernel=applied)
model = keras.Sequential([keras.Input((12,)), layer])
model.compile(keras.optimizers.Adam(0.05), "mse")
x = np.random.default_rng(0).normal(size=(256, 12)).astype("float32")
y = (np.roll(x, 1, axis=1) + x + np.roll(x, -1, axis=1)) / 3
model.fit(x, y, epochs=40, verbose=0)
print(f"{model.count_params()} stored numbers, loss {model.evaluate(x, y, verbose=0):.1e}")
print(np.round(ring.numpy(), 2))

# %% [markdown]
# What it computes is the same everywhere on the ring: shifted inputs give shifted outputs.

# %%
shifted = model.predict(np.roll(x, 3, axis=1), verbose=0)
difference = np.abs(shifted - np.roll(model.predict(x, verbose=0), 3, axis=1)).max()
print(f"largest difference {difference:.1e}")

# %% [markdown]
# ## Saved and loaded
#
# The file has the twelve numbers, and the name of the function.

# %%
model.save("ring.keras")
again = keras.saving.load_model("ring.keras")
print(again.layers[0].kernel)

# %%
assert np.array_equal(applied.numpy(), circulant.numpy())
assert model.count_params() == 12
assert difference < 1e-4
assert np.allclose(again.predict(x, verbose=0), y, atol=0.1)
