"""Files of named tensors: safetensors of a model, and the folders of PEFT.

`safetensors` is the format, and the model in it; `dialects` are other names and layouts; `peft` is the folder that
PEFT reads. The file of one adapter is written by `tether.adapters`.
"""
