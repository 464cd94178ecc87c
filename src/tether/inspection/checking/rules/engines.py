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
            if key in reported:
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
    """TensorFlow cannot train it in a replica, or each replica writes to it."""
    variables = context.model.variables
    inside = [variable for variable in variables if keras_seam.strategy_of(variable) is not None]
    if not inside:
        return
    scope = (
        f"the scope of the `{type(keras_seam.strategy_of(inside[0])).__name__}` of {context.unique_path(inside[0])!r}"
    )
    for variable in variables:
        if keras_seam.strategy_of(variable) is None:
            yield Finding(
                "outside-strategy",
                "error",
                context.unique_path(variable),
                f"This variable was made outside of {scope}. It has no copy on each replica, and training it fails.",
                "with strategy.scope():\n    model = ...  # all that makes variables: layers, ties, adapters",
            )
    optimizer = getattr(context.model, "optimizer", None)
    if optimizer is not None and keras_seam.strategy_of(optimizer.iterations) is None:
        yield Finding(
            "outside-strategy",
            "error",
            optimizer.name,
            f"This optimizer was made outside of {scope}. Each replica adds to its counter of steps, which "
            "schedules of the learning rate and `Follow` read: it counts a step once for each replica.",
            "with strategy.scope():\n    model.compile(...)  # with a new optimizer",
        )
