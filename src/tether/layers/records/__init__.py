"""What a config and a file say of a layer's ties.

`record` is the entry of a config, written and read; `own_values` are the values that a tied layer writes of its own;
`verification` sees to it, before a file is written, that each tie is in the config that goes into it; `reader` makes
the tied layer again.
"""
