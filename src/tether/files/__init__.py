"""Files that keep a tie, and that are whole at every moment."""

from tether.files.exporting import Exported, export
from tether.files.layout import Tensor
from tether.files.load import load_model
from tether.files.peft import load_peft, save_peft
from tether.files.report import Report
from tether.files.resize import resize
from tether.files.retying import retie
from tether.files.safetensors import load_safetensors, save_safetensors
from tether.files.save import save_model
from tether.files.untied import load_untied

__all__ = [
    "Exported", "Report", "Tensor", "export", "load_model", "load_peft", "load_safetensors", "load_untied", "resize",
    "retie", "save_model", "save_peft", "save_safetensors",
]  # fmt: skip
