"""Adapters as people manage them: named, several on one model, on or off, each in a small file of its own.

An adapter adds a part to some of a model's weights: `base + strength · part`. The base is never written to,
whatever is switched, merged or removed. What an adapter is can be read from the model's expressions alone,
so a saved model keeps its adapters, and a file of one adapter holds nothing else.

```python
for language in ("french", "german"):
    tether.adapters.add(model, language, {"*/query/kernel": tether.low_rank(8)})
tether.adapters.save(model, "french", "french.safetensors")      # kilobytes
tether.adapters.set_strengths(model, {"french": 0.3, "german": 0.7})
```

`manage` adds, switches and merges; `capacity` makes room for many of which each example of a batch chooses one, in
slots that `slotted` writes and reads; `combine` makes one adapter of several; `file` writes and reads one;
`rates` lets the factors of one learn at rates of their own, `starts` starts them from data.
"""

from tether.adapters.capacity import capacity, slots
from tether.adapters.combine import combine
from tether.adapters.file import load, save
from tether.adapters.manage import (
    activate,
    add,
    disabled,
    merge,
    names,
    remove,
    set_strengths,
    strengths,
    trainable,
    unmerge,
)
from tether.adapters.rates import learning_rates
from tether.adapters.starts import start_from

__all__ = [
    "activate",
    "add",
    "capacity",
    "combine",
    "disabled",
    "learning_rates",
    "load",
    "merge",
    "names",
    "remove",
    "save",
    "set_strengths",
    "slots",
    "start_from",
    "strengths",
    "trainable",
    "unmerge",
]
