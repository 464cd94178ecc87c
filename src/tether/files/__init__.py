"""Files that keep a tie, and that are whole at every moment."""

from tether.files.exporting import Exported, export
from tether.files.keras.load import load_model
from tether.files.keras.save import save_model
from tether.files.loading.entries import Report
from tether.files.loading.untied import load_untied, retie
from tether.files.peft.peft_loading import load_peft
from tether.files.peft.peft_saving import save_peft
from tether.files.publishing import card, pull, push
from tether.files.tensors.guessing import Guess, guess_names
from tether.files.tensors.safetensors import load_safetensors, save_safetensors
from tether.files.tensors.tables import Table, Tensor
from tether.layers.resize import resize

__all__ = [
    "Exported", "Guess", "Report", "Table", "Tensor", "card", "export", "guess_names", "load_model", "load_peft",
    "load_safetensors", "load_untied", "pull", "push", "resize", "retie", "save_model", "save_peft", "save_safetensors",
]  # fmt: skip
