"""Folders of PEFT's, in both directions.

`peft_config` reads the config, `peft_places` finds which weight a module is and in which layout, `peft_parts` says what
each kind of part adds to it; `peft_loading` is the way in, `peft_saving` the way out.
"""
