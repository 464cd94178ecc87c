"""What devices tell each other in a compiled step, and how many bytes: as much as with layouts written by hand."""

import keras
import numpy as np

import tether
from tests.distribution.models import (
    bytes_here,
    child,
    collectives,
    layers,
    mesh_of,
    plain_map,
    scope,
    seeded,
    step_text,
    tied_pair,
)
from tests.distribution.programs import check

COLUMNS = {"up/kernel": (None, "model")}


def _total(found):
    return sum(count for _, count in found)


def _of_child(form, mesh, layouts=COLUMNS):
    with scope(plain_map(mesh, layouts)):
        model = child(form)
        batch = np.ones((16, 64), "float32"), np.ones((16, 128), "float32")
        return collectives(step_text(model, mesh, *batch))


@check
def a_part_costs_what_its_own_gradient_takes():
    """The kernel's part on a device, and A's gradient, which every device needs: 64·32·4 + 64·4·4 bytes."""
    mesh = mesh_of(2, 4)
    whole = {**COLUMNS, ".*_l.*": (None, None), ".*magnitude": (None,)}  # as it was: nothing derived
    for form, bytes_of in (
        (lambda: tether.low_rank(4, seed=1), 9216),
        (lambda: tether.forms.hadamard(4, seed=1), 10240),
        (lambda: tether.forms.dora(4, seed=1), 9216),
    ):
        found = _of_child(form(), mesh)
        assert {kind for kind, _ in found} == {"all-reduce"} and _total(found) == bytes_of, (form(), found)
        assert _total(_of_child(form(), mesh, whole)) > 4 * bytes_of


def _reversible():
    """What Keras has for a table that is read both ways."""
    table = layers.ReversibleEmbedding(32, 8, name="table", embeddings_initializer=seeded(1))
    i = keras.Input((4,), dtype="int32")
    return keras.Model(i, table(table(i), reverse=True))


@check
def a_tied_pair_costs_what_the_shared_table_of_keras_does():
    x, y = np.zeros((16, 4), "int32"), np.ones((16, 4, 32), "float32")
    for mesh, head, table in (
        (mesh_of(2, 4), (None, "model"), ("model", None)),
        (mesh_of(2, 4), ("model", None), (None, "model")),
        (mesh_of(8, 1), (None, None), (None, None)),  # data parallel
    ):
        costs = []
        for build, layouts in ((tied_pair, {"head/kernel": head}), (_reversible, {"table/embeddings": table})):
            with scope(plain_map(mesh, layouts)):
                model = build()
                costs.append((collectives(step_text(model, mesh, x, y)), bytes_here(model.weights)))
        assert costs[0] == costs[1], (head, costs)
        assert costs[0][1] == 32 * 8 * 4 // (4 if "model" in head else 1)
    # Two uses, two reductions of the gradient, by hand and by Keras as here: docs/distribution.md has it.
    assert _total(costs[0][0]) == 2 * 32 * 8 * 4
