"""Every private Keras name that Tether relies on, in one place.

Nothing else in Tether may touch `keras.src` or an attribute of Keras that starts with an
underscore. Each function below states the assumption it makes, and `tests/test_keras_seam.py`
checks each one against the oldest and the newest supported Keras.
"""

from keras.src.backend.common.variables import AutocastScope, get_autocast_scope
from keras.src.backend.config import is_nnx_enabled
from keras.src.models.functional import Functional
from keras.src.models.sequential import Sequential
from keras.src.saving.keras_saveable import KerasSaveable

from tether.keras_seam.calls import (
    ADDS_IN_PLACE,
    TRACES_GRADIENTS,
    add_to_fresh,
    call_owners,
    call_parameters,
    forget_compilation,
    is_differentiated,
    is_plain_eager,
    is_sparse,
    is_traced,
    is_training_call,
    mutations,
    refresh_call_signature,
    refuse_to_be_looked_into,
    set_mask,
    trace,
    trace_token,
)
from tether.keras_seam.exporting import (
    input_signature,
    input_spec,
    mend_tf2onnx,
    store_each_variable_once,
)
from tether.keras_seam.frames import (
    compiled_training,
    copying_scope,
    inside_bidirectional_init,
    is_known_to_the_optimizer,
    is_unknown_to_the_optimizer,
    loading_scope,
    losses_scope,
    maker,
    refuse_spectral_normalization,
    running_methods,
    saving_scope,
    set_by_a_container,
)
from tether.keras_seam.layers import (
    STORES,
    attributes,
    contained_layers,
    counts,
    forget_attribute,
    holds_its_layers_configs,
    insert_tracked,
    is_automatic_layer_name,
    is_default,
    is_locked,
    listed_variables,
    mark_like,
    own_trainable_flag,
    refresh_torch_parameters,
    replace_torch_parameters,
    set_own_trainable_flag,
    set_untracked,
    shield_tracker,
    sublayers,
    track,
    unique_name,
    unlock,
    unlocked,
    unshield_tracker,
    untrack,
    untrack_layer,
    variable_lists,
)
from tether.keras_seam.looking import (
    calls_in_graph,
    decay_pattern,
    graph_outputs,
    inner_optimizer,
    is_excluded_from_decay,
    layout_map,
    optimized_variables,
    own_attributes,
)
from tether.keras_seam.losses import has_compiled_loss, running_layers, training_loss, undisturbed
from tether.keras_seam.memory import (
    is_concrete,
    is_same_snapshot,
    is_stored_in,
    on_host,
    snapshot,
    stored_value,
    write,
    write_rows,
)
from tether.keras_seam.names import current_path, is_automatic_variable_name, name_scope, outside_name_scopes, set_path
from tether.keras_seam.quantizing import (
    WatchedSublayers,
    give_back_quantize,
    is_quantizing_a_model,
    passes,
    quantization_config,
    quantizers,
    take_over_quantize,
)
from tether.keras_seam.reshaping import (
    build_shapes,
    forget_traces,
    give_shape,
    give_value,
    infer_graph,
    recognize_variables,
    set_build_shapes,
)
from tether.keras_seam.saving import (
    SHARED_ID,
    TIED_NAME,
    calls_of,
    class_reference,
    config_with_ids,
    deserialized,
    entry_notes,
    find_class,
    graph_of,
    load_from,
    optimizer_slots,
    read_archive,
    register_reader,
    register_tied,
    registered_function,
    save_to,
    saved_objects,
    shared_object,
)
from tether.keras_seam.starting import is_random, random_starts_left_out
from tether.keras_seam.variables import (
    Variable,
    autocasts,
    is_float,
    own_copy,
    own_tensor,
    plain_tensor,
    prepare_view,
    raw_value,
    stored_dtype,
)

__all__ = [
    "ADDS_IN_PLACE", "SHARED_ID", "STORES", "TIED_NAME", "TRACES_GRADIENTS", "AutocastScope", "Functional",
    "KerasSaveable", "Sequential", "Variable", "WatchedSublayers", "add_to_fresh", "attributes", "autocasts",
    "build_shapes", "call_owners", "call_parameters", "calls_in_graph", "calls_of", "class_reference",
    "compiled_training", "config_with_ids", "contained_layers", "copying_scope", "counts", "current_path",
    "decay_pattern", "deserialized", "entry_notes", "find_class", "forget_attribute", "forget_compilation",
    "forget_traces", "get_autocast_scope", "give_back_quantize", "give_shape", "give_value", "graph_of",
    "graph_outputs", "has_compiled_loss", "holds_its_layers_configs", "infer_graph", "inner_optimizer",
    "input_signature", "input_spec", "insert_tracked", "inside_bidirectional_init", "is_automatic_layer_name",
    "is_automatic_variable_name", "is_concrete", "is_default", "is_differentiated", "is_excluded_from_decay",
    "is_float", "is_known_to_the_optimizer", "is_locked", "is_nnx_enabled", "is_plain_eager", "is_quantizing_a_model",
    "is_random", "is_same_snapshot", "is_sparse", "is_stored_in", "is_traced", "is_training_call",
    "is_unknown_to_the_optimizer", "layout_map", "listed_variables", "load_from", "loading_scope",
    "losses_scope", "maker", "mark_like", "mend_tf2onnx", "mutations", "name_scope", "on_host",
    "optimized_variables", "optimizer_slots", "outside_name_scopes", "own_attributes", "own_copy",
    "own_tensor", "own_trainable_flag", "passes", "plain_tensor", "prepare_view", "quantization_config",
    "quantizers", "random_starts_left_out", "raw_value", "read_archive", "recognize_variables",
    "refresh_call_signature", "refresh_torch_parameters", "refuse_spectral_normalization",
    "refuse_to_be_looked_into", "register_reader",
    "register_tied", "registered_function", "replace_torch_parameters", "running_layers", "running_methods",
    "save_to", "saved_objects", "saving_scope", "set_build_shapes", "set_by_a_container", "set_mask",
    "set_own_trainable_flag", "set_path", "set_untracked", "shared_object", "shield_tracker", "snapshot",
    "store_each_variable_once", "stored_dtype", "stored_value", "sublayers", "take_over_quantize", "trace",
    "trace_token", "track", "training_loss", "undisturbed", "unique_name", "unlock", "unlocked",
    "unshield_tracker", "untrack", "untrack_layer", "variable_lists", "write", "write_rows",
]  # fmt: skip
