"""What training reads: a text or token ids, split once and for all, as windows in an order that can be resumed."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import grain
import numpy as np
import tokenizers
from jaxtyping import Int
from ml_collections import ConfigDict

from bipolar_jax.models.pretrained import PretrainedModel
from bipolar_jax.models.transformer import check_ids
from experiments.support.progress import progress_bar
from experiments.support.sources import load_text_source

_END_OF_TEXT = "<|endoftext|>"
# A text is split in blocks of so many characters: as long as a page or two, so that both parts have all of its kinds.
_BLOCK = 8192


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """Token ids for training and for validation.

    Attributes:
      tokenizer: text to ids.
      train: windows to train on.
      validation: windows to evaluate on, none of which is trained on.
      fingerprint: SHA-256 of all of them.
    """

    tokenizer: tokenizers.Tokenizer
    train: Int[np.ndarray, "windows length"]
    validation: Int[np.ndarray, "windows length"]

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.train.tobytes() + self.validation.tobytes()).hexdigest()

    def batches(self, batch_size: int, seed: int) -> grain.DatasetIterator:
        """Batches [batch_size, length] without end, shuffled anew every epoch; `get_state` says where it stands.

        Raises:
          ValueError: fewer windows than a batch has.
        """
        if not 1 <= batch_size <= len(self.train):
            raise ValueError(f"batch_size={batch_size} must be from 1 to the {len(self.train)} windows there are")
        epochs = 2**62 // len(self.train)  # not None, which overflows the length where batches are of one window
        dataset = grain.MapDataset.source(self.train).seed(seed).shuffle().repeat(epochs).batch(batch_size)
        # The arrays are in memory: threads that read ahead would gain nothing.
        return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def load_training_data(config: ConfigDict, workdir: Path, pretrained: PretrainedModel | None = None) -> TrainingData:
    """Reads and splits the text, and trains its tokenizer or takes the one there is.

    Every `config.validation_every`-th block of the text is for validation; a trained
    tokenizer sees the others only. It is kept in the workdir, where a resumed run finds it.
    Where `config.validation_text` names another text, that is for validation and all of the
    first for training.

    Args:
      config: `text`, `validation_text`, `tokenizer`, `vocab_size`, `window_length` and `validation_every`, see
        configs/tiny_base.py.
      workdir: folder of the run.
      pretrained: the model that is trained further, whose tokenizer is taken; or None.

    Raises:
      ValueError: ids outside the vocabulary, a tokenizer that does not fit the model, or
        a text too short for a window of each part.
      FileNotFoundError: no such text or tokenizer.
    """
    if config.validation_every < 2 or config.window_length < 2:
        raise ValueError(
            f"validation_every={config.validation_every} and window_length={config.window_length} must be at least 2"
        )
    if config.text.endswith(".npy"):
        if config.validation_text:
            raise ValueError(f"validation_text={config.validation_text} needs a text to train on, got token ids")
        parts = _split(_load_ids(Path(config.text)), config.validation_every, config.window_length)
        tokenizer = _tokenizer(config, workdir, pretrained, None)
    else:
        if config.validation_text:
            texts = [_blocks(_load_texts(names), _BLOCK) for names in (config.text, config.validation_text)]
        else:
            texts = _split(_load_texts(config.text), config.validation_every, _BLOCK)
        tokenizer = _tokenizer(config, workdir, pretrained, texts[0])
        with progress_bar("encoding the text"):
            encode = tokenizer.encode_batch
            parts = [
                [np.asarray(found.ids, np.int32) for found in encode(blocks, add_special_tokens=False)]
                for blocks in texts
            ]
    vocab_size = pretrained.model.config.vocab_size if pretrained else tokenizer.get_vocab_size()
    if tokenizer.get_vocab_size() > vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the model's vocabulary {vocab_size}: "
            "use the tokenizer that the model was trained with"
        )
    windows = [_windows(part, config.window_length) for part in parts]
    for name, found in zip(("training", "validation"), windows, strict=True):
        if not len(found):
            raise ValueError(
                f"the text leaves no window of {config.window_length} tokens for {name}: give a longer text, or lower "
                "validation_every or window_length"
            )
        check_ids(found.reshape(-1), vocab_size)
    return TrainingData(tokenizer, *windows)


def train_tokenizer(texts: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Byte-level BPE (as GPT-2's) of at most `vocab_size` tokens, the first of them the end of a text.

    Raises:
      ValueError: no room for all bytes.
    """
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise ValueError(f"vocab_size={vocab_size} must be above {len(alphabet)}: every byte has a token of its own")
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
    made_of = hashlib.sha256(f"{config.vocab_size} {''.join(texts)}".encode()).hexdigest()
    kept = workdir / f"tokenizer-{made_of[:16]}.json"
    if kept.is_file():
        return _read_tokenizer(kept)
    with progress_bar(f"training a tokenizer of {config.vocab_size} tokens"):
        tokenizer = train_tokenizer(texts, config.vocab_size)
    partial = kept.with_name(f".{kept.name}.partial")
    partial.write_text(tokenizer.to_str())
    partial.replace(kept)
    return tokenizer


def _read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer at {path}: give a tokenizer.json, or leave it empty to train one")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"{path} is no tokenizer.json ({error}): give another, or leave it empty") from error


def _load_ids(path: Path) -> Int[np.ndarray, " tokens"]:
    if not path.is_file():
        raise FileNotFoundError(f"no token ids at {path}: write them with numpy.save, as one axis of integers")
    try:
        ids = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no array of numpy ({error}): write it with numpy.save") from error
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not ids.size:
        raise ValueError(f"{path} holds {ids.dtype.name}{list(ids.shape)}: token ids are one axis of integers")
    return ids


def _split(whole, every: int, block: int) -> tuple[list, list]:
    """Blocks of a text or of ids; the last of each `every` is for validation, the others for training."""
    blocks = _blocks(whole, block)
    validation = blocks[every - 1 :: every]
    return [blocks[i] for i in range(len(blocks)) if i % every != every - 1], validation


def _blocks(whole, block: int) -> list:
    return [whole[start : start + block] for start in range(0, len(whole), block)]


def _load_texts(names: str) -> str:
    return "\n\n".join(load_text_source(name) for name in names.split(","))


def _windows(parts: list[np.ndarray], length: int) -> Int[np.ndarray, "windows length"]:
    ids = np.concatenate([np.zeros(0, np.int32), *parts])
    used = ids[: len(ids) // length * length]
    return used.reshape(-1, length)
