"""Models by their names on the Hugging Face Hub: from its cache without a network, downloaded, or a sentence."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest

from bipolar_jax.models import load_pretrained
from bipolar_jax.models.loaders import load_huggingface
from bipolar_jax.models.loaders.hub import local_path
from tests.support import tiny_checkpoints as tiny

hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model in two shards, beside what is not to be fetched."""
    folder = tiny.write_huggingface(tiny.make(), tmp_path_factory.mktemp("repository"), shards=2)
    (folder / "consolidated.safetensors").write_text("the same weights again")
    (folder / "README.md").write_text("words")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    return folder


@pytest.fixture
def cache(directory, tmp_path, monkeypatch):
    """The cache after a download, without a network."""
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(directory, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return repository


def test_names_are_found_in_the_cache_without_a_network(cache, directory):
    loaded = load_pretrained("someone/tiny")
    expected = load_huggingface(directory)
    for found, stored in zip(*map(jax.tree.leaves, (loaded.model, expected.model)), strict=True):
        np.testing.assert_array_equal(found, stored)
    assert local_path("someone/tiny", COMMIT) == local_path("someone/tiny") == cache / "snapshots" / COMMIT
    (cache / "snapshots" / COMMIT / "model.gguf").write_text("a file")
    assert local_path("someone/tiny/model.gguf") == cache / "snapshots" / COMMIT / "model.gguf"
    shard = sorted((cache / "snapshots" / COMMIT).glob("model-*.safetensors"))[0]
    assert local_path(f"someone/tiny/{shard.name}") == shard


@pytest.mark.parametrize(
    ("name", "revision"),
    [("someone/other", None), ("someone/tiny", "branch"), ("someone/tiny/other.gguf", None)],
)
def test_without_a_network_what_is_not_cached_is_said(cache, name, revision):
    with pytest.raises(
        FileNotFoundError, match=f"no file or folder {name} here; the Hugging Face Hub cannot be reached"
    ):
        load_pretrained(name, revision=revision)


def test_only_what_the_model_consists_of_is_fetched(directory, tmp_path, monkeypatch):
    fetched = []

    def snapshot_download(repository, *, revision, allow_patterns, ignore_patterns):
        """As the Hub: the files that match, in the folder of the commit."""
        folder = tmp_path / COMMIT
        folder.mkdir(exist_ok=True)
        names = [str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()]
        found = hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        fetched.append((repository, revision, sorted(found)))
        for name in fetched[-1][2]:
            shutil.copy(directory / name, folder / name)
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    shards = sorted(set(json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"].values()))
    texts = ["config.json", "model.safetensors.index.json", "tokenizer.json"]
    assert local_path("someone/tiny", "main") == tmp_path / COMMIT
    assert fetched == [("someone/tiny", "main", texts), ("someone/tiny", COMMIT, shards)]
    local_path("someone/tiny", "main")
    assert len(fetched) == 3  # the weights are there


@pytest.mark.parametrize(
    ("kind", "expected", "message"),
    [
        ("HFValidationError", FileNotFoundError, "no file or folder someone/tiny here, and no name on the .* Hub: one"),
        ("GatedRepoError", PermissionError, "on the Hugging Face Hub it has to be asked for: accept its terms"),
        ("RepositoryNotFoundError", FileNotFoundError, "it does not exist or is private: check the name"),
        ("RevisionNotFoundError", FileNotFoundError, "it has no such revision"),
        ("EntryNotFoundError", FileNotFoundError, "there is no such file"),
        ("OfflineModeIsEnabled", ConnectionError, "someone/tiny cannot be downloaded .*: OfflineModeIsEnabled: one$"),
    ],
)
def test_errors_of_the_hub_are_sentences(kind, expected, message, monkeypatch):
    error = getattr(hub.errors, kind)

    def snapshot_download(*args, **kwargs):
        raise error.__new__(error, "one\ntwo") if issubclass(error, hub.errors.HfHubHTTPError) else error("one\ntwo")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    with pytest.raises(expected, match=message):
        load_pretrained("someone/tiny")


def test_other_paths_are_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", None)
    for path in (tmp_path / "nothing", "nothing", "a/b/c", "./a/b", "~/a", "a/b/c.bin"):
        with pytest.raises(FileNotFoundError, match="no checkpoint at"):
            load_pretrained(path)
    with pytest.raises(ValueError, match="is no name on the Hugging Face Hub, so it has no revision 'main'"):
        load_pretrained(tmp_path, revision="main")
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **kwargs: str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match="someone/files on the Hugging Face Hub has no config.json: name one of"
    ):
        load_pretrained("someone/files")
