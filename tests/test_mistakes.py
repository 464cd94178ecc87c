"""What users of Tether get wrong, and what they are told: no error is obscure, and none is missing.

Each mistake has a grade. A: the error says what was expected, what came and what to write instead, and names the layer,
the weight or the file. B: two of these three. C: one. D: an error of Keras, NumPy or Python that does not lead to the
mistake. F: no error, and a wrong result. None is below B.
"""

import re
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import pytest
from keras import layers

import tether

pytestmark = pytest.mark.spread(2)
ERROR = tether.TetherError


class Mistake(NamedTuple):
    grade: str
    code: str
    """What the user writes, with the names of `names`."""
    says: str
    """A regular expression that the text of the error has to fit, anywhere."""
    kind: type[Exception] = ERROR


MISTAKES = [
    # ---- tying
    Mistake(
        "A",
        "tie(dense(), kernel=dense('other', 7))",
        r"'kernel' of 'dense' has shape .*'kernel' of 'other', which it is to share, has shape",
    ),
    Mistake(
        "A", "tie(dense(), kernel=dense('other').kernel)", r"its layer owns it.*`tether\.weight_of\(layer, 'kernel'\)`"
    ),
    Mistake(
        "A", "tie(dense(), kernel=tether.low_rank)", r"'kernel' of layer 'dense'.*`low_rank` has to be called.*function"
    ),
    Mistake(
        "A",
        "tie(dense(), kernel=tether.low_rank(2))",
        r"'kernel'.*weight_of\(layer, 'kernel'\) \+ tether\.low_rank.*LowRank",
    ),
    Mistake(
        "A", "tie(dense(), kernel='w')", r"'kernel' of 'dense' is to share 'w' of 'dense', which has no such weight"
    ),
    Mistake(
        "A", "tie(dense(), kernel=lambda w: 2 * w)", r"`function\(tether\.weight_of\(layer, 'kernel'\)\)`.*'function'"
    ),
    Mistake("B", "tie(dense(), kernel=None)", r"'kernel' of layer 'dense'.*a `tether\.Weight`.*NoneType"),
    Mistake(
        "A",
        "tie(tie(dense(), kernel=w), kernel=tie(dense(), kernel=w).kernel)",
        r"`tether\.weight_of\(layer, 'kernel'\)`",
    ),
    Mistake(
        "A",
        "tie(dense('b', 8, 4), kernel=tie(dense(), kernel=w).kernel.T)",
        r"dense/kernel.*`tether\.weight_of\(layer, 'kernel'\)\.T`",
        AttributeError,
    ),
    Mistake(
        "A",
        "tie(dense(), kernel=w).kernel.reshape(4, 8)",
        r"`tether\.weight_of\(layer, 'kernel'\)\.reshape`",
        AttributeError,
    ),
    Mistake(
        "A", "tie(dense('b', 8, 4), kernel=w)", r"'kernel' of layer 'b'.*\(4, 8\).*codec.*\(8, 4\).*`kernel=codec\.T`"
    ),
    Mistake("A", "tie(dense('b', 4, 5), kernel=w)", r"'kernel' of layer 'b'.*`kernel=codec\[:5, :\]`"),
    Mistake("A", "tie(dense('b', 12, 2), kernel=heads)", r"\(2, 12\).*`kernel=heads\.reshape\(2, 12\)`"),
    Mistake("A", "tie(einsum(), kernel=heads)", r"\(3, 2, 4\).*`kernel=heads\.transpose\(1, 0, 2\)`"),
    Mistake("B", "tie(dense(), bias=w)", r"'bias' of layer 'dense'.*\(4,\).*codec has shape \(8, 4\)"),
    Mistake("A", "tie(dense(), kernle=w)", r"'dense'.*no weight 'kernle'.*Did you mean 'kernel'.*kernel, bias"),
    Mistake("A", "tie(layers.Dense(4), kernle=w).build((None, 8))", r"no weight 'kernle'.*Did you mean 'kernel'"),
    Mistake(
        "B", "tie(layers.Dense(4, name='d'), kernel=w).build((None, 9))", r"'kernel' of layer 'd'.*\(9, 4\).*\(8, 4\)"
    ),
    Mistake(
        "B", "tie(layers.Dense(4, use_bias=False), bias=bias).build((None, 8))", r"no weight 'bias'.*It has: kernel"
    ),
    Mistake("A", "tie(two(), {'hed/kernel': w})", r"'net'.*'hed/kernel'.*Did you mean 'head/kernel'"),
    Mistake("A", "tie(two(), {'head.kernel': w})", r"Did you mean 'head/kernel'"),
    Mistake("A", "tie(two(), {'head': w})", r"'head' of layer 'net' names a layer.*head/kernel, head/bias"),
    Mistake("A", "tie(two(), kernel=w)", r"'net'.*no weight 'kernel'.*'hidden/kernel' or 'head/kernel'"),
    Mistake("A", "tie(dense())", r"at least one weight of layer 'dense'.*`tie\(layer, kernel=w\)`.*kernel, bias"),
    Mistake("A", "tie(dense(), w)", r"`tie\(layer, kernel=w\)`.*Weight codec"),
    Mistake("A", "tie(w, kernel=dense())", r"Keras layer.*'codec' is what a layer is tied to.*Received"),
    Mistake("A", "tie('dense', kernel=w)", r"Keras layer.*`model\.get_layer\('dense'\)`"),
    Mistake("A", "tie(layers.Dense, kernel=w)", r"Keras layer.*`Dense\(\.\.\.\)`"),
    Mistake("B", "tie(two().layers, kernel=w)", r"Keras layer.*call it for each.*Received"),
    Mistake("A", "tie(dense(), {'kernel': w}, kernel=w)", r"'kernel' is given twice.*Give it once"),
    Mistake("A", "tie(dense(), {'kernel': w, '_kernel': 2 * w})", r"'kernel' and '_kernel'.*'dense'.*Give one of them"),
    Mistake("A", "tether.untie(dense(), 'kernel')", r"'kernel' of layer 'dense' is not tied.*Tied are: none"),
    Mistake("A", "tether.untie(tie(dense(), kernel=w), 'bias')", r"'bias'.*is not tied.*Tied are: kernel"),
    Mistake("A", "tether.weight_of(attention(), 'query')", r"'reader'.*'query'.*Did you mean 'attention/query/kernel'"),
    Mistake("B", "tether.weight_of(two(), 0)", r"a path such as 'kernel'.*path=0"),
    Mistake(
        "A", "tether.materialize(layers.Dense(4, name='d'))", r"is built, and 'd' is not.*`d\.build\(input_shape\)`"
    ),
    # ---- making weights
    Mistake("A", "tether.Weight('codec')", r"tuple of integers.*`tether\.Weight\(name='codec'\)`.*shape='codec'"),
    Mistake("A", "tether.Weight(8, 4)", r"`tether\.Weight\(\(8, 4\)\)`"),
    Mistake("A", "tether.Weight((None, 4))", r"tuple of integers.*leave the shape out.*\(None, 4\)"),
    Mistake("B", "tether.Weight((8, -4))", r"sizes of 0 or more.*\(8, -4\)"),
    Mistake(
        "A",
        "tether.Weight(shape=(8, 4), initializer='glorot')",
        r"Did you mean.*'glorot_uniform'.*initializer='glorot'",
    ),
    Mistake("A", "tether.Weight((8, 4), regularizer='l3')", r"regularizer.*Did you mean.*'l2'.*regularizer='l3'"),
    Mistake("B", "tether.Weight((8, 4), constraint='positive')", r"constraint.*non_neg.*constraint='positive'"),
    Mistake("A", "tether.Weight((8, 4), dtype='flot32')", r"Did you mean 'float32'.*dtype='flot32'"),
    Mistake("A", "tether.Weight((8, 4), name='a/b')", r"without '/'.*'encoder\.kernel'.*name='a/b'"),
    Mistake("B", "tether.Weight((8, 4), trainable='no')", r"True or False.*trainable='no'"),
    Mistake("A", "tether.Weight(dense().kernel)", r"`tether\.weight_of\(layer, 'kernel'\)`"),
    Mistake("A", "tether.Weight(dense())", r"`tether\.weight_of\(dense, 'kernel'\)`"),
    Mistake("B", "tether.Weight((8, 4), np.ones((4, 8)))", r"shape=\(8, 4\), array=\(4, 8\)"),
    # ---- expressions where tensors are, and tensors where expressions are
    Mistake("A", "w(x)", r"'codec' was called.*`tether\.tie\(layer, kernel=w\)`"),
    Mistake("A", "np.sum(w)", r"`tether\.ops\.sum` makes an expression.*codec"),
    Mistake("A", "np.exp(w)", r"`tether\.ops\.exp`.*codec"),
    Mistake("A", "np.asarray(w)", r"codec was used where.*`\.numpy\(\)`"),
    Mistake("A", "keras.ops.matmul(x, w)", r"codec was used where.*`keras\.ops\.matmul\(x, w\.value\)`"),
    Mistake("A", "keras.Input((8,)) @ w", r"`tether\.Lambda\(lambda x, w: x @ w, w=w\)\(x\)`"),
    Mistake("A", "len(w)", r"codec was used where.*`\.numpy\(\)`"),
    Mistake("A", "float(w)", r"codec.*number is expected.*`float\(w\.numpy\(\)\)`"),
    Mistake("A", "w > 0", r"codec was compared with 0.*`tether\.ops\.maximum\(w, 0\)`"),
    Mistake("A", "if w > 0: pass", r"codec was compared with 0.*`w\.numpy\(\) > 0`"),
    Mistake("A", "tether.ops.where(w == 0, w, 1.0)", r"`tether\.ops\.apply\(keras\.ops\.equal, w, 0\)`.*False"),
    Mistake("A", "for row in w: pass", r"codec was iterated over.*`\[w\[0\], w\[1\]\]`"),
    Mistake("A", "3 in w", r"codec.*`in`"),
    Mistake("A", "w[0] = 1", r"codec.*immutable.*`w\.assign\(value\)`"),
    Mistake("A", "w.value = np.ones((8, 4))", r"'codec'.*`w\.assign\(value\)`"),
    Mistake("A", "(2 * w).trainable = False", r"2 \* codec.*immutable.*`w\.trainable = False`", AttributeError),
    Mistake("A", "w + dense()", r"codec.*`tether\.weight_of\(dense, 'kernel'\)`.*Dense"),
    Mistake("A", "w + tether.low_rank", r"codec.*`low_rank` has to be called"),
    Mistake("A", "w + 'bias'", r"codec.*`tether\.weight_of\(layer, 'bias'\)`"),
    Mistake("A", "w + dense().kernel", r"`tether\.weight_of\(layer, 'kernel'\)`"),
    Mistake("A", "w[[1, 2]]", r"`tether\.ops\.take\(x, indices, axis\)`.*\[1, 2\]"),
    Mistake("B", "w[20]", r"codec has shape \(8, 4\); codec\[20\]"),
    Mistake("B", "w['a']", r"index must be an integer.*'a'"),
    Mistake("B", "heads.transpose(0, 1)", r"heads\.transpose\(0, 1\).*3 axes.*\(0, 1\)"),
    Mistake("A", "w.reshape(3, 5)", r"codec has shape \(8, 4\).*`reshape\(8, -1\)`.*\(3, 5\)"),
    Mistake("B", "w @ w", r"codec @ codec.*\(8, 4\).*last size"),
    Mistake("B", "w + np.ones((3, 3), 'float32')", r"codec has shape \(8, 4\).*\(3, 3\)"),
    Mistake("A", "w.astype('flot32')", r"Did you mean 'float32'.*'flot32'"),
    Mistake("A", "w ** w", r"exponent.*`tether\.ops\.apply\(keras\.ops\.power, x, y\)`.*codec"),
    Mistake("A", "2 ** w", r"codec.*`tether\.ops\.exp\("),
    Mistake("B", "w.sum(2)", r"sum\(codec, axis=2\).*\(8, 4\).*axis=2"),
    Mistake("A", "blank.numpy()", r"'blank' has no shape yet.*`tether\.Weight\("),
    Mistake("A", "blank.mT", r"blank.*`tether\.Weight\("),
    Mistake("B", "w.assign(np.ones((4, 8)))", r"'codec' has shape \(8, 4\).*\(4, 8\)"),
    Mistake("A", "(w @ w.T).assign(np.ones((8, 8)))", r"codec @ codec\.T has no inverse.*weights themselves \(codec\)"),
    # ---- functions of expressions
    Mistake("A", "tether.ops.einsum('ij,jk', w, w)", r"'ij,jk->ik'.*equation='ij,jk'"),
    Mistake("A", "tether.ops.einsum(w, 'ij->ji')", r"equation comes first.*'ij,jk->ik'.*codec"),
    Mistake("B", "tether.ops.einsum('ij,jk->ik', w)", r"names 2 operands.*1 came: codec"),
    Mistake("B", "tether.ops.einsum('ijk->i', w)", r"names 3 axes.*codec has shape \(8, 4\)"),
    Mistake("A", "tether.ops.einsum('...i->i', w)", r"no '\.\.\.', as in 'ij,jk->ik'.*'\.\.\.i->i'"),
    Mistake("A", "tether.ops.concatenate(w, w)", r"`tether\.ops\.concatenate\(\[a, b\], axis=0\)`.*codec"),
    Mistake("B", "tether.ops.concatenate([w, heads])", r"codec has shape \(8, 4\), heads has shape \(2, 3, 4\)"),
    Mistake("B", "tether.ops.take(w, [99])", r"codec has 8 entries.*99"),
    Mistake("A", "tether.ops.apply(lambda v: v, w)", r"`@keras\.saving\.register_keras_serializable\(\)`.*lambda"),
    Mistake("A", "tether.ops.tanh(w)", r"`tether\.ops\.apply\(keras\.ops\.tanh, w\)`", AttributeError),
    Mistake("A", "tether.lowrank(8)", r"'lowrank'.*Did you mean 'low_rank'", AttributeError),
    Mistake("A", "tether.forms.lora(8)", r"'lora'.*`tether\.low_rank\(8\)`", AttributeError),
    # ---- forms, parents and children
    Mistake("A", "tether.inherit(dense(), kernel=tether.low_rank)", r"`tether\.low_rank\(8\)`.*rank=<Weight"),
    Mistake(
        "A",
        "tether.inherit(dense(), tether.low_rank(2))",
        r"`inherit\(parent, kernel=tether\.low_rank\(8\)\)`.*LowRank",
    ),
    Mistake(
        "A",
        "tether.inherit(dense(), tether.forms.compose)",
        r"`inherit\(parent, tether\.forms\.compose\(10\)\)`.*function",
    ),
    Mistake(
        "A", "tether.inherit(dense(), kernel=tether.forms.compose(3))", r"'kernel'.*`inherit\(parent, form\)`.*Compose"
    ),
    Mistake(
        "A", "tether.inherit(custom(), tether.forms.compose(3))", r"`tether\.tie\(child, kernel=w @ own\)`.*Custom"
    ),
    Mistake(
        "A",
        "tether.inherit(custom(), tether.forms.concatenate(3))",
        r"kernel=tether\.ops\.concatenate\(\[w, own\], -1\)\)`.*Custom",
    ),
    Mistake("A", "tether.inherit(dense(), {'*': tether.low_rank(2)})", r"dense\.bias has 1.*'\*kernel'.*\(4,\)"),
    Mistake("A", "bias + tether.low_rank(2)", r"two or more axes, and bias has 1.*`tether\.forms\.full\(\)`"),
    Mistake("A", "tether.forms.dora(2)(bias)", r"two or more axes, and bias has 1"),
    Mistake("A", "blank + tether.low_rank(2)", r"blank has none yet.*`tether\.Weight\("),
    Mistake("B", "tether.low_rank(0)", r"whole number of 1 or more.*rank=0"),
    Mistake("A", "tether.inherit(layers.Dense(4, name='d'))", r"built, and 'd' is not.*`d\.build\(input_shape\)`"),
    Mistake(
        "A",
        "tether.inherit(dense(), into=layers.Conv2D)",
        r"Conv2D.*'dense'.*`inherit\(parent, into=Conv2D\(\.\.\.\)\)`.*filters",
    ),
    Mistake(
        "A", "tether.inherit(dense(), into=layers.Dense(6, name='child'))", r"'child'.*\(8, 6\).*\(8, 4\).*share=False"
    ),
    Mistake("A", "tether.inherit(dense(), share='kernel')", r"`share=\['kernel'\]`.*share='kernel'"),
    Mistake("A", "tether.inherit(dense(), kernle=tether.low_rank(2))", r"no weight 'kernle'.*Did you mean 'kernel'"),
    Mistake("A", "tether.extend(Custom())", r"`@tether\.extend` above.*Custom"),
    # ---- adapters
    Mistake(
        "A",
        "tether.adapters.add(attention(), 'a', ['query', 'value'])",
        r"`\{'\*/query/kernel': tether\.low_rank\(8\)\}`.*\['query', 'value'\]",
    ),
    Mistake(
        "A",
        "tether.adapters.add(attention(), 'a', {'*/query/kernel': 8})",
        r"'attention/query/kernel'.*`tether\.low_rank\(8\)`.*change=8",
    ),
    Mistake(
        "A",
        "tether.adapters.add(attention(), 'a', {'*/qurey/kernel': tether.low_rank(2)})",
        r"'\*/qurey/kernel'.*Did you mean 'attention/query/kernel'.*10 weights",
    ),
    Mistake(
        "A",
        "tether.adapters.add(attention(), 'a', {'query': tether.low_rank(2)})",
        r"'query'.*Did you mean 'attention/query/kernel'",
    ),
    Mistake(
        "A",
        "tether.adapters.add(layers.Dense(4, name='d'), 'a', {'kernel': tether.low_rank(2)})",
        r"'d' is not built.*`d\.build\(input_shape\)`",
    ),
    Mistake(
        "A", "tether.adapters.add(adapted(), 'a', {'*/query/kernel': tether.low_rank(2)})", r"'reader' has: a.*name='a'"
    ),
    Mistake(
        "A",
        "tether.adapters.combine(adapted(), {'a': 1.0}, into='b', method='linaer')",
        r"Did you mean 'linear'.*method='linaer'",
    ),
    Mistake(
        "A", "tether.adapters.combine(adapted(), ['a'], into='b')", r"`\{'french': 0\.7, 'german': -0\.3\}`.*\['a'\]"
    ),
    Mistake("B", "tether.adapters.set_strengths(adapted(), {'a': float('nan')})", r"adapter 'a'.*finite number.*a=nan"),
    Mistake(
        "A", "tether.adapters.set_strengths(adapted(), 0.5)", r"`set_strengths\(model, \{'french': 0\.3\}\)`.*0\.5"
    ),
    Mistake("A", "tether.adapters.activate(adapted(), 'A')", r"'reader' has no adapter 'A'.*It has: a"),
    Mistake("A", "tether.adapters.merge(adapted(), 'a')", r"`merge\(model, \['a'\]\)`"),
    Mistake("A", "tether.adapters.unmerge(adapted())", r"'reader' are not merged.*`tether\.adapters\.merge\(model\)`"),
    Mistake("B", "tether.adapters.save(adapted(), 'a', folder / 'a.keras')", r"ends in '\.safetensors'.*a\.keras"),
    Mistake("B", "tether.adapters.load(attention(), folder)", r"adapter_config\.json.*folder="),
    Mistake(
        "B",
        "tether.adapters.load(two(), peft(folder))",
        r"'net'.*'attention\.query' of the adapter.*`names=\.\.\.`.*hidden",
    ),
    # ---- calls
    Mistake("A", "tether.route(dense(), kernel=[w, 2 * w])(x, choice=5)", r"'choice' is one of: 0.*choice=5"),
    Mistake("A", "tether.route(dense(), kernel=[w, 2 * w])(x, choice=0.5)", r"'choice' is one of: 0.*choice=0\.5"),
    Mistake("A", "tether.route(dense(), kernel=w)", r"'kernel'.*`tether\.tie`.*codec"),
    Mistake("A", "tether.route(dense())", r"`route\(layer, kernel=\[parent, own\]\)`"),
    Mistake("B", "tether.route(dense(), kernel=[w, bias])", r"codec has shape \(8, 4\), bias has shape \(4,\)"),
    Mistake("A", "tether.call(dense(), x)", r"'dense'.*`call\(layer, x, kernel=tensor\)`"),
    Mistake(
        "B",
        "tether.call(dense(), x, kernel=np.ones((4, 8)))",
        r"'kernel' of layer 'dense' has shape \(8, 4\).*\(4, 8\)",
    ),
    Mistake(
        "A", "tether.Lambda(lambda x, w: x @ w)(x)", r"needs w.*no weights.*`tether\.Lambda\(function, w=\.\.\.\)`"
    ),
    Mistake("B", "tether.Lambda(lambda x: x, w=w)", r"no parameter 'w'.*It has: x"),
    Mistake("A", "tether.Lambda(w)", r"`tether\.Lambda\(lambda x, w: x @ w, w=weight\)`.*codec"),
    Mistake(
        "A",
        "tie(dense(), kernel=tether.weights.Argument('scale') * w)(x)",
        r"'scale' has no value.*`layer\(x, scale=value\)`",
    ),
    # ---- files
    Mistake(
        "A", "tether.files.load_model(folder / 'modle.keras')", r"no file '.*modle\.keras'.*Did you mean 'model\.keras'"
    ),
    Mistake("A", "tether.files.load_model(folder)", r"It is a folder: name a file in it.*model\.keras"),
    Mistake(
        "A",
        "tether.files.load_model(folder / 'old.h5')",
        r"old\.h5' is no '\.keras' file.*`model\.load_weights\(path\)`",
    ),
    Mistake(
        "B", "tether.files.load_model(folder / 'no' / 'model.keras')", r"no folder '.*no' either; the present one is"
    ),
    Mistake(
        "A", "tether.files.load_safetensors(two(), folder / 'none.safetensors')", r"no file.*Its folder has: .*old\.h5"
    ),
    Mistake(
        "B", "tether.files.load_peft(two(), folder)", r"adapter_config\.json and adapter_model\.safetensors.*folder="
    ),
    Mistake("A", "tether.files.save_model(two(), folder / 'no' / 'model.keras')", r"no folder '.*no'.*`os\.makedirs\("),
    Mistake(
        "A",
        "tether.files.save_model(two(), folder / 'model.h5')",
        r"ends in '\.keras', as in 'model\.keras'.*model\.h5",
    ),
    Mistake(
        "B",
        "tether.files.export(two(), folder / 'a', format='savedmodel')",
        r"'tf_saved_model', 'onnx'.*format='savedmodel'",
    ),
    Mistake(
        "A", "tether.plot(two(), folder / 'no' / 'map.html')", r"no folder '.*no'.*`os\.makedirs\(", FileNotFoundError
    ),
    Mistake("A", "tether.summary(folder / 'modle.keras')", r"no file.*Did you mean 'model\.keras'", FileNotFoundError),
    # ---- looking
    Mistake("A", "tether.check(layers.Dense(4, name='d'))", r"'d' is not built.*`d\.build\(input_shape\)`"),
    Mistake(
        "B",
        "tether.plot(keras.Sequential([layers.Dense(4)], name='s'), folder / 'a.html')",
        r"'s' has no weights.*give it an Input",
    ),
    Mistake(
        "A",
        "tether.transfer.copy(dense(), layers.Dense(4, name='b'))",
        r"built, and 'b' is not.*`b\.build\(input_shape\)`",
    ),
    Mistake("B", "tether.transfer.copy(dense(), dense('b', 6))", r"'kernel'.*\(8, 4\).*\(8, 6\).*fill='zeros'"),
    Mistake(
        "A",
        "tether.transfer.soft_tie(two(), 'head/kernle', 'hidden/kernel', 0.1)",
        r"'head/kernle'.*Did you mean 'head/kernel'",
    ),
]


class Custom(layers.Layer):
    def __init__(self, units=4, **kwargs):
        super().__init__(**kwargs)
        self.units = units

    def build(self, input_shape):
        self.kernel = self.add_weight(name="kernel", shape=(input_shape[-1], self.units))

    def call(self, inputs):
        return keras.ops.matmul(inputs, self.kernel)


def dense(name="dense", units=4, size=8):
    layer = layers.Dense(units, name=name)
    layer.build((None, size))
    return layer


def einsum():
    layer = layers.EinsumDense("abc,cde->abde", output_shape=(None, 2, 4), name="einsum")
    layer.build((None, 5, 3))
    return layer


def custom(units=4):
    layer = Custom(units, name="custom")
    layer.build((None, 8))
    return layer


def two():
    return keras.Sequential(
        [keras.Input((8,)), layers.Dense(6, name="hidden"), layers.Dense(4, name="head")], name="net"
    )


def attention():
    inputs = keras.Input((5, 8))
    outputs = layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs)
    return keras.Model(inputs, layers.Dense(3, name="head")(outputs), name="reader")


def adapted():
    return tether.adapters.add(attention(), "a", {"*/query/kernel": tether.low_rank(2)})


def peft(folder: Path):
    """A folder as PEFT writes it, of an adapter of another model."""
    tether.files.save_peft(adapted(), folder / "peft")
    return folder / "peft"


def names(folder: Path):
    """What the code of a mistake may name."""
    (folder / "model.keras").write_bytes(b"")
    (folder / "old.h5").write_bytes(b"")
    made = {
        "w": tether.Weight(np.ones((8, 4), "float32"), name="codec"),
        "bias": tether.Weight(np.ones((4,), "float32"), name="bias"),
        "heads": tether.Weight(np.ones((2, 3, 4), "float32"), name="heads"),
        "blank": tether.Weight(name="blank"),
        "x": np.ones((2, 8), "float32"),
        "folder": folder,
        "tie": tether.tie,
    }
    makers = (Custom, adapted, attention, custom, dense, einsum, peft, two)
    return {
        **made,
        **{maker.__name__: maker for maker in makers},
        "keras": keras,
        "layers": layers,
        "np": np,
        "tether": tether,
    }


@pytest.mark.parametrize("mistake", MISTAKES, ids=[mistake.code for mistake in MISTAKES])
def test_a_mistake_is_told(mistake, tmp_path):
    with pytest.raises(mistake.kind) as caught:
        exec(mistake.code, names(tmp_path))
    said = str(caught.value)
    assert re.search(mistake.says, said, re.DOTALL), said
    if mistake.grade == "A":  # what to write: code, the names that there are, or what to do
        assert re.search(r"`[^`]+`|Did you mean|as in|It has|Its folder has|Give |Take |one of:", said), said


def test_no_mistake_is_told_badly():
    assert len(MISTAKES) >= 100
    assert len({mistake.code for mistake in MISTAKES}) == len(MISTAKES)
    assert {mistake.grade for mistake in MISTAKES} == {"A", "B"}


def test_a_summary_says_why_it_is_empty():
    lines = []
    tether.summary(layers.Dense(4), print_fn=lines.append)
    assert "not built" in " ".join(lines)


@pytest.mark.parametrize(
    "form, units", [(tether.forms.compose(3), 3), (tether.forms.concatenate(3), 7)], ids=["compose", "concatenate"]
)
def test_what_an_error_says_of_a_layer_of_ones_own_works(form, units):
    parent, child = custom(), custom(units)
    with pytest.raises(ERROR) as caught:
        tether.inherit(parent, form)
    (line,) = re.findall(r"`(tether\.tie\(.*?\))`, where", str(caught.value))
    own = tether.Weight(np.ones((4, 3) if units == 3 else (8, 3), "float32"), name="own")
    exec(line, {"tether": tether, "child": child, "w": tether.weight_of(parent, "kernel"), "own": own})
    x = np.ones((2, 8), "float32")
    first = keras.ops.convert_to_numpy(parent(x))
    expected = first @ np.ones((4, 3)) if units == 3 else np.concatenate([first, np.full((2, 3), 8.0)], -1)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(child(x)), expected, rtol=1e-5)
