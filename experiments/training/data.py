"""Training data: a text or token ids, split into training and validation windows, in a resumable shuffled order."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import grain
import numpy as np
import tokenizers
from jaxtyping import Int
from ml_collections import ConfigDict

from bipolar_jax.checkpoint.atomic_write import atomic_write
from bipolar_jax.models.pretrained import PretrainedModel
from bipolar_jax.models.tokenizer_json import encode_texts, load_tokenizer
from bipolar_jax.models.transformer import check_ids

from ..support.progress import progress_bar
from ..support.sources import load_text_source

_END_OF_TEXT = "<|endoftext|>"
# Unit of the split, in characters: short enough that both sides contain every kind of text in the source.
_BLOCK_CHARACTERS = 8192


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """Token ids for training and validation.

    Attributes:
      tokenizer: the tokenizer that made the ids.
      train: int32 windows to train on.
      validation: int32 windows to evaluate on, disjoint from `train`.
    """

    tokenizer: tokenizers.Tokenizer
    train: Int[np.ndarray, "windows length"]
    validation: Int[np.ndarray, "windows length"]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all windows."""
        return hashlib.sha256(self.train.tobytes() + self.validation.tobytes()).hexdigest()

    def batches(self, batch_size: int, seed: int) -> grain.DatasetIterator:
        """An endless iterator over batches [batch_size, length], reshuffled every epoch; resumable by `set_state`.

        Raises:
          ValueError: there are fewer windows than `batch_size`.
        """
        if not 1 <= batch_size <= len(self.train):
            raise ValueError(
                f"batch_size={batch_size} must be from 1 to {len(self.train)}, the number of training windows"
            )
        epochs = 2**62 // len(self.train)  # None would overflow the length at batch_size=1
        dataset = grain.MapDataset.source(self.train).seed(seed).shuffle().repeat(epochs).batch(batch_size)
        # No prefetching: the arrays are in memory.
        return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def load_training_data(config: ConfigDict, workdir: Path, pretrained: PretrainedModel | None = None) -> TrainingData:
    """Reads and splits the text, and loads or trains the tokenizer.

    Every `config.validation_every`-th block of the text is for validation, unless
    `config.validation_text` names a text of its own for that. A tokenizer is trained on the
    training blocks only, and saved in the workdir for resumed runs.

    Args:
      config: the fields `text`, `validation_text`, `tokenizer`, `vocab_size`, `window_length` and
        `validation_every` of configs/tiny_base.py.
      workdir: folder of the run.
      pretrained: the model to train further, whose tokenizer is used; or None.

    Raises:
      ValueError: ids outside the vocabulary, a tokenizer that does not fit the model, or
        a text too short for one window of training and one of validation.
      FileNotFoundError: no such text or tokenizer.
    """
    if config.validation_every < 2 or config.window_length < 2:
        raise ValueError(
            f"validation_every={config.validation_every} and window_length={config.window_length} must be at least 2"
        )
    if config.text.endswith(".npy"):
        if config.validation_text:
            raise ValueError(
                f"validation_text={config.validation_text} needs a text to train on, but {config.text} holds token ids"
            )
        splits = _split(_load_ids(Path(config.text)), config.validation_every, config.window_length)
        tokenizer = _tokenizer(config, workdir, pretrained, None)
    else:
        if config.validation_text:
            texts = [_blocks(_load_texts(names), _BLOCK_CHARACTERS) for names in (config.text, config.validation_text)]
        else:
            texts = _split(_load_texts(config.text), config.validation_every, _BLOCK_CHARACTERS)
        tokenizer = _tokenizer(config, workdir, pretrained, texts[0])
        with progress_bar("encoding the text"):
            splits = [[np.asarray(ids, np.int32) for ids in encode_texts(tokenizer, blocks)] for blocks in texts]
    vocab_size = pretrained.model.config.vocab_size if pretrained else tokenizer.get_vocab_size()
    if tokenizer.get_vocab_size() > vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the model's vocabulary {vocab_size}: "
            "use the tokenizer that the model was trained with"
        )
    windows = [_windows(split, config.window_length) for split in splits]
    for name, ids in zip(("training", "validation"), windows, strict=True):
        if not len(ids):
            raise ValueError(
                f"the text is too short for one {name} window of {config.window_length} tokens: give a longer text, or "
                "lower validation_every or window_length"
            )
        check_ids(ids.reshape(-1), vocab_size)
    return TrainingData(tokenizer, *windows)


def train_tokenizer(texts: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Trains a byte-level BPE tokenizer, as GPT-2's; id 0 is <|endoftext|>.

    Args:
      texts: training text.
      vocab_size: largest number of tokens.

    Raises:
      ValueError: `vocab_size` has no room for the 256 bytes and <|endoftext|>.
    """
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise ValueError(f"vocab_size={vocab_size} must be above {len(alphabet)}, the tokens of single bytes")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[_END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _tokenizer(config, workdir, pretrained, texts) -> tokenizers.Tokenizer:
    if config.tokenizer:
        return _read_tokenizer(Path(config.tokenizer))
    if pretrained is not None:
        return pretrained.tokenizer
    if texts is None:
        raise ValueError(
            f"{config.text} holds token ids: name the tokenizer.json they were made with in config.tokenizer"
        )
    digest = hashlib.sha256(f"{config.vocab_size} {''.join(texts)}".encode()).hexdigest()
    path = workdir / f"tokenizer-{digest[:16]}.json"
    if path.is_file():
        return _read_tokenizer(path)
    with progress_bar(f"training a tokenizer of {config.vocab_size} tokens"):
        tokenizer = train_tokenizer(texts, config.vocab_size)
    with atomic_write(path) as partial:
        partial.write_text(tokenizer.to_str())
    return tokenizer


def _read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer at {path}: give a tokenizer.json, or leave the field empty to train one")
    try:
        return load_tokenizer(path)
    except ValueError as error:
        raise ValueError(f"{path} is not a tokenizer.json ({error}): give another, or leave the field empty") from error


def _load_ids(path: Path) -> Int[np.ndarray, " tokens"]:
    if not path.is_file():
        raise FileNotFoundError(f"no token ids at {path}: write them with numpy.save, as a 1-D integer array")
    try:
        # Mapped, so that a damaged shape allocates nothing: NumPy compares it with the file's size.
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except MemoryError:
        raise
    except Exception as error:  # NumPy evaluates the header as Python
        raise ValueError(f"{path} is not a NumPy array ({error!s:.200}): write it with numpy.save") from error
    if not isinstance(ids, np.ndarray):  # an archive of arrays
        raise ValueError(f"{path} is not a NumPy array: write it with numpy.save")
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not ids.size:
        raise ValueError(f"{path} holds {ids.dtype.name}{list(ids.shape)}: token ids are a 1-D integer array")
    return np.asarray(ids)


def _split(sequence, every: int, block_length: int) -> tuple[list, list]:
    """Training and validation blocks of a text or of ids; the last of every `every` blocks is for validation."""
    blocks = _blocks(sequence, block_length)
    validation = blocks[every - 1 :: every]
    return [blocks[i] for i in range(len(blocks)) if i % every != every - 1], validation


def _blocks(sequence, length: int) -> list:
    return [sequence[start : start + length] for start in range(0, len(sequence), length)]


def _load_texts(names: str) -> str:
    return "\n\n".join(load_text_source(name) for name in names.split(","))


def _windows(blocks: list[np.ndarray], length: int) -> Int[np.ndarray, "windows length"]:
    ids = np.concatenate([np.zeros(0, np.int32), *blocks])
    used = ids[: len(ids) // length * length]
    return used.reshape(-1, length)
