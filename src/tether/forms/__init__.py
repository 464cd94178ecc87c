"""Ready-made ways to combine a child's own weights with a base: the forms of the literature, one file each.

A form has no shape of its own. It takes it from the expression that it is called with, added to or
multiplied with, and brings weights of its own:

```python
child = tether.inherit(parent, kernel=tether.forms.dora(8))
base = tether.Weight(shape=(16, 64), name="base")
layer = tether.tie(keras.layers.Dense(64), kernel=base + tether.low_rank(8))
```

A module of this package is a form: what it lists in `__all__` is public here. A new one needs one line below, for type
checkers, which do not see what is found in a folder.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING

from tether.errors import not_there

if TYPE_CHECKING:
    from tether.forms.boft import boft as boft
    from tether.forms.compose import compose as compose
    from tether.forms.concatenate import concatenate as concatenate
    from tether.forms.dora import dora as dora
    from tether.forms.form import AddedForm as AddedForm
    from tether.forms.form import Form as Form
    from tether.forms.form import LayerForm as LayerForm
    from tether.forms.form import ScalingForm as ScalingForm
    from tether.forms.fourier import fourier as fourier
    from tether.forms.full import full as full
    from tether.forms.gate import gate as gate
    from tether.forms.hadamard import hadamard as hadamard
    from tether.forms.kronecker import kronecker as kronecker
    from tether.forms.low_rank import low_rank as low_rank
    from tether.forms.masked import masked as masked
    from tether.forms.oft import oft as oft
    from tether.forms.orthogonal import orthogonal as orthogonal
    from tether.forms.positive import positive as positive
    from tether.forms.rows import rows as rows
    from tether.forms.scale import scale as scale
    from tether.forms.spectral_norm import spectral_norm as spectral_norm
    from tether.forms.symmetric import symmetric as symmetric
    from tether.forms.vera import vera as vera
    from tether.forms.weight_norm import weight_norm as weight_norm

__all__: list[str] = []

for _module in sorted(found.name for found in pkgutil.iter_modules(__path__)):
    _loaded = importlib.import_module(f"{__name__}.{_module}")
    for _name in _loaded.__all__:
        globals()[_name] = getattr(_loaded, _name)  # the function takes the place of the module of its name
        __all__ += [_name]

if not TYPE_CHECKING:  # or every name would pass a type checker

    def __getattr__(name: str) -> object:
        """Says which forms there are."""
        lora = " LoRA is `tether.low_rank(8)`." if "lora" in name.lower() else ""
        raise AttributeError(not_there("tether.forms", name, __all__) + lora)
