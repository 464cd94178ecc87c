"""Files of named tensors: safetensors of a model or an adapter, and the folders of PEFT.

`safetensors` is the format and the model in it, `dialects` other names and layouts, `adapter` one adapter's
parts, `peft` the folder that PEFT reads.
"""
