"""Files of named tensors, with the names and layouts that others give them.

`tensor_file` is the format, `slices` what one process has of a tensor that lies on several; `safetensors` is a model in
it. `dialects` are other names and layouts, of which `presets` has some as `tables`, and `guessing` finds a table by
shapes and values. The file of adapters is written by `tether.adapters`, folders of PEFT's by `tether.files.peft`.
"""
