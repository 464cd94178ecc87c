"""Rules about the engines that train on many devices: what they store, and what Keras computes with."""

from __future__ import annotations

from collections.abc import Iterator

from tether import keras_seam
from tether.inspection.checking.context import Context
from tether.inspection.checking.finding import Finding, rule

FULLY_SHARD = (
    "model = ...  # made anew\n"
    "tether.distribution.fully_shard(model)  # in the place of torch.distributed.fsdp.fully_shard(model)"
)


@rule("replaced-parameter", "a parameter that PyTorch has for a model and that its layers do not compute with")
def replaced_parameter(context: Context) -> Iterator[Finding]:
    """FSDP2 registers parameters of its own, and Keras's variables keep the old ones unless they are told."""
    reported: set[str] = set()
    for layer in context.layers:
        for key, variable in keras_seam.stray_parameters(layer):
            if variable is None or key in reported:
                continue
            reported.add(key)
            yield Finding(
                "replaced-parameter",
                "error",
                context.unique_path(variable),
                f"The parameter that PyTorch lists for {layer.name!r} under {key!r} is not the one that the layer "
                "computes with: somebody has put another in its place, as PyTorch's `fully_shard` (FSDP2) does, and "
                "the Keras variable has the old one. An optimizer of PyTorch's steps the listed one, which gets no "
                "gradient, so the model does not train.",
                FULLY_SHARD,
            )


@rule("outside-strategy", "a variable that was not made in the scope of the strategy that has the model's others")
def outside_strategy(context: Context) -> Iterator[Finding]:
    """TensorFlow cannot assign to it in a replica, and no replica has a copy of its own."""
    variables = context.model.variables
    outside = [variable for variable in variables if not keras_seam.strategy_of(variable)]
    if not outside or len(outside) == len(variables):
        return
    inside = next(variable for variable in variables if keras_seam.strategy_of(variable))
    for variable in outside:
        yield Finding(
            "outside-strategy",
            "error",
            context.unique_path(variable),
            f"This variable was made outside of the scope in which {context.unique_path(inside)!r} was made, a "
            f"`{type(keras_seam.strategy_of(inside)).__name__}`. It has no copy on each replica, and training it there "
            "fails.",
            "with strategy.scope():\n    model = ...  # everything that makes variables: layers, ties, adapters",
        )
