"""Models on the Hugging Face Hub, by the package `huggingface_hub`, which is imported when it is asked for."""

from __future__ import annotations

import importlib
import pathlib
import tempfile
from typing import Any

import keras

from tether import keras_seam
from tether.errors import TetherError, Unsupported, received
from tether.files.keras.load import load_model
from tether.files.keras.save import save_model
from tether.files.publishing.card import FILE, described

HEAD = "---\nlibrary_name: keras\ntags:\n- keras\n- keras-tether\n- weight-sharing\n---\n\n"
"""What the Hub reads at the head of a card."""


def push(
    model: keras.Model,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    card: bool = True,
    token: str | None = None,
) -> str:
    """Saves a model, with its card, into a repository of the Hugging Face Hub, which is made if there is none.

    The model is saved first (`tether.files.save_model`), into a temporary folder. If that fails, nothing is uploaded.
    A model that is split over several processes is pushed by all of them, of which the first one uploads.

    Args:
        model: A built Keras model.
        repo_id: The repository: `"owner/name"`.
        private: Whether a repository that is made is private; left out, as the owner's default is.
        revision: The branch, which has to be there; left out, the main one.
        commit_message: What the commit says; left out, the model's name.
        card: Whether to write the card (`tether.files.card`) as `README.md`, over one that is there.
        token: Whose repository it is; left out, what `hf auth login` has stored.

    Returns:
        The address of the repository.

    Raises:
        Unsupported: `huggingface_hub` is not installed.
        LostTie: A file would not hold a tie.
        TetherError: It is no built model, or `repo_id` is no name.

    Example:
    ```python
    print(tether.files.push(model, "me/words", private=True))
    again = tether.files.pull("me/words")
    ```
    """
    hub = _hub()
    _check_name(repo_id)
    text = HEAD + described(model, f"tether.files.pull({repo_id!r})")
    with keras_seam.in_step_for(model, f"push({repo_id!r})"), tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        save_model(model, folder / FILE)
        if keras_seam.place_in_step()[0]:
            return keras_seam.said_by_first("")
        if card:
            (folder / "README.md").write_text(text, encoding="utf-8")
        api = hub.HfApi(token=token)
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or f"Saves {model.name}",
        )
        return keras_seam.said_by_first(str(address))


def pull(
    repo_id: str,
    *,
    filename: str = FILE,
    revision: str | None = None,
    custom_objects: dict[str, object] | None = None,
    compile: bool = True,
    safe_mode: bool = True,
    token: str | None = None,
) -> keras.Model:
    """Downloads a model from the Hugging Face Hub, and loads it as `tether.files.load_model` does.

    The file stays where `huggingface_hub` keeps its downloads, so it is downloaded once.

    Args:
        repo_id: The repository: `"owner/name"`.
        filename: Which `.keras` file of it.
        revision: A branch, a tag or a commit; left out, the newest of the main branch.
        custom_objects: As for `load_model`.
        compile: As for `load_model`.
        safe_mode: As for `load_model`.
        token: Who asks, for what is private; left out, what `hf auth login` has stored.

    Returns:
        The model.

    Raises:
        Unsupported: `huggingface_hub` is not installed.
        TetherError: `repo_id` is no name, or the repository has no such file.
        InvalidConfig: The file is damaged, or names something that cannot or must not be made.
        LostTie: A tie that it records did not come back.

    Example:
    ```python
    tether.files.push(model, "me/words")
    again = tether.files.pull("me/words", revision="main")
    ```
    """
    hub = _hub()
    _check_name(repo_id)
    errors = importlib.import_module("huggingface_hub.errors")
    try:
        path = hub.hf_hub_download(repo_id, filename, revision=revision, token=token)
    except errors.LocalEntryNotFoundError:  # the Hub was not reached, which the error says
        raise
    except errors.EntryNotFoundError as error:
        raise TetherError(
            f"The repository {repo_id!r} has no file {filename!r}. `tether.files.push` writes {FILE!r}; name another "
            f"with `filename=`. {received(repo_id=repo_id, filename=filename, revision=revision)}"
        ) from error
    return load_model(path, custom_objects=custom_objects, compile=compile, safe_mode=safe_mode)


def _hub() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise Unsupported(
            f"The Hugging Face Hub is reached with the package 'huggingface_hub', which cannot be imported ({error}). "
            "Install it: `pip install 'keras-tether[hub]'`."
        ) from error


def _check_name(repo_id: object) -> None:
    if not isinstance(repo_id, str) or not repo_id.strip():
        raise TetherError(f"A repository is named 'owner/name'. {received(repo_id=repo_id)}")


__all__ = ["pull", "push"]
