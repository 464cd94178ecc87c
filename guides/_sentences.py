"""What the guides about the sentence encoder have in common: sentences, the encoder, how long steps take."""

import ast
import json
import pathlib
import re
import sysconfig
import time

import keras
import numpy as np

import tether

BATCH = 32
"""How many sentences are in a step."""
NOT_DOCUMENTATION = {"test", "tests", "site-packages", "dist-packages"}
"""Folders of the standard library whose files are tests, or belong to other packages."""


def documentation(package=""):
    """The sentences of 6 to 40 words in a package's docstrings, or in those of the whole library, each once."""
    found = {}
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    for file in sorted((library / package).rglob("*.py")):
        if NOT_DOCUMENTATION.intersection(file.relative_to(library).parts):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = " ".join((ast.get_docstring(node) or "").split())
                for sentence in re.split(r"(?<=[.!?]) ", text):
                    if 6 <= len(sentence.split()) <= 40:
                        found[sentence] = None
    return list(found)


def word_pieces(text, vocabulary):
    """The numbers of a text's pieces: the longest beginnings of each word that the vocabulary has."""
    found = []
    for word in re.findall(r"\w+|[^\w\s]", text.lower()):
        start, pieces = 0, []
        while start < len(word):
            ends = range(len(word), start, -1)
            names = ((end, ("##" if start else "") + word[start:end]) for end in ends)
            end, piece = next(((end, name) for end, name in names if name in vocabulary), (0, None))
            if piece is None:
                pieces = [vocabulary["[UNK]"]]
                break
            pieces.append(vocabulary[piece])
            start = end
        found += pieces
    return found


def tokens(text, vocabulary, length):
    """The numbers of a text's pieces between the two marks, cut or filled with zeros to a length."""
    pieces = word_pieces(text, vocabulary)[: length - 2]
    row = [vocabulary["[CLS]"], *pieces, vocabulary["[SEP]"]]
    return row + [0] * (length - len(row))


def encoder_inputs(ids):
    """What the encoder is called with, for rows of tokens."""
    return {"token_ids": ids, "segment_ids": np.zeros_like(ids), "padding_mask": (ids != 0).astype("int32")}


def read_encoder(folder):
    """KerasHub's BERT with the weights and the vocabulary of a folder."""
    import keras_hub

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    encoder = keras_hub.models.BertBackbone(
        vocabulary_size=config["vocab_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        hidden_dim=config["hidden_size"],
        intermediate_dim=config["intermediate_size"],
        max_sequence_length=config["max_position_embeddings"],
        num_segments=config["type_vocab_size"],
        name="bert_backbone",
    )
    tether.files.load_safetensors(encoder, folder / "model.safetensors", names="bert")
    lines = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    return encoder, {word: number for number, word in enumerate(lines)}


class Steps(keras.callbacks.Callback):
    """How long each step took."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_train_batch_begin(self, batch, logs=None):
        self.begun = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.seconds.append(time.perf_counter() - self.begun)

    @property
    def median(self):
        """The median time of a step in seconds; the first one, which compiles, is not counted if there are others."""
        return float(np.median(self.seconds[1:] or self.seconds))
