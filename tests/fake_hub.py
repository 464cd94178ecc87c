"""A stand-in for `huggingface_hub`: the functions that Tether calls, as they are there. Repositories are folders."""

import pathlib
import shutil
import sys
import types


class EntryNotFoundError(Exception):
    """The repository has no such file."""


class LocalEntryNotFoundError(FileNotFoundError, EntryNotFoundError):
    """The Hub is not reached, and the file was not downloaded before."""


class FakeHub:
    """The repositories, in a folder, and what was asked for."""

    def __init__(self, folder):
        self.folder, self.calls, self.is_reached = pathlib.Path(folder), [], True

    def module(self):
        fake, hub = types.ModuleType("huggingface_hub"), self

        class HfApi:
            def __init__(self, endpoint=None, token=None, library_name=None, library_version=None, user_agent=None):
                self.token = token

            def create_repo(self, repo_id, *, token=None, private=None, repo_type=None, exist_ok=False):
                (hub.folder / repo_id).mkdir(parents=True, exist_ok=exist_ok)
                hub.calls.append(("create_repo", repo_id, {"private": private, "token": token or self.token}))
                return f"https://hub.example/{repo_id}"

            def upload_folder(
                self, *, repo_id, folder_path, path_in_repo=None, commit_message=None, token=None, repo_type=None,
                revision=None,
            ):  # fmt: skip
                shutil.copytree(folder_path, hub.folder / repo_id, dirs_exist_ok=True)
                said = {"revision": revision, "commit_message": commit_message, "token": token or self.token}
                hub.calls.append(("upload_folder", repo_id, said))

        def hf_hub_download(repo_id, filename, *, subfolder=None, repo_type=None, revision=None, token=None):
            hub.calls.append(("hf_hub_download", repo_id, {"revision": revision, "token": token}))
            if not hub.is_reached:
                raise LocalEntryNotFoundError("no connection")
            if not (hub.folder / repo_id / filename).is_file():
                raise EntryNotFoundError(filename)
            return str(hub.folder / repo_id / filename)

        fake.HfApi, fake.hf_hub_download = HfApi, hf_hub_download
        fake.errors = types.ModuleType("huggingface_hub.errors")
        fake.errors.EntryNotFoundError = EntryNotFoundError
        fake.errors.LocalEntryNotFoundError = LocalEntryNotFoundError
        return fake


def install(monkeypatch, folder):
    """Puts the stand-in in the place of the package for one test."""
    hub = FakeHub(folder)
    module = hub.module()
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", module.errors)
    return hub
