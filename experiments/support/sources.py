"""Models and texts by the names that configs use."""

from __future__ import annotations

import contextlib
import hashlib
import sysconfig
from pathlib import Path

from bipolar_jax.models.loaders import load_pretrained
from bipolar_jax.models.pretrained import PretrainedModel
from experiments.support.fetch import SHA256, fetch_smollm2
from experiments.support.progress import progress_bar

_NOT_STANDARD = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def load_model_source(name: str, bits: int | None = None) -> PretrainedModel:
    """A model: in float32, or as it was packed.

    Args:
      name: "smollm2" for the one that the package index serves, or the path of a GGUF
        file, a Hugging Face directory or a packed checkpoint.
      bits: weight bits to read of a packed checkpoint at most; None reads all.

    Raises:
      ValueError, FileNotFoundError, RuntimeError: see `fetch_smollm2` and `load_pretrained`.
    """
    path = fetch_smollm2() if name == "smollm2" else Path(name)
    with progress_bar(f"loading {path.name}"):
        return load_pretrained(path, bits=bits)


def model_fingerprint(name: str) -> str:
    """Changes when the files of a model do: their digest where it is known, else names, sizes and times."""
    if name == "smollm2":
        return SHA256
    path = Path(name)
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def load_text_source(name: str) -> str:
    """A text to evaluate or to train on.

    Args:
      name: "pydoc_topics" for CPython's help topics, "python_stdlib" for the source of its
        standard library without tests (12 MB in 3.12.1; other releases differ), or the path
        of a UTF-8 file.

    Raises:
      FileNotFoundError: no such file.
      ValueError: an empty file, or one that is not UTF-8.
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
    """Source files by path, those that are UTF-8; what was installed beside them and tests are left out."""
    root = Path(sysconfig.get_path("stdlib"))
    texts = []
    for file in sorted(root.rglob("*.py")):
        if not _NOT_STANDARD.intersection(file.relative_to(root).parts):
            with contextlib.suppress(UnicodeDecodeError):
                texts.append(file.read_bytes().decode("utf-8"))
    if not texts:
        raise FileNotFoundError(f"no Python source below {root}: install Python with its standard library's source")
    return "\n\n".join(texts)
