"""Whether every tie of a model is recorded in the model's config, and where else it could be.

A tie is recorded on the object on which it was made. If the config of what is saved does not hold that object's, or a
constructor copies it by its config, the tie would be lost: it is refused, or recorded on an object further out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import keras

from tether import keras_seam
from tether.errors import LostTie
from tether.layers.tying import paths
from tether.layers.tying.penalty import Penalty
from tether.layers.tying.state import State, Tie, arguments_in, from_above, state_of
from tether.layers.tying.tied import become_tied
from tether.layers.tying.untie import become_plain
from tether.weights.expression import Expression
from tether.weights.identity import told_by_config


@dataclass(frozen=True)
class Unrecorded:
    """A tie, or a soft tie, that a config does not hold."""

    layer: keras.Layer
    """The layer with the weight, or the one that has the penalty."""
    path: paths.Path
    """The weight's path from there."""
    tie: Tie | Penalty
    quantized: bool = False

    @property
    def expression(self) -> Expression | None:
        """What the weight reads; `None` of a soft tie."""
        return self.tie.expression if isinstance(self.tie, Tie) else None


def unrecorded(root: keras.Layer, told: dict[int, object] | None = None) -> list[Unrecorded]:
    """The ties below a model or layer that are neither in its config nor made again by a constructor.

    Args:
        root: The model or layer.
        told: What its config tells of, if that was found already.
    """
    states = [(layer, state) for layer in keras_seam.contained_layers(root) if (state := state_of(layer)) is not None]
    if not states:
        return []
    told = told_by_config(root) if told is None else told
    copied = _copied_by_constructors(root)
    found: list[Unrecorded] = []
    for layer, state in states:
        for path, tie, quantized in _ties_of(state):
            recorder = tie.recorder()
            if (tie.made_by_code and not quantized) or (id(tie) in told and id(recorder) not in copied):
                continue
            found.append(Unrecorded(layer, path, tie, quantized))
        for penalty in state.penalties:
            if penalty.recorder() is layer and not penalty.made_by_code and not penalty.is_void:
                if penalty.counts:
                    _refuse_to_forget(penalty, root, told)
                if id(penalty) not in told or id(layer) in copied:
                    found.append(Unrecorded(layer, (), penalty))
    return found


def _ties_of(state: State) -> Iterator[tuple[paths.Path, Tie, bool]]:
    for slot in state.slots:
        yield tuple(slot.view.use.name.split("/")), slot.tie, slot.tie.quantized
    for path, tie in state.pending.items():
        yield path, tie, False


def _copied_by_constructors(root: keras.Layer) -> set[int]:
    """The layers whose configs a constructor of Keras reads and makes others from, which drops the ties in them."""
    found: set[int] = set()
    for layer in keras_seam.contained_layers(root):
        if isinstance(layer, keras.layers.Bidirectional):
            found.update(map(id, keras_seam.contained_layers(layer.forward_layer)))
    return found


# --------------------------------------------------------------------------- refusing


def refuse_to_lose(root: keras.Layer, told: dict[int, object] | None = None) -> None:
    """Raises if the config of what is saved does not hold a tie.

    Raises:
        LostTie: It says where to put the tie.
    """
    lost = unrecorded(root, told)
    if lost:
        raise LostTie(message(lost[0], root))


def message(lost: Unrecorded, root: keras.Layer) -> str:
    """Says which tie would be lost, and where to put it."""
    saving = f"Saving {getattr(root, 'name', 'the model')!r} would lose a"
    if isinstance(lost.tie, Penalty):
        return (
            f"{saving} soft tie: {lost.tie.notation()} is recorded on {lost.layer.name!r}, whose config is not part of "
            "what is saved. Make the soft tie from the outermost object that is saved, or inside the constructor that "
            "makes the layer."
        )
    name = f"{lost.layer.name}/{'/'.join(lost.path)}"
    notation = lost.tie.expression.notation()
    if lost.quantized:
        return (
            f"{saving} tie: {name} = {notation} was quantised, and the constructor of a layer of your own makes it "
            "again as a float. Save the model before it is quantised, and quantise it after loading; or give that "
            "layer a `get_config` that holds the tied layer's."
        )
    return (
        f"{saving} tie: {name} = {notation} is recorded on a layer whose config is not part of the config of what is "
        f"saved. {_mend(lost, root)}, or `tether.files.save_model(model, path)`, which does so where it can; or tie "
        "inside the constructor of the layer that makes it, or give that layer a `get_config` that holds the tied "
        "layer's."
    )


def recorder_for(lost: Unrecorded, root: keras.Layer) -> tuple[keras.Layer, paths.Path] | None:
    """The layer on which a tie has to be made so that the root's config holds it, and the weight's path from there."""
    chain = next(iter(_chains(root, lost.layer)), ())
    for place in range(len(chain) - 1, 0, -1):
        if not keras_seam.holds_its_layers_configs(chain[place]):
            return chain[place], _path_below(chain[: place + 1], lost.path)
    return None


def _mend(lost: Unrecorded, root: keras.Layer) -> str:
    found = recorder_for(lost, root)
    if found is None:
        return f"Tie from the outermost object that is saved: `tether.tie(model, {{'path/to/{lost.path[-1]}': ...}})`"
    layer, path = found
    return f"Tie from a layer around it: `tether.tie({layer.name}, {{{'/'.join(path)!r}: ...}})`"


def _refuse_to_forget(penalty: Penalty, root: keras.Layer, told: dict[int, object]) -> None:
    """Raises if a weight of a penalty will be another one when the file is read."""
    for weight in penalty.weights:
        if weight not in penalty.owned and not weight.uses and id(weight) not in told:
            raise LostTie(
                f"Saving {getattr(root, 'name', 'the model')!r} would lose a soft tie: {penalty.notation()} names "
                f"{weight.name!r}, which the constructor of a layer of your own makes anew. Write the weight into that "
                "layer's `get_config` with `keras.saving.serialize_keras_object`, or make the soft tie in the same "
                "constructor."
            )


# --------------------------------------------------------------------------- recording further out


def record_further_out(root: keras.Layer) -> None:
    """Records ties that would be lost on the nearest layer around them whose config is part of the root's.

    Raises:
        LostTie: There is none. Nothing is changed then.
    """
    moved: list[tuple[Tie, keras.Layer, paths.Path]] = []
    tried: dict[int, int] = {}
    try:
        while lost := unrecorded(root):
            for each in lost:
                if not _move(each, root, tried, moved):
                    raise LostTie(message(each, root))
    except BaseException:
        for tie, recorder, path in reversed(moved):
            _record(tie, recorder, path)
        raise


def _move(
    lost: Unrecorded, root: keras.Layer, tried: dict[int, int], moved: list[tuple[Tie, keras.Layer, paths.Path]]
) -> bool:
    """Records a tie on the next layer around it; `False` if there is no further one."""
    tie = lost.tie
    if not isinstance(tie, Tie) or lost.quantized or arguments_in(tie.expression):
        return False  # of an argument, another layer's call would take it
    chain = next(iter(_chains(root, lost.layer)), ())
    places = [place for place in range(1, len(chain)) if not keras_seam.holds_its_layers_configs(chain[place])]
    place = next((place for place in places if place > tried.get(id(tie), 0)), None)
    if place is None:
        return False
    tried[id(tie)] = place
    moved.append((tie, tie.recorder(), tie.path))
    _record(tie, chain[place], _path_below(chain[: place + 1], lost.path))
    return True


def _record(tie: Tie, recorder: keras.Layer, path: paths.Path) -> None:
    before = tie.recorder()
    tie.forget()
    if before is not None:
        become_plain(before)
    become_tied(recorder)
    tie.record(recorder, path)


def _chains(root: keras.Layer, layer: keras.Layer) -> Iterator[tuple[keras.Layer, ...]]:
    """The layers from one up to the root, by every way that leads there."""
    holders: dict[int, list[keras.Layer]] = {}
    for outer in keras_seam.contained_layers(root):
        for inner in {id(inner): inner for inner in keras_seam.sublayers(outer)}.values():
            holders.setdefault(id(inner), []).append(outer)
    waiting: list[tuple[keras.Layer, ...]] = [(layer,)]
    while waiting:
        chain = waiting.pop(0)
        if chain[-1] is root:
            yield chain
        waiting.extend((*chain, outer) for outer in holders.get(id(chain[-1]), ()) if outer not in chain)


def _path_below(chain: tuple[keras.Layer, ...], path: paths.Path) -> paths.Path:
    """The path of a weight from the last layer of a chain."""
    for inner, outer in itertools.pairwise(chain):
        path = paths.canonical_child(outer, inner) + path
    return path


from_above.update(refuse_to_lose=refuse_to_lose)


__all__ = ["Unrecorded", "message", "record_further_out", "recorder_for", "refuse_to_lose", "unrecorded"]
