"""What is tied in a `.keras` file without notes, as older files are: its config says it, and not where.

The notes beside the entries of a file say which layer reads what, and which entry is which weight. Where there are
none, the model is made from the config, and says where its weights and ties would be in a file.
"""

from __future__ import annotations

import copy
import os

import keras

from tether import keras_seam
from tether.files.archive import opened_archive, reading
from tether.files.keras_files import Values
from tether.files.making import explained
from tether.files.positions import positions
from tether.layers.tying.state import View
from tether.layers.tying.tied import KEY
from tether.weights.codec import encode
from tether.weights.identity import dictionaries
from tether.weights.weight import Weight


def note(path: str | os.PathLike[str], values: Values) -> None:
    """Adds the notes that a `.keras` file could have, if it has none.

    Args:
        path: The file.
        values: What was read of it.

    Raises:
        TetherError: Its config records ties, and no model can be made of it.
    """
    if values.notes or values.uids:
        return
    with reading(path), opened_archive(path) as archive:
        config = archive.config()
    if not any(KEY in entry for entry in dictionaries(config)):
        return
    try:
        model = keras.saving.deserialize_keras_object({**copy.deepcopy(config), "compile_config": None})
    except Exception as error:  # Keras, and classes of others
        why = explained(error, path, config)
        raise type(why)(
            f"{str(path)!r} has ties, without the notes beside its values that say where they are, and no model can be "
            f"made from its config to see that. {why} What `tether.files.load_model` loads and `save_model` writes has "
            "the notes."
        ) from error
    for each in positions(model):
        group, _, key = each.place.rpartition("/")
        if isinstance(each.holder, Weight):
            values.uids[each.holder.uid] = each.place
        elif isinstance(each.target, View):
            dtype = keras_seam.stored_dtype(each.target)
            tie = {"dtype": dtype, "steps": encode(each.target.expression)}
            values.notes.setdefault(group, {})[key] = tie


__all__ = ["note"]
