"""Files of named tensors: safetensors of a model, and the folders of PEFT.

`safetensors` is the format, and the model in it; `dialects` are other names and layouts, of which `presets` has some
as `tables`. Of a folder of PEFT's, `peft_config` is the config, `peft_places` which weight a module is, `peft_parts`
what each kind adds, `peft_loading` the way in; `peft_saving` is the way out, by `peft_tensors`. The file of one adapter
is written by `tether.adapters`.
"""
