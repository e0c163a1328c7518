"""Models by their names on the Hugging Face Hub, kept in the cache of huggingface_hub."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable
from pathlib import Path

from bipolar_jax.extras import require
from bipolar_jax.models.loaders.huggingface.json_fields import read_json

# OWNER/NAME, and optionally the name of a GGUF file or of a packed checkpoint.
_NAME = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96})(?:/(?P<file>[^/\\]{1,200}\.(?:gguf|safetensors)))?"
)
_TEXTS = ("*.json", "*.jinja")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def local_path(path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The path itself if there is a file or folder, or a name's files on the Hub, downloaded if they are not cached.

    Only config, tokenizer and chat template are fetched, and the safetensors files that the model consists of; or the
    one file that is named. Without a network the files of the last download are used.

    Args:
      path: a path, "OWNER/NAME", "OWNER/NAME/FILE.gguf" or "OWNER/NAME/FILE.safetensors".
      revision: branch, tag or commit of the repository; None is its main branch.

    Raises:
      FileNotFoundError: no file, and no possible name on the Hub, nothing of that name there or, without a network, in
        its cache.
      PermissionError: the repository has to be asked for.
      ConnectionError: the download fails.
      ValueError: a revision of a local path.
      ModuleNotFoundError: huggingface_hub is not installed.
    """
    text, path = os.fspath(path), Path(path)
    name = _NAME.fullmatch(text)
    if path.exists() or name is None:
        if revision is not None:
            raise ValueError(f"{path} is no name on the Hugging Face Hub, so it has no revision {revision!r:.100}")
        return path
    hub = require("huggingface_hub", "models")
    repository, file = name["repository"], name["file"]
    if file is not None:
        return Path(_download(text, lambda: hub.hf_hub_download(repository, file, revision=revision)))

    def snapshot(revision: str | None, patterns: list[str]) -> Path:
        # No folders: they hold the same model in other formats.
        fetch = {"revision": revision, "allow_patterns": patterns, "ignore_patterns": ["*/*"]}
        return Path(_download(text, lambda: hub.snapshot_download(repository, **fetch)))

    folder = snapshot(revision, list(_TEXTS))
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{text} on the Hugging Face Hub has no config.json: name one of its files, such as {text}/FILE.gguf"
        )
    files = {_WEIGHTS}
    if (folder / _INDEX).is_file():
        shards = read_json(folder / _INDEX).get("weight_map")
        files = {shard for shard in shards.values() if isinstance(shard, str)} if isinstance(shards, dict) else files
    if all((folder / file).is_file() for file in files):
        return folder
    return snapshot(folder.name, [glob.escape(file) for file in sorted(files)])  # of the same commit


def _download(name: str, download: Callable[[], str]) -> str:
    errors = require("huggingface_hub.errors", "models")
    where = f"no file or folder {name} here; on the Hugging Face Hub"
    try:
        return download()
    except errors.HFValidationError as error:
        raise FileNotFoundError(
            f"no file or folder {name} here, and no name on the Hugging Face Hub: {error}"
        ) from error
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{where} it has to be asked for: accept its terms on its page, and set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(f"{where} it does not exist or is private: check the name, or set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{where} it has no such revision: leave it None for the main branch") from error
    except FileNotFoundError as error:  # LocalEntryNotFoundError among them: no network, and not cached
        raise FileNotFoundError(
            f"no file or folder {name} here; the Hugging Face Hub cannot be reached, and its cache does not hold it: "
            "load it where there is a network, or give a path"
        ) from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(f"{where} there is no such file: check its name") from error
    except ModuleNotFoundError:
        raise
    except Exception as error:  # of whatever library it downloads with
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConnectionError(f"{name} cannot be downloaded from the Hugging Face Hub: {reason:.300}") from error
