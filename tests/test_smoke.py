import keras
import numpy as np

import tether


def test_a_tied_autoencoder_stores_its_kernel_once():
    codec = tether.Weight(name="codec")
    encode = tether.tie(keras.layers.Dense(3), kernel=codec)
    decode = tether.tie(keras.layers.Dense(5), kernel=codec.T)
    decode(encode(np.ones((2, 5), "float32")))
    assert codec.shape == (5, 3)
    assert decode.kernel.shape == (3, 5)
