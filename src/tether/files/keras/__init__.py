"""Keras's own files, `.keras` and `.weights.h5`.

`save` verifies that each tie is in the config and writes beside the target, `load` makes the model and reads values;
both stand on `archive`, which reads what a stranger may have written, and `checkpoint`, the values of a file by place.
"""
