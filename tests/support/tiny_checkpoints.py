"""Tiny random checkpoints, the same weights as a Hugging Face directory and as a GGUF file."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import safetensors.numpy
import tokenizers

GGUF_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
SAFETENSORS_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|turn|>")
USER_TOKEN = "<tool>"
# Every row length is a multiple of 32, so that every matrix fits every block type.
HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, CONTEXT = 64, 96, 6, 2, 16, 3, 128

# As in the tokenizer.json of the published models.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "llama-bpe": _CONTRACTIONS + r"\p{N}{1,3}" + _REST,
    "qwen2": _CONTRACTIONS + r"\p{N}" + _REST,
}
_CORPUS = [
    "the quick brown fox jumps over the lazy dog, and it's not the first time; we'll see what they've done.",
    "In 1984 there were 365 days, 8760 hours and 525600 minutes; 1984 again.",
    "def main():\n    return [x for x in range(10)]\n\n\n\tprint('hello, world')\r\n",
    "Grüße aus Köln, naïve café, 東京と大阪, привет мир, 😀😀",
] * 4


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A checkpoint in memory.

    Attributes:
      arch: "llama" or "qwen2".
      weights: float32, by Hugging Face name, in Hugging Face orientation.
      pre: GGUF's name of the pre-tokenizer.
      config: fields that replace or extend those of config.json.
      metadata: keys that replace or extend those of the GGUF file; None leaves one out.
      extra: further tensors of the GGUF file, float32.
    """

    arch: str
    weights: dict[str, np.ndarray]
    pre: str = "smollm"
    config: dict = dataclasses.field(default_factory=dict)
    metadata: dict = dataclasses.field(default_factory=dict)
    extra: dict = dataclasses.field(default_factory=dict)

    def rounded(self, type_name: str) -> Tiny:
        """The weights as a GGUF file of that type holds them, so that Hugging Face can hold the same."""
        kind = gguf.GGMLQuantizationType[type_name]
        weights = {
            name: gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind) if array.ndim == 2 else array
            for name, array in self.weights.items()
        }
        return dataclasses.replace(self, weights=weights)


def make(arch: str = "llama", *, tied: bool = False, pre: str = "smollm", seed: int = 0, **overrides) -> Tiny:
    """Random weights of a tiny model."""
    rng = np.random.default_rng(seed)
    vocab = make_tokenizer(pre).get_vocab_size()

    def matrix(rows, columns):
        return (rng.standard_normal((rows, columns)) * columns**-0.5).astype(np.float32)

    def scale():
        return (1 + 0.1 * rng.standard_normal(HIDDEN)).astype(np.float32)

    weights = {"model.embed_tokens.weight": matrix(vocab, HIDDEN), "model.norm.weight": scale()}
    if not tied:
        weights["lm_head.weight"] = matrix(vocab, HIDDEN)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        weights[prefix + "input_layernorm.weight"] = scale()
        weights[prefix + "post_attention_layernorm.weight"] = scale()
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            weights[f"{prefix}self_attn.{name}_proj.weight"] = matrix(heads * HEAD_DIM, HIDDEN)
            if arch == "qwen2":
                bias = rng.standard_normal(heads * HEAD_DIM).astype(np.float32)
                weights[f"{prefix}self_attn.{name}_proj.bias"] = bias
        weights[prefix + "self_attn.o_proj.weight"] = matrix(HIDDEN, HEADS * HEAD_DIM)
        weights[prefix + "mlp.gate_proj.weight"] = matrix(FFN, HIDDEN)
        weights[prefix + "mlp.up_proj.weight"] = matrix(FFN, HIDDEN)
        weights[prefix + "mlp.down_proj.weight"] = matrix(HIDDEN, FFN)
    return Tiny(arch, weights, pre, **overrides)


@functools.cache
def make_tokenizer(pre: str) -> tokenizers.Tokenizer:
    """A byte-level BPE trained on a few lines, as the model's own tokenizer.json would have it."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=pre == "llama-bpe"))
    parts = tokenizers.pre_tokenizers
    if pre in PATTERNS:
        split = parts.Split(tokenizers.Regex(PATTERNS[pre]), behavior="isolated")
        tokenizer.pre_tokenizer = parts.Sequence([split, parts.ByteLevel(add_prefix_space=False, use_regex=False)])
    elif pre == "smollm":
        digits = parts.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = parts.Sequence([digits, parts.ByteLevel(add_prefix_space=False)])
    else:
        tokenizer.pre_tokenizer = parts.ByteLevel(add_prefix_space=False)
    if pre == "qwen2":
        tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=parts.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_tokens([tokenizers.AddedToken(USER_TOKEN, normalized=False)])
    return tokenizer


def hf_config(tiny: Tiny) -> dict:
    """config.json of the checkpoint."""
    fields = {
        "model_type": tiny.arch,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": len(tiny.weights["model.embed_tokens.weight"]),
        "tie_word_embeddings": "lm_head.weight" not in tiny.weights,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": [1, 2],
    }
    return fields | tiny.config


def write_huggingface(tiny: Tiny, directory: Path, *, dtype: str = "float32", shards: int = 1) -> Path:
    """Writes config.json, tokenizer.json and the weights, in one file or in shards with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf_config(tiny)))
    make_tokenizer(tiny.pre).save(str(directory / "tokenizer.json"))
    weights = {name: array.astype(SAFETENSORS_DTYPES[dtype]) for name, array in tiny.weights.items()}
    if shards == 1:
        safetensors.numpy.save_file(weights, directory / "model.safetensors")
        return directory
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: weights[key] for key in list(weights)[shard::shards]}
        safetensors.numpy.save_file(part, directory / name)
        weight_map |= dict.fromkeys(part, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def write_gguf(tiny: Tiny, path: Path, type_name: str = "F32") -> Path:
    """Writes the checkpoint as llama.cpp's converter would; vectors stay float32."""
    writer = gguf.GGUFWriter(path, tiny.arch)
    for key, value in (gguf_metadata(tiny) | tiny.metadata).items():
        add_value(writer, key, value)
    kind = gguf.GGMLQuantizationType[type_name]
    for name, array in tiny.weights.items():
        if tiny.arch == "llama":
            array = _permuted(name, array, hf_config(tiny))
        if array.ndim >= 2:  # experts of a layer lie together
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), array)
    for name, array in tiny.extra.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    """GGUF's name for a Hugging Face tensor."""
    for theirs, ours in (
        ("model.layers.", "blk."),
        ("self_attn.o_proj", "attn_output"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        *((f"self_attn.{p}_proj", f"attn_{p}") for p in "qkv"),
        *((f"mlp.{p}_proj", f"ffn_{p}") for p in ("gate", "up", "down")),
    ):
        name = name.replace(theirs, ours)
    return name


def _permuted(name: str, array: np.ndarray, config: dict) -> np.ndarray:
    """The row order of llama.cpp's converter, written as it writes it."""
    if ".q_proj." not in name and ".k_proj." not in name:
        return array
    heads = config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
    return array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def gguf_metadata(tiny: Tiny) -> dict:
    """The keys of the GGUF file, without those that `tiny.metadata` changes."""
    tokenizer, config = make_tokenizer(tiny.pre), hf_config(tiny)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [tokenizer.id_to_token(index) for index in range(tokenizer.get_vocab_size())]
    arch = tiny.arch
    return {
        f"{arch}.block_count": config["num_hidden_layers"],
        f"{arch}.context_length": config["max_position_embeddings"],
        f"{arch}.embedding_length": config["hidden_size"],
        f"{arch}.feed_forward_length": config["intermediate_size"],
        f"{arch}.attention.head_count": config["num_attention_heads"],
        f"{arch}.attention.head_count_kv": config["num_key_value_heads"],
        f"{arch}.attention.key_length": config["head_dim"],
        f"{arch}.attention.value_length": config["head_dim"],
        f"{arch}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{arch}.rope.freq_base": float(config["rope_theta"]),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": tiny.pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if t in SPECIAL_TOKENS else 4 if t == USER_TOKEN else 1 for t in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }


def add_value(writer: gguf.GGUFWriter, key: str, value) -> None:
    """Adds a key of the metadata; None adds nothing."""
    if value is None:
        return
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add.get(type(value), writer.add_array)(key, value)
