"""Models on many devices, by the engines that exist: Tether says how what it stores is to lie there.

A stored weight has one layout, on its own axes. Every use's layout, and that of every part of a form, follows from it
through the expressions. `layouts` hands the result to `keras.distribution` as a layout map. `processes` is about
programs that run in several processes of JAX: what they do in step, and for how long they wait.

`fully_shard` brings a model to PyTorch's FSDP2, and `fsdp_module` gives what FSDP2 made of it; `gathered` reads the
values of a sharded model whole. Read `sharding` first (which weights are one group), then `carriers` (what PyTorch
sees of them) and `keras_seam.sharding` (what Keras sees).
"""

from tether.distribution.layouts import layout_map
from tether.distribution.processes import gathering, time_limit
from tether.distribution.sharding import fsdp_module, fully_shard, gathered

__all__ = ["fsdp_module", "fully_shard", "gathered", "gathering", "layout_map", "time_limit"]
