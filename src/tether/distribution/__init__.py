"""Models on many devices, by the engines that exist.

`fully_shard` brings a model to PyTorch's FSDP2, and `fsdp_module` gives what FSDP2 made of it; `gathered` reads the
values of a sharded model whole. Read `sharding` first (which weights are one group), then `carriers` (what PyTorch
sees of them) and `keras_seam.sharding` (what Keras sees).
"""

from tether.distribution.sharding import fsdp_module, fully_shard, gathered

__all__ = ["fsdp_module", "fully_shard", "gathered"]
