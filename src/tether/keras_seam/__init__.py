"""Every private Keras name that Tether relies on, in one place.

Nothing else in Tether may touch `keras.src` or an attribute of Keras that starts with an
underscore. Each function below states the assumption it makes, and `tests/test_keras_seam.py`
checks each one against the oldest and the newest supported Keras.
"""

from keras import Sequential
from keras.config import is_nnx_enabled

from tether.keras_seam.calls import (
    TRACES_GRADIENTS,
    call_owners,
    call_parameters,
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
from tether.keras_seam.census import see
from tether.keras_seam.classes import Functional, KerasSaveable
from tether.keras_seam.exporting import (
    input_signature,
    input_spec,
    mend_tf2onnx,
    store_each_variable_once,
)
from tether.keras_seam.frames import (
    copies_begun,
    copying_scope,
    inside_bidirectional_init,
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
    own_tracker,
    own_trainable_flag,
    set_own_trainable_flag,
    set_untracked,
    shield_tracker,
    sublayers,
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
from tether.keras_seam.names import current_path, is_automatic_variable_name, name_scope, numbered, path_scope
from tether.keras_seam.quantizing import (
    WatchedSublayers,
    give_back_quantize,
    is_quantizing_a_model,
    passes,
    quantization_config,
    quantizers,
    take_over_quantize,
)
from tether.keras_seam.registering import tell_apart
from tether.keras_seam.reshaping import (
    build_shapes,
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
from tether.keras_seam.threads import AutocastScope, get_autocast_scope
from tether.keras_seam.torch_parameters import (
    LISTS_PARAMETERS,
    Change,
    list_parameters_again,
    only_parameters,
    without_parameters,
)
from tether.keras_seam.training import (
    answers,
    before_change,
    before_freezing,
    is_given_what_trains,
    note_new_use,
    notice_compiling,
)
from tether.keras_seam.variables import (
    RUNS_FROM_PYTHON,
    Variable,
    add,
    autocasts,
    held_dtype,
    is_float,
    matmul,
    multiply,
    own_copy,
    own_tensor,
    plain_tensor,
    prepare_view,
    raw_value,
    stored_dtype,
    subtract,
    tensor_dtype,
)

__all__ = [
    "LISTS_PARAMETERS", "RUNS_FROM_PYTHON", "SHARED_ID", "STORES", "TIED_NAME", "TRACES_GRADIENTS", "AutocastScope",
    "Change", "Functional", "KerasSaveable", "Sequential", "Variable", "WatchedSublayers", "add", "answers",
    "attributes", "autocasts", "before_change", "before_freezing", "build_shapes", "call_owners", "call_parameters",
    "calls_in_graph", "calls_of", "class_reference", "config_with_ids", "contained_layers", "copies_begun",
    "copying_scope", "counts", "current_path", "decay_pattern", "deserialized", "entry_notes", "find_class",
    "forget_attribute", "get_autocast_scope", "give_back_quantize", "give_shape", "give_value", "graph_of",
    "graph_outputs", "has_compiled_loss", "held_dtype", "holds_its_layers_configs", "infer_graph", "inner_optimizer",
    "input_signature", "input_spec", "insert_tracked", "inside_bidirectional_init", "is_automatic_layer_name",
    "is_automatic_variable_name", "is_concrete", "is_default", "is_differentiated", "is_excluded_from_decay",
    "is_float", "is_given_what_trains", "is_locked", "is_nnx_enabled", "is_plain_eager", "is_quantizing_a_model",
    "is_random", "is_same_snapshot", "is_sparse", "is_stored_in", "is_traced", "is_training_call", "layout_map",
    "list_parameters_again", "listed_variables", "load_from", "loading_scope", "losses_scope", "maker", "mark_like",
    "matmul", "mend_tf2onnx", "multiply", "mutations", "name_scope", "note_new_use", "notice_compiling", "numbered",
    "on_host", "only_parameters", "optimized_variables", "optimizer_slots", "own_attributes", "own_copy",
    "own_tensor", "own_tracker", "own_trainable_flag", "passes", "path_scope", "plain_tensor", "prepare_view",
    "quantization_config", "quantizers", "random_starts_left_out", "raw_value", "read_archive", "recognize_variables",
    "refresh_call_signature", "refuse_spectral_normalization", "refuse_to_be_looked_into", "register_reader",
    "register_tied", "registered_function", "running_layers", "running_methods", "save_to", "saved_objects",
    "saving_scope", "see", "set_build_shapes", "set_by_a_container", "set_mask", "set_own_trainable_flag",
    "set_untracked", "shared_object", "shield_tracker", "snapshot", "store_each_variable_once", "stored_dtype",
    "stored_value", "sublayers", "subtract", "take_over_quantize", "tell_apart", "tensor_dtype", "trace",
    "trace_token", "training_loss", "undisturbed", "unique_name", "unlock", "unlocked", "unshield_tracker", "untrack",
    "untrack_layer", "variable_lists", "without_parameters", "write", "write_rows",
]  # fmt: skip
