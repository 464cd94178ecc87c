"""Every layer class in `keras.layers`, found by looking, and how to make a small one of each.

A class that Keras adds and this file does not know makes `test_every_class_is_known` fail.
"""

import inspect
import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

L = keras.layers
BACKEND = keras.backend.backend()


def layer_classes():
    """The layer classes that `keras.layers` exports, each once, under one of their names there."""
    names = {}
    for name in dir(L):
        value = getattr(L, name)
        if inspect.isclass(value) and issubclass(value, L.Layer):
            names.setdefault(value, []).append(name)
    return {cls.__name__ if cls.__name__ in found else found[0]: cls for cls, found in names.items()}


# --------------------------------------------------------------------------- inputs


@dataclass(frozen=True)
class Floats:
    shape: tuple[int, ...]
    low: float = -1.0
    high: float = 1.0

    def sample(self, rng):
        return rng.uniform(self.low, self.high, self.shape).astype("float32")

    def symbolic(self, fixed_batch):
        return keras.Input(self.shape[1:], batch_size=self.shape[0] if fixed_batch else None, dtype="float32")


@dataclass(frozen=True)
class Integers:
    shape: tuple[int, ...]
    below: int

    def sample(self, rng):
        return rng.integers(0, self.below, self.shape).astype("int32")

    def symbolic(self, fixed_batch):
        return keras.Input(self.shape[1:], batch_size=self.shape[0] if fixed_batch else None, dtype="int32")


def images(high=255.0):
    return (Floats((2, 8, 8, 3), 0.0, high),)


def boxed_images():
    boxes = {"boxes": Floats((2, 4, 4), 0.0, 8.0), "labels": Integers((2, 4), 3)}
    return ({"images": Floats((2, 8, 8, 3), 0.0, 255.0), "labels": boxes["labels"], "bounding_boxes": boxes},)


# --------------------------------------------------------------------------- layers


@dataclass(frozen=True)
class Case:
    """One layer: how to make it, and what it is called with."""

    class_name: str
    make: Callable[[], Any]
    inputs: tuple[Any, ...]
    label: str = ""
    quick: str = "all"
    """In how many of the four ways it is tested without `--run-slow`: in "all", in "one", or in "none".
    A second case of a class is tested in one. A loop that the backend compiles anew at every call is slow: its
    class has an unrolled case too."""
    fixed_batch: bool = False
    """Once built for a batch of one size, it takes no other."""

    def __str__(self):
        return f"{self.class_name}-{self.label}" if self.label else self.class_name

    def sample(self, seed=3):
        rng = np.random.default_rng(seed)
        return keras.tree.map_structure(lambda spec: spec.sample(rng), self.inputs)

    def symbolic(self):
        return keras.tree.map_structure(lambda spec: spec.symbolic(self.fixed_batch), self.inputs)

    def built(self):
        layer = self.make()
        layer(*self.sample())
        return layer


def call_jax(params, inputs):
    return inputs @ params["kernel"] + params["bias"]


def init_jax(rng, inputs):
    import jax

    return {"kernel": jax.random.normal(rng, (inputs.shape[-1], 3)), "bias": jax.numpy.zeros((3,))}


keras.saving.register_keras_serializable("tether_conformance")(call_jax)
keras.saving.register_keras_serializable("tether_conformance")(init_jax)


def cases_with_weights():
    """The layers that have weights, several of a class where its arguments change what it stores."""

    def case(class_name, make, *inputs, **options):
        options.setdefault("quick", "one" if "label" in options else "all")
        return Case(class_name, make, inputs, **options)

    vector, sequence, sequence_of_images = Floats((4, 3)), Floats((2, 3, 3)), Floats((2, 3, 5, 5, 2))
    yield case("AdditiveAttention", lambda: L.AdditiveAttention(), [sequence, Floats((2, 5, 3))])
    yield case("Attention", lambda: L.Attention(use_scale=True), [sequence, Floats((2, 5, 3))])
    yield case(
        "Attention",
        lambda: L.Attention(use_scale=True, score_mode="concat"),
        [sequence, Floats((2, 5, 3))],
        label="concat",
    )
    yield case("BatchNormalization", lambda: L.BatchNormalization(momentum=0.5), vector)
    yield case("BatchNormalization", lambda: L.BatchNormalization(center=False), Floats((2, 4, 4, 2)), label="images")
    for label, options in (("unrolled", {"unroll": True}), ("", {})):
        all_ways = {"label": label, "quick": "all" if label else "none"}
        one_way = {"label": label, "quick": "one" if label else "none"}
        loop = {"label": label, "quick": "all" if label else "one"}
        yield case("GRU", lambda options=options: L.GRU(2, **options), sequence, **all_ways)
        yield case("LSTM", lambda options=options: L.LSTM(2, return_sequences=True, **options), sequence, **loop)
        yield case("SimpleRNN", lambda options=options: L.SimpleRNN(2, **options), sequence, **all_ways)
        yield case("RNN", lambda options=options: L.RNN(L.SimpleRNNCell(2), **options), sequence, **all_ways)
        yield case(
            "Bidirectional",
            lambda options=options: L.Bidirectional(L.LSTM(2, return_sequences=True, **options), merge_mode="sum"),
            sequence,
            **all_ways,
        )
        for rank in (1, 2, 3):
            yield case(
                f"ConvLSTM{rank}D",
                lambda rank=rank, options=options: getattr(L, f"ConvLSTM{rank}D")(2, 2, **options),
                Floats((2, 2, *(3,) * rank, 2)),
                **one_way,
            )
    yield case("GRU", lambda: L.GRU(2, reset_after=False, unroll=True), sequence, label="reset-before")
    yield case("LSTM", lambda: L.LSTM(3, use_bias=False, unroll=True), sequence, label="no-bias")
    yield case("RNN", lambda: L.RNN([L.GRUCell(2), L.LSTMCell(2)], unroll=True), sequence, label="cells")
    yield case(
        "Bidirectional",
        lambda: L.Bidirectional(
            L.SimpleRNN(2, unroll=True), backward_layer=L.GRU(2, go_backwards=True, unroll=True), merge_mode="mul"
        ),
        sequence,
        label="two-kinds",
    )
    for rank in (1, 2, 3):
        space, pixels = (5,) * rank, (3,) * rank
        yield case(f"Conv{rank}D", lambda rank=rank: getattr(L, f"Conv{rank}D")(4, 2), Floats((2, *space, 2)))
        yield case(
            f"Conv{rank}DTranspose",
            lambda rank=rank: getattr(L, f"Conv{rank}DTranspose")(4, 2, strides=2),
            Floats((2, *pixels, 2)),
        )
    yield case("Conv2D", lambda: L.Conv2D(4, 3, groups=2, use_bias=False), Floats((2, 5, 5, 2)), label="groups")
    for rank in (1, 2):
        space = (5,) * rank
        yield case(
            f"DepthwiseConv{rank}D", lambda rank=rank: getattr(L, f"DepthwiseConv{rank}D")(2), Floats((2, *space, 2))
        )
        yield case(
            f"SeparableConv{rank}D",
            lambda rank=rank: getattr(L, f"SeparableConv{rank}D")(4, 2),
            Floats((2, *space, 2)),
        )
    yield case("Dense", lambda: L.Dense(5, activation="tanh"), vector)
    yield case("Dense", lambda: L.Dense(3, use_bias=False), sequence, label="square")
    yield case("EinsumDense", lambda: L.EinsumDense("abc,cde->abde", (None, 2, 4), bias_axes="de"), sequence)
    yield case("Embedding", lambda: L.Embedding(7, 3), Integers((2, 4), 7))
    yield case("Embedding", lambda: L.Embedding(7, 3, mask_zero=True), Integers((2, 4), 7), label="masking")
    yield case("GRUCell", lambda: L.GRUCell(2), vector, Floats((4, 2)))
    yield case("GroupNormalization", lambda: L.GroupNormalization(groups=2), Floats((2, 3, 3, 4)))
    yield case(
        "GroupQueryAttention",
        lambda: L.GroupQueryAttention(head_dim=2, num_query_heads=4, num_key_value_heads=2),
        Floats((2, 4, 6)),
        Floats((2, 3, 6)),
    )
    yield case("LSTMCell", lambda: L.LSTMCell(2), vector, [Floats((4, 2)), Floats((4, 2))])
    yield case("LSTMCell", lambda: L.LSTMCell(3, use_bias=False), vector, [vector, vector], label="square")
    yield case("LayerNormalization", lambda: L.LayerNormalization(), sequence)
    yield case("LayerNormalization", lambda: L.LayerNormalization(axis=(1, 2)), sequence, label="axes")
    yield case("MultiHeadAttention", lambda: L.MultiHeadAttention(2, 3), Floats((2, 4, 6)), Floats((2, 3, 6)))
    yield case(
        "MultiHeadAttention",
        lambda: L.MultiHeadAttention(2, 3, value_dim=3, output_shape=5, use_bias=False),
        Floats((2, 4, 6)),
        Floats((2, 3, 6)),
        label="no-bias",
    )
    yield case("Normalization", lambda: L.Normalization(), vector)
    yield case("PReLU", lambda: L.PReLU(shared_axes=(1,)), Floats((2, 4, 3)))
    yield case(
        "Pipeline",
        lambda: L.Pipeline([L.Dense(4, name="first"), L.Dense(2, name="second")]),
        vector,
    )
    yield case("RMSNormalization", lambda: L.RMSNormalization(), sequence)
    yield case("ReversibleEmbedding", lambda: L.ReversibleEmbedding(7, 3), Integers((2, 4), 7))
    yield case(
        "ReversibleEmbedding",
        lambda: L.ReversibleEmbedding(7, 3, tie_weights=False),
        Integers((2, 4), 7),
        label="two",
    )
    yield case(
        "STFTSpectrogram",
        lambda: L.STFTSpectrogram(frame_length=8, frame_step=4, fft_length=8, mode="magnitude", trainable=True),
        Floats((2, 16, 1)),
    )
    yield case("SimpleRNNCell", lambda: L.SimpleRNNCell(3), vector, vector)
    yield case("SpectralNormalization", lambda: L.SpectralNormalization(L.Dense(3, name="inner")), vector)
    yield case(
        "SpectralNormalization",
        lambda: L.SpectralNormalization(L.Conv2D(2, 2, name="inner")),
        Floats((2, 4, 4, 2)),
        label="images",
    )
    yield case(
        "StackedRNNCells",
        lambda: L.StackedRNNCells([L.LSTMCell(2), L.SimpleRNNCell(2)]),
        vector,
        [[Floats((4, 2)), Floats((4, 2))], Floats((4, 2))],
    )
    yield case("TimeDistributed", lambda: L.TimeDistributed(L.Dense(2)), sequence)
    yield case("TimeDistributed", lambda: L.TimeDistributed(L.Conv2D(2, 2)), sequence_of_images, label="images")
    if BACKEND != "torch":
        yield case("JaxLayer", lambda: L.JaxLayer(call_jax, init_jax), vector, fixed_batch=BACKEND == "tensorflow")


def cases_without_weights():
    """The layers that have no weights, with what they are called with."""
    sequence, pictures, volumes = Floats((2, 6, 3)), Floats((2, 6, 6, 3)), Floats((2, 6, 6, 6, 2))
    by_rank = {1: sequence, 2: pictures, 3: volumes}

    def case(class_name, *inputs, **arguments):
        return Case(class_name, lambda: getattr(L, class_name)(**arguments), inputs)

    for kind, rank in itertools.product(("Average", "Max"), (1, 2, 3)):
        yield case(f"Adaptive{kind}Pooling{rank}D", by_rank[rank], output_size=2)
        yield case(f"{kind}Pooling{rank}D", by_rank[rank], pool_size=2)
        yield case(f"Global{kind}Pooling{rank}D", by_rank[rank])
    for rank in (1, 2, 3):
        yield case(f"Cropping{rank}D", by_rank[rank], cropping=1)
        yield case(f"ZeroPadding{rank}D", by_rank[rank], padding=1)
        yield case(f"UpSampling{rank}D", by_rank[rank], size=2)
        yield case(f"SpatialDropout{rank}D", by_rank[rank], rate=0.5)
    for name in ("Add", "Average", "Concatenate", "Maximum", "Minimum", "Multiply", "Subtract"):
        yield case(name, [sequence, sequence])
    yield case("Dot", [sequence, sequence], axes=2)
    for name in ("ELU", "LeakyReLU", "ReLU", "Softmax", "Identity", "Flatten", "Masking", "UnitNormalization"):
        yield case(name, sequence)
    yield case("Activation", sequence, activation="tanh")
    yield case("ActivityRegularization", sequence, l2=0.1)
    for name in ("AlphaDropout", "Dropout", "GaussianDropout"):
        yield case(name, sequence, rate=0.5)
    yield case("GaussianNoise", sequence, stddev=0.5)
    yield case("Lambda", sequence, function=keras.ops.sin)
    yield case("Permute", sequence, dims=(2, 1))
    yield case("RepeatVector", Floats((2, 3)), n=2)
    yield case("Rescaling", sequence, scale=2.0)
    yield case("Reshape", sequence, target_shape=(3, 6))
    yield case("CategoryEncoding", Integers((2, 1), 4), num_tokens=4)
    yield case("MaxNumBoundingBoxes", *boxed_images(), max_number=3, bounding_box_format="xyxy")
    yield case("MelSpectrogram", Floats((2, 64)), fft_length=16, sequence_stride=8, num_mel_bins=4)
    for name in ("CenterCrop", "RandomCrop", "Resizing"):
        yield case(name, *images(), height=4, width=4)
    for name in (
        "AugMix", "AutoContrast", "ContrastLimitedAdaptiveHistogramEqualization", "Equalization", "RandAugment",
        "RandomColorJitter", "RandomElasticTransform", "RandomErasing", "RandomFlip", "RandomGaussianBlur",
        "RandomGrayscale", "RandomInvert", "RandomPerspective", "RandomShear", "Solarization",
    ):  # fmt: skip
        yield case(name, *images())
    for name in (
        "RandomBrightness", "RandomColorDegeneration", "RandomContrast", "RandomHue", "RandomPosterization",
        "RandomRotation", "RandomSaturation", "RandomSharpness",
    ):  # fmt: skip
        yield case(name, *images(), factor=4 if name == "RandomPosterization" else 0.5)
    yield case("RandomTranslation", *images(), height_factor=0.2, width_factor=0.2)
    yield case("RandomZoom", *images(), height_factor=0.2)
    for name in ("CutMix", "MixUp"):
        yield case(name, {"images": Floats((2, 8, 8, 3), 0.0, 255.0), "labels": Floats((2, 3), 0.0, 1.0)})


def wrapped_module():
    import torch

    return L.TorchModuleWrapper(torch.nn.Linear(3, 2))


def saved_model():
    model = keras.Sequential([keras.Input((3,)), L.Dense(2)])
    with tempfile.TemporaryDirectory() as folder:
        model.export(folder, verbose=False)
        return L.TFSMLayer(folder)


NOT_TIED = {
    "Layer": ("it has no weights until somebody writes a layer", lambda: L.Layer(), "kernel"),
    "Wrapper": ("it has no weights, only its layer has", lambda: L.Wrapper(L.Dense(2)), "kernel"),
    "InputLayer": ("it is never called", lambda: L.InputLayer((3,)), "kernel"),
    "Discretization": ("its boundaries are numbers", lambda: L.Discretization([0.0, 1.0]), "bin_boundaries"),
    "Hashing": ("it has no weights", lambda: L.Hashing(3), "kernel"),
    "HashedCrossing": ("it has no weights", lambda: L.HashedCrossing(3), "kernel"),
    "IntegerLookup": ("its vocabulary is a table", lambda: L.IntegerLookup(vocabulary=[1, 2]), "lookup_table"),
    "StringLookup": ("its vocabulary is a table", lambda: L.StringLookup(vocabulary=["a"]), "lookup_table"),
    "TextVectorization": ("its vocabulary is a table", lambda: L.TextVectorization(vocabulary=["a"]), "lookup_table"),
}
"""Classes without a weight to tie: why, how to make one, and a name that a user may try."""

NOT_MADE = {"FlaxLayer": "it needs Flax; it is a JaxLayer otherwise"}
"""Classes of which no instance can be made on this backend."""

if BACKEND == "torch":
    NOT_TIED["TorchModuleWrapper"] = ("the module reads its own parameters", wrapped_module, "variable")
    NOT_MADE["JaxLayer"] = "it needs JAX or TensorFlow"
else:
    NOT_MADE["TorchModuleWrapper"] = "it needs PyTorch"
if BACKEND == "tensorflow":
    NOT_TIED["TFSMLayer"] = ("its variables are those of a SavedModel", saved_model, "kernel")
else:
    NOT_MADE["TFSMLayer"] = "it needs TensorFlow"

WITH_WEIGHTS = [case for case in cases_with_weights() if hasattr(L, case.class_name)]
WITHOUT_WEIGHTS = [case for case in cases_without_weights() if hasattr(L, case.class_name)]
