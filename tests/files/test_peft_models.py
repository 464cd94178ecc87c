"""What is written of a model of KerasHub's is read by PEFT for the same model of transformers.

It runs where both are installed. What does not change from one model to another is compared with committed values, in
`test_peft_kinds.py`.
"""

import importlib.util
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import tether
from tether import adapters, forms

pytest.importorskip("keras_hub")
peft = pytest.importorskip("peft", reason="peft reads what is written")
pytest.importorskip("transformers", reason="it has the models")

from tests.files.test_presets import HERE, MAKE, file_of, hidden, preset  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
CHOSEN = {
    "bert": "*/query/kernel", "roberta": "*output_dense/kernel", "distilbert": "*attention_output/kernel",
    "gpt2": "*output_dense/kernel", "llama": "*/value/kernel", "mistral": "*gate_dense/kernel",
    "qwen2": "*/query/kernel", "t5": "*decoder*/self_attention/query_projector/kernel",
    "t5_plain": "*encoder*/input_projector/kernel", "vit5": "*/mha/query/kernel",
}  # fmt: skip
FORMS = {
    "LORA": lambda: tether.low_rank(2),
    "DORA": lambda: forms.dora(2),
    "LOHA": lambda: forms.hadamard(2),
    "LOKR": lambda: forms.kronecker(),
    "VERA": lambda: forms.vera(2, size=(6, 6)),
    "IA3": lambda: forms.scale(axis=0),
    "OFT": lambda: forms.oft(2),
    "BOFT": lambda: forms.boft(2),
    "FOURIERFT": lambda: forms.fourier(4),
}


@pytest.fixture(scope="module")
def made():
    spec = importlib.util.spec_from_file_location("make_names", HERE / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("name", CHOSEN)
def test_peft_computes_the_same_with_a_models_adapter(name, kind, made, rng, tmp_path):
    if name == "gpt2" and kind in ("LOHA", "LOKR", "OFT", "BOFT"):
        pytest.skip("PEFT has no such adapter of the layers of GPT-2")
    model = MAKE[name]()
    tether.files.load_safetensors(model, file_of(name), names=preset(name))
    adapters.add(model, "own", {CHOSEN[name]: FORMS[kind]()})
    for weight in adapters.manage.own_weights(model)["own"]:
        if weight.trainable:
            weight.assign(rng.normal(size=weight.shape).astype("float32") / 2)
    tether.files.save_peft(model, tmp_path / "out", names=preset(name))
    module = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"][0]
    assert any(module in key for key in load_file(tmp_path / "out" / "adapter_model.safetensors"))
    whole, inner = made.model_of(name)
    target = whole if module in dict(whole.named_modules()) else inner
    before = made.hidden(name, inner).numpy()
    peft.PeftModel.from_pretrained(target, tmp_path / "out").eval()  # changes the target in place
    after = made.hidden(name, inner).numpy()
    assert np.abs(after - before).max() > 1e-3
    assert np.abs(after - hidden(model)).max() < 2e-5
