"""Files that earlier versions wrote, on each backend: every version reads them. `tests/fixtures/make.py` says more.

What is compared is what layers compute with and what is shared, never what a version calls its weights.
"""

import json
import pathlib
import zipfile

import keras
import numpy as np
import pytest

import tether
from tests.fixtures import models
from tests.fixtures.models import AUTOENCODER_USES, CASES, read, stored_in

pytestmark = pytest.mark.spread

ARCHIVES = sorted((pathlib.Path(__file__).parents[1] / "fixtures").glob("*/*.zip"))


def names_in(archive):
    with zipfile.ZipFile(archive) as opened:
        return opened.namelist()


def identifier(archive):
    return f"{archive.parent.name}-{archive.stem}"


def every(ending, slow_beside=None):
    """Runs a test with each case that an earlier version wrote in this format.

    With `slow_beside`, what other backends than this one wrote is left to the slow tests, since it differs little.
    """
    found = [
        pytest.param(
            archive,
            name.removesuffix(ending),
            id=f"{identifier(archive)}-{name.removesuffix(ending)}",
            marks=[pytest.mark.slow] if slow_beside not in (None, archive.stem) else [],
        )
        for archive in ARCHIVES
        for name in names_in(archive)
        if name.endswith(ending) and f"{name.removesuffix(ending)}.facts.json" in names_in(archive)
    ]
    return pytest.mark.parametrize(("archive", "name"), found, indirect=["archive"])


every_archive = pytest.mark.parametrize("archive", ARCHIVES, ids=map(identifier, ARCHIVES), indirect=True)


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory):
    """The folders of archives that are unpacked already."""
    folders = {}

    def unpack(archive):
        if archive not in folders:
            folders[archive] = tmp_path_factory.mktemp(identifier(archive))
            with zipfile.ZipFile(archive) as opened:
                opened.extractall(folders[archive])
        return folders[archive]

    return unpack


@pytest.fixture
def archive(request, unpacked):
    """The folder with the files of one version and backend."""
    return unpacked(request.param)


@pytest.fixture(autouse=True)
def other_start_values(seeded):
    """Weights that are not read must not have the values of the file by chance."""
    keras.utils.set_random_seed(8)


def expected(folder, name):
    with np.load(folder / f"{name}.npz") as opened:
        return dict(opened)


def made(case):
    """The case's model with values of its own."""
    model = case.build()
    case.change(model)
    return model


def assert_found(found, wanted, tolerance=1e-5):
    """Each of these is as the file's writer had it."""
    assert found and set(found) <= set(wanted)
    for what, value in found.items():
        assert value.shape == wanted[what].shape, what
        np.testing.assert_allclose(value, wanted[what], rtol=tolerance, atol=tolerance, err_msg=what)


def assert_same_model(model, case, wanted):
    assert_found(models.values(model, case.uses), wanted)
    assert_found(models.structure(model, case.uses), wanted)


def tolerance_of(case):
    return 2e-2 if case.is_half else 1e-4


def goes_on_training(model):
    """Whether the optimizer of a file can be used here: Keras writes PyTorch's own one as such, tied or not."""
    return keras.backend.backend() == "torch" or type(model.optimizer) is keras.optimizers.Adam


def test_there_are_files_of_the_first_version_and_every_backend():
    assert {"0.1.0-jax", "0.1.0-tensorflow", "0.1.0-torch"} <= set(map(identifier, ARCHIVES))


@every(".keras")
class TestKerasFiles:
    def test_keras_reads_it(self, archive, name):
        case, wanted = CASES[name], expected(archive, name)
        model = keras.saving.load_model(archive / f"{name}.keras")
        assert_same_model(model, case, wanted)
        assert_found(models.losses(model), wanted)
        assert (getattr(model, "optimizer", None) is not None) == case.trained
        if case.trained:
            assert_found({"slots": models.sizes(model.optimizer.variables)}, wanted)

    def test_tether_reads_it_and_writes_it_again(self, archive, name, tmp_path):
        case, wanted = CASES[name], expected(archive, name)
        model = tether.files.load_model(archive / f"{name}.keras")
        assert_same_model(model, case, wanted)
        assert_found(models.losses(model), wanted)
        tether.files.save_model(model, tmp_path / "again.keras")
        again = tether.files.load_model(tmp_path / "again.keras")
        assert_same_model(again, case, wanted)
        if case.trained:
            for each in (model, again):
                assert_found({"slots": models.sizes(each.optimizer.variables)}, wanted)
            values = [[np.array(v.numpy()) for v in each.optimizer.variables] for each in (model, again)]
            assert all(np.array_equal(a, b) for a, b in zip(*values, strict=True))

    def test_it_is_looked_at_without_being_loaded(self, archive, name):
        case, wanted = CASES[name], expected(archive, name)
        facts = tether.inspection.facts(archive / f"{name}.keras")
        assert facts.stored_bytes == wanted["stored bytes"]
        assert np.array_equal(
            np.sort([np.prod(weight.shape, dtype=int) for weight in facts.weights if not weight.state]),
            wanted["sizes"],
        )
        shared = (wanted["stored weights that two uses share"] > 0).sum() > len(case.uses)
        assert any(True for _ in facts.shared()) or not shared or facts.adapters  # whose strengths are no sharing
        assert not tether.check(archive / f"{name}.keras").errors


@every(".keras", slow_beside="jax")
def test_it_computes_the_same_and_goes_on_training(archive, name):
    case, wanted = CASES[name], expected(archive, name)
    model = keras.saving.load_model(archive / f"{name}.keras")
    assert_found(models.outputs(model, case), wanted, tolerance_of(case))
    if case.trained and goes_on_training(model):
        # A file says to compile the step if its writer's backend does that by itself; PyTorch takes minutes for it.
        model.jit_compile = keras.backend.backend() == "jax"
        models.train(model, case, 1)
        later = {f"later {what}": value for what, value in models.outputs(model, case).items()}
        assert_found(later, wanted, 10 * tolerance_of(case))


@every(".weights.h5")
def test_keras_reads_weights_into_a_model_of_the_same_code(archive, name):
    case, wanted = CASES[name], expected(archive, name)
    model = made(case)
    model.load_weights(archive / f"{name}.weights.h5")
    assert_same_model(model, case, wanted)
    assert tether.inspection.facts(archive / f"{name}.weights.h5").weights
    tether.check(archive / f"{name}.weights.h5")


@every(".weights.h5")
def test_tether_reads_weights_into_a_model_of_the_same_code(archive, name):
    case, wanted = CASES[name], expected(archive, name)
    model = made(case)
    report = tether.files.load_untied(model, archive / f"{name}.weights.h5")
    assert not report.missing and not report.conflicting
    assert_same_model(model, case, wanted)


@every(".safetensors")
def test_safetensors_are_read_into_a_model_of_the_same_code(archive, name):
    case, wanted = CASES[name], expected(archive, name)
    model = made(case)
    report = tether.files.load_safetensors(model, archive / f"{name}.safetensors")
    assert not report.missing and not report.skipped and not report.conflicting
    assert_same_model(model, case, wanted)
    assert tether.inspection.facts(archive / f"{name}.safetensors").weights
    tether.check(archive / f"{name}.safetensors")


@every(".facts.json")
def test_facts_are_read(archive, name):
    wanted = expected(archive, name)
    data = json.loads((archive / f"{name}.facts.json").read_text())
    facts = tether.inspection.Facts.from_json(data)
    assert facts.stored_bytes == wanted["stored bytes"]
    assert len(facts.uses) == len(data["uses"]) and len(facts.optimizer) == len(data["optimizer"])


# --------------------------------------------------------------------------- what is not a file of one model


@every_archive
class TestOtherFiles:
    def test_weights_of_an_untied_model_fill_a_tied_one(self, archive):
        wanted = expected(archive, "untied")
        model = models.autoencoder()
        report = tether.files.load_untied(model, archive / "untied.weights.h5", resolve="mean")
        kernel = (wanted["use encode/kernel"] + wanted["use decode/kernel"].T) / 2
        assert_found(
            models.values(model, AUTOENCODER_USES),
            {**wanted, "use encode/kernel": kernel, "use decode/kernel": kernel.T},
        )
        assert len(report.conflicting) == 1

    @pytest.mark.parametrize("file", ["tied.weights.h5", "tied_shards.weights.json"])
    def test_weights_of_a_tied_model_fill_an_untied_one(self, archive, file):
        model = models.untied()
        tether.files.load_untied(model, archive / file)
        assert_found(models.values(model, AUTOENCODER_USES), expected(archive, "tied"))

    @pytest.mark.parametrize("file", ["tied.weights.h5", "tied_shards.weights.json"])
    def test_keras_reads_weights_of_a_tied_model(self, archive, file):
        model = models.autoencoder()
        model.load_weights(archive / file)
        assert_found(models.values(model, AUTOENCODER_USES), expected(archive, "tied"))

    @pytest.mark.parametrize("way", ["retie", "sharing"])
    def test_parts_that_were_saved_apart_are_one_again(self, archive, way):
        files = [archive / "encoder.keras", archive / "decoder.keras"]
        if way == "sharing":
            with tether.sharing():
                encoder, decoder = map(keras.saving.load_model, files)
        else:
            encoder, decoder = map(keras.saving.load_model, files)
            assert stored_in(read(encoder, "encode/kernel")) != stored_in(read(decoder, "decode/kernel"))
            tether.files.retie(encoder, decoder)
        assert stored_in(read(encoder, "encode/kernel")) == stored_in(read(decoder, "decode/kernel"))
        found = models.values(encoder, AUTOENCODER_USES[:2]) | models.values(decoder, AUTOENCODER_USES[2:])
        assert_found(found, expected(archive, "tied"))

    def test_a_child_comes_back_on_its_parent(self, archive):
        with tether.sharing():
            parent, child = (keras.saving.load_model(archive / f"{name}.keras") for name in ("parent", "child"))
        assert_found(models.values(parent, AUTOENCODER_USES), expected(archive, "parent"))
        assert_found(models.values(child, AUTOENCODER_USES), expected(archive, "child"))
        for use in AUTOENCODER_USES:
            assert stored_in(read(parent, use)) <= stored_in(read(child, use))
        assert sum(weight.shape[0] for weight in parent.weights) == 14 and not parent.trainable_weights
        assert len(child.trainable_weights) == 4

    def test_a_child_is_read_into_one_of_the_same_code(self, archive):
        parent, child = models.parent_and_child()
        child.load_weights(archive / "child.weights.h5")
        assert_found(models.values(child, AUTOENCODER_USES), expected(archive, "child"))
        assert_found(models.values(parent, AUTOENCODER_USES), expected(archive, "parent"))

    def test_a_folder_for_peft_is_added_to_a_base(self, archive):
        base = models.untied()
        tether.files.load_untied(base, archive / "parent.weights.h5")
        tether.files.load_peft(base, archive / "peft")
        assert_found(models.values(base, AUTOENCODER_USES), expected(archive, "child"))

    def test_adapters_are_added_to_a_base(self, archive):
        model = models.attentive()
        tether.files.load_untied(model, archive / "without_adapters.weights.h5")
        for name in ("french", "german"):
            tether.adapters.load(model, archive / f"{name}.safetensors")
        assert tether.adapters.strengths(model) == {"french": 0.25, "german": 0.75}
        assert_found(models.values(model, models.ADAPTED_USES), expected(archive, "with_adapters"))
