"""Models on many devices, by the engines that exist: Tether says how what it stores is to lie there.

A stored weight has one layout, on its own axes. Every use's layout, and that of every part of a form, follows from it
through the expressions. `layout_map` hands the result to `keras.distribution`. `fully_shard` (`fsdp`) brings a model to
PyTorch's FSDP2, and `fsdp_module` gives what FSDP2 made of it: read `fsdp` first (which weights are one group), then
`carriers` (what PyTorch sees of them) and `keras_seam.sharding` (what Keras sees). `gathering` is about programs that
run in several processes: reading what lies on others, and for how long they wait.
"""

from tether.distribution.fsdp import fsdp_module, fully_shard
from tether.distribution.gathering import gathering, time_limit
from tether.distribution.layout_map import layout_map

__all__ = ["fsdp_module", "fully_shard", "gathering", "layout_map", "time_limit"]
