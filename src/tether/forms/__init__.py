"""Ready-made ways to combine a child's own weights with a base: the forms of the literature, one file each.

A form has no shape of its own. It takes it from the expression that it is called with, added to or
multiplied with, and brings weights of its own:

```python
child = tether.inherit(parent, kernel=tether.forms.dora(8))
base = tether.Weight(shape=(16, 64), name="base")
layer = tether.tie(keras.layers.Dense(64), kernel=base + tether.low_rank(8))
```

A module of this package is a form: what it lists in `__all__` is public here. A new one needs no line
anywhere else.
"""

import importlib
import pkgutil

__all__: list[str] = []

for _module in sorted(found.name for found in pkgutil.iter_modules(__path__)):
    _loaded = importlib.import_module(f"{__name__}.{_module}")
    for _name in _loaded.__all__:
        globals()[_name] = getattr(_loaded, _name)  # the function takes the place of the module of its name
        __all__ += [_name]
