"""Steps that are compiled for many devices and not run: the bytes are those of the same formula as on eight."""

import jax
import numpy as np

import tether
from tests.distribution.models import child, collectives, mesh_of, plain_map, scope, step_text, tied_pair
from tests.distribution.programs import check

RANK, INPUTS, UNITS = 4, 64, 256


def _mesh():
    count = len(jax.devices())
    model = 8 if count < 256 else 16
    return mesh_of(count // model, model), model


@check
def a_low_rank_part_costs_what_its_own_gradient_takes():
    mesh, model = _mesh()
    with scope(plain_map(mesh, {"up/kernel": (None, "model")})):
        made = child(tether.low_rank(RANK, seed=1), UNITS, INPUTS)
        batch = 2 * len(jax.devices())
        data = np.ones((batch, INPUTS), "float32"), np.ones((batch, UNITS), "float32")
        found = collectives(step_text(made, mesh, *data))
    kernel, a = INPUTS * UNITS // model * 4, INPUTS * RANK * 4
    assert sum(count for _, count in found) == kernel + a, found


@check
def a_tied_table_is_divided_whatever_reads_it():
    mesh, model = _mesh()
    with scope(plain_map(mesh, {"head/kernel": (None, "model")})):
        made = tied_pair(64, 16)
        batch = 2 * len(jax.devices())
        data = np.zeros((batch, 4), "int32"), np.ones((batch, 4, 64), "float32")
        found = collectives(step_text(made, mesh, *data))
    rows = 2 * model * 4 * 16 * 4  # of its part of the batch: what a device looks up, and what comes back
    table = 64 // model * 16 * 4
    assert {kind for kind, _ in found} == {"all-reduce"}
    assert sum(count for _, count in found) == 2 * table + 2 * rows, (found, table, rows)
