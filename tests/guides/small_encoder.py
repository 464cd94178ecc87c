"""A BERT of KerasHub's with random weights, and a vocabulary of letters and some words, for the guides' tests."""

import string

import keras


def small_encoder(layers, length, width=16):
    import keras_hub

    keras.utils.set_random_seed(0)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *string.ascii_lowercase, *(f"##{c}" for c in string.ascii_lowercase)]
    words = ["the", "is", "of", "to", "event", "message", "widget", "test", "log", "process", "node", "request"]
    vocabulary = {piece: number for number, piece in enumerate([*pieces, *words])}
    encoder = keras_hub.models.BertBackbone(
        vocabulary_size=len(vocabulary),
        num_layers=layers,
        num_heads=2,
        hidden_dim=width,
        intermediate_dim=2 * width,
        max_sequence_length=length,
        name="bert_backbone",
    )
    return encoder, vocabulary
