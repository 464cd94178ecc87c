"""Loops that a backend compiles once, whatever their length: the step is a function of tensors alone."""

from __future__ import annotations

from collections.abc import Callable

import keras
from keras import backend as _backend

from tether.keras_seam.private import of_this_thread, set_in_this_thread
from tether.types import Function, Nested, Tensor

Step = Callable[[Nested, Nested, Nested], tuple[Nested, Nested]]
"""`(fixed, carry, entry) -> (carry, output)`: structures of tensors; the carry keeps its shapes and dtypes."""


def is_traced_for_a_compiler(*values: Tensor) -> bool:
    """Whether a graph is being made of what is computed now: JAX's `jit`, or TensorFlow's functions.

    PyTorch's compiler reads a Python loop itself.
    """
    name = _backend.backend()
    if name == "tensorflow":
        import tensorflow as tf

        return not tf.executing_eagerly()
    if name == "jax":
        return any(map(_is_inside_jit, values))
    return False


def _is_inside_jit(value: Tensor) -> bool:
    """Whether a tensor is of a graph, or what a gradient's tracer follows is."""
    while value is not None:
        if type(value).__name__ == "DynamicJaxprTracer":
            return True
        value = getattr(value, "primal", None)
    return False


def compiled(function: Function) -> Function:
    """A function that PyTorch compiles at its first call; on the other backends the function itself."""
    if _backend.backend() != "torch":
        return function
    import torch

    found: Function = torch.compile(function)
    return found


def like_an_output(tensor: Tensor) -> Tensor:
    """Inputs of a function that PyTorch has compiled, such that it takes its outputs as well without compiling again.

    What comes of weights that train has a gradient. Inputs of a model have none, and PyTorch compiles a function once
    for each of the two.
    """
    import torch

    if not torch.is_grad_enabled() or tensor.requires_grad or not tensor.is_floating_point():
        return tensor
    return tensor.detach().requires_grad_()


def scan(
    step: Step, fixed: Nested, carry: Nested, entries: Nested, length: int, outputs: Nested, *, remat: bool
) -> Nested:
    """Runs a step `length` times, in a loop of the backend where there is one.

    Args:
        step: What is done at each turn.
        fixed: Tensors that are the same at each turn.
        carry: What the first turn is given; each hands on to the next.
        entries: Tensors whose first axis is as long as the loop: a turn is given its entry.
        length: How many turns.
        outputs: The structure of a turn's outputs, of `keras.KerasTensor`s or `None`s.
        remat: Whether a turn is computed again for its gradient, instead of keeping what it computed.

    Returns:
        What the last turn handed on, and the outputs of all, stacked along a new first axis.
    """
    return _scan(step, fixed, carry, entries, length, outputs, remat)


def repeat_while(
    go_on: Callable[[Nested], Tensor], step: Step, fixed: Nested, carry: Nested, entries: Nested, length: int
) -> Nested:
    """Runs a step as long as something holds of what is handed on, and `length` times at most. It has no gradient.

    Args:
        go_on: What must hold of the carry, whose `"place"` is the number of the turn.
        step: What is done at each turn; its outputs are not kept.
        fixed: Tensors that are the same at each turn.
        carry: What the first turn is given.
        entries: Tensors of which a turn is given one entry.
        length: How many turns at most.

    Returns:
        What the last turn handed on.
    """
    tree = keras.tree

    def is_on(*flat: Tensor) -> Tensor:
        now = tree.pack_sequence_as(carry, list(flat))
        return keras.ops.logical_and(keras.ops.less(now["place"], length), go_on(now))

    def body(*flat: Tensor) -> tuple[Tensor, ...]:
        now = tree.pack_sequence_as(carry, list(flat))
        entry = tree.map_structure(lambda each: keras.ops.take(each, now["place"], axis=0), entries)
        return tuple(tree.flatten(step(fixed, now, entry)[0]))

    return tree.pack_sequence_as(carry, list(keras.ops.while_loop(is_on, body, tuple(tree.flatten(carry)))))


def _make_scan() -> Function:
    name = _backend.backend()
    if name == "jax":
        import jax

        def with_jax(
            step: Step, fixed: Nested, carry: Nested, entries: Nested, length: int, outputs: Nested, remat: bool
        ) -> Nested:
            run = jax.checkpoint(step, prevent_cse=False) if remat else step
            return jax.lax.scan(lambda carry, entry: run(fixed, carry, entry), carry, entries, length=length)

        return with_jax
    if name == "tensorflow":
        return _with_tensorflow
    return _from_python


def _with_tensorflow(
    step: Step, fixed: Nested, carry: Nested, entries: Nested, length: int, outputs: Nested, remat: bool
) -> Nested:
    import tensorflow as tf

    tree = keras.tree
    flat_entries = [tf.convert_to_tensor(each) for each in tree.flatten(entries)]
    flat_carry = [tf.convert_to_tensor(each) for each in tree.flatten(carry)]
    specs = tree.flatten(outputs)
    arrays = [tf.TensorArray(tf.as_dtype(spec.dtype), size=length, element_shape=spec.shape) for spec in specs]
    flat_fixed = [tf.convert_to_tensor(each) for each in tree.flatten(fixed)]

    def run(*tensors: Tensor) -> list[Tensor]:
        first, rest = list(tensors[: len(flat_fixed)]), list(tensors[len(flat_fixed) :])
        of_carry, of_entry = rest[: len(flat_carry)], rest[len(flat_carry) :]
        after, output = step(
            tree.pack_sequence_as(fixed, first),
            tree.pack_sequence_as(carry, of_carry),
            tree.pack_sequence_as(entries, of_entry),
        )
        return [*tree.flatten(after), *tree.flatten(output)]

    once = _computed_again(run) if remat or _is_inside_xla() else run

    def body(place: Tensor, of_carry: Nested, arrays: Nested) -> Nested:
        of_entry = [tf.gather(each, place) for each in flat_entries]
        found = once(*flat_fixed, *of_carry, *of_entry)
        after, output = found[: len(of_carry)], found[len(of_carry) :]
        arrays = [array.write(place, each) for array, each in zip(arrays, output, strict=True)]
        for new, old in zip(after, flat_carry, strict=True):
            new.set_shape(old.shape)
        return place + 1, list(after), arrays

    _, flat_carry_out, arrays = tf.while_loop(
        lambda place, *_: place < length,
        body,
        (tf.constant(0), list(flat_carry), arrays),
        maximum_iterations=length,
    )
    stacked = [array.stack() for array in arrays]
    return tree.pack_sequence_as(carry, flat_carry_out), tree.pack_sequence_as(outputs, stacked)


def _is_inside_xla() -> bool:
    """Whether TensorFlow is making a graph for XLA.

    There a loop that keeps what a turn computed for the gradient copies all of that at every turn, which takes longer
    than to compute the turn again.
    """
    import tensorflow as tf
    from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

    found: bool = GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())
    return found


def _computed_again(run: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """A function that keeps nothing for its gradient but what it was given, and is run again for it.

    `tf.recompute_grad` has no gradient to give for whole numbers, which a loop asks for.
    """
    import tensorflow as tf

    def again(*tensors: Tensor) -> list[Tensor]:
        floats = [place for place, tensor in enumerate(tensors) if tensor.dtype.is_floating]

        def whole(given: Nested) -> list[Tensor]:
            every = list(tensors)
            for place, tensor in zip(floats, given, strict=True):
                every[place] = tensor
            return run(*every)

        kinds: list[bool] = []

        @tf.custom_gradient  # type: ignore[untyped-decorator]
        def differentiable(*given: Tensor) -> Nested:
            with tf.GradientTape() as nobody, nobody.stop_recording():
                found = whole(given)
            kinds[:] = [each.dtype.is_floating for each in found]

            def gradient(*upstream: Tensor) -> list[Tensor]:
                with tf.GradientTape() as tape:
                    tape.watch(given)
                    now = [each for each, is_float in zip(whole(given), kinds, strict=True) if is_float]
                asked = [each for each, is_float in zip(upstream, kinds, strict=True) if is_float]
                zero = tf.UnconnectedGradients.ZERO
                gradients: list[Tensor] = tape.gradient(now, given, asked, unconnected_gradients=zero)
                return gradients

            return found, gradient

        found: list[Tensor] = differentiable(*(tensors[place] for place in floats))
        return found

    return again


def _from_python(
    step: Step, fixed: Nested, carry: Nested, entries: Nested, length: int, outputs: Nested, remat: bool
) -> Nested:
    tree = keras.tree
    found = []
    run: Nested = step
    if remat:
        from torch.utils.checkpoint import checkpoint

        context = of_this_thread("current_call_ctx")

        def in_this_call(*given: Nested) -> Nested:
            # A gradient computes it when the call is over: what asks whether it trains must hear the same.
            before = of_this_thread("current_call_ctx")
            set_in_this_thread("current_call_ctx", context)
            try:
                return step(*given)
            finally:
                set_in_this_thread("current_call_ctx", before)

        def run(*given: Nested) -> Nested:
            return checkpoint(in_this_call, *given, use_reentrant=False)

    for place in range(length):
        carry, output = run(fixed, carry, tree.map_structure(lambda each, at=place: each[at], entries))
        found.append(output)
    return carry, tree.map_structure(lambda *each: keras.ops.stack(each), *found)


_scan = _make_scan()
