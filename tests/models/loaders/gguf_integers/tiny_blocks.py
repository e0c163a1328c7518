"""Random blocks of GGUF's integer types, what they stand for, and tiny files of them."""

from __future__ import annotations

import unittest.mock
from pathlib import Path

import gguf
import numpy as np

from tests.support import tiny_checkpoints as tiny

# Weights and bytes of a block, and where its float16 numbers are; the first one is the scale.
LAYOUTS = {
    "Q4_0": (32, 18, (0,)),
    "Q4_1": (32, 20, (0, 2)),
    "Q5_0": (32, 22, (0,)),
    "Q5_1": (32, 24, (0, 2)),
    "Q8_0": (32, 34, (0,)),
    "Q2_K": (256, 84, (80, 82)),
    "Q3_K": (256, 110, (108,)),
    "Q4_K": (256, 144, (0, 2)),
    "Q5_K": (256, 176, (0, 2)),
    "Q6_K": (256, 210, (208,)),
    "TQ1_0": (256, 54, (52,)),
    "TQ2_0": (256, 66, (64,)),
    "Q1_0": (128, 18, (0,)),
    "Q2_0": (64, 18, (0,)),
}
NUMBERS = {"Q1_0": 41, "Q2_0": 42}
NAMES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
# Sizes that every type divides, but for the inputs of attention's output.
HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 256, 4, 2, 16
# Every type once, of layers with two heads and 32 inner numbers.
EVERY_TYPE = [
    dict(zip(NAMES, ("Q4_K", "Q5_K", "Q6_K", "Q4_1", "Q2_K", "Q3_K", "Q4_0"), strict=True)),
    dict(zip(NAMES, ("TQ1_0", "TQ2_0", "Q1_0", "Q5_0", "Q5_1", "Q2_0", "Q8_0"), strict=True)),
]


def random_blocks(type_name: str, rows: int, columns: int, seed: int = 0, size: float | None = None) -> np.ndarray:
    """Bytes [rows, bytes] with every pattern of integers, and finite scales of both signs.

    Scales spread over seven powers of ten, or give weights of about `size`.
    """
    rng = np.random.default_rng(seed)
    weights, nbytes, halves = LAYOUTS[type_name]
    raw = rng.integers(0, 256, (rows, columns // weights * nbytes), np.uint8)
    blocks = raw.reshape(-1, nbytes)
    if type_name == "TQ2_0":  # no pair of bits is 3
        blocks[:, :64] &= ~((blocks[:, :64] >> 1 & 0x55) | ((blocks[:, :64] >> 1 & 0x55) << 1)) | 0xAA
    for at in halves:
        spread = 10.0 ** rng.integers(-5, 2, (len(blocks), 1)) if size is None else size
        numbers = rng.standard_normal((len(blocks), 1)) * spread
        blocks[:, at : at + 2] = numbers.astype(np.float16).view(np.uint8)
    if size is not None:
        factor = size / np.std(dequantized(type_name, raw, columns))
        for at in halves:
            numbers = np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)
            blocks[:, at : at + 2] = (numbers * factor).astype(np.float16).view(np.uint8)
    return raw


def dequantized(type_name: str, raw: np.ndarray, columns: int) -> np.ndarray:
    """The weights, float32 [rows, columns], by gguf-py's reader, or by ggml's loops where that has none."""
    if type_name not in NUMBERS:
        return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[type_name])
    weights, nbytes, _ = LAYOUTS[type_name]
    numbers = np.zeros((raw.size // nbytes, weights), np.float32)
    for block, ours in zip(raw.reshape(-1, nbytes), numbers, strict=True):
        d = block[:2].copy().view(np.float16).astype(np.float32)[0]
        for j in range(weights):
            if type_name == "Q1_0":
                ours[j] = d if block[2 + j // 8] >> (j % 8) & 1 else -d
            else:
                ours[j] = (int(block[2 + j // 4] >> (2 * (j % 4)) & 3) - 1) * d
    return numbers.reshape(len(raw), columns)


def write(
    path: Path,
    types: list[dict[str, str]],
    head: str = "Q8_0",
    *,
    tied: bool = False,
    heads: tuple[int, int] = (HEADS, KV_HEADS),
    ffn: int = HIDDEN,
    arch: str = "llama",
) -> Path:
    """A Llama, or a Qwen3, of random blocks.

    Args:
      path: of the file.
      types: of each layer, by the names of its matrices, such as "attn_q"; all others are F16.
      head: type of the embedding and of the output layer.
      tied: whether there is no output layer.
      heads: of queries, and of keys and values.
      ffn: inner width of the feed-forward block.
      arch: "llama" or "qwen3", which has norms of heads.
    """
    vocab = tiny.make_tokenizer("smollm").get_vocab_size()
    fields = {
        "num_hidden_layers": len(types),
        "hidden_size": HIDDEN,
        "intermediate_size": ffn,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
    }
    checkpoint = tiny.Tiny(arch, {"model.embed_tokens.weight": np.zeros((vocab, 1))}, config=fields)
    writer = gguf.GGUFWriter(path, arch)
    for key, value in tiny.gguf_metadata(checkpoint).items():
        tiny.add_value(writer, key, value)
    tensors = {name: (head, vocab, HIDDEN) for name in ["token_embd", *([] if tied else ["output"])]}
    width, kv_width = (count * HEAD_DIM for count in heads)
    for layer, of_names in enumerate(types):
        rows = {"attn_q": width, "attn_k": kv_width, "attn_v": kv_width, "ffn_gate": ffn, "ffn_up": ffn}
        inputs = {"attn_output": width, "ffn_down": ffn}
        for name, type_name in (dict.fromkeys(NAMES, "F16") | of_names).items():
            tensors[f"blk.{layer}.{name}"] = (type_name, rows.get(name, HIDDEN), inputs.get(name, HIDDEN))
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(HIDDEN, np.float32))
        for name in ("attn_q_norm", "attn_k_norm") if arch == "qwen3" else ():
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.linspace(0.5, 1.5, HEAD_DIM, dtype=np.float32))
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for seed, (name, (type_name, rows, columns)) in enumerate(tensors.items()):
        if type_name == "F16":
            rng = np.random.default_rng(seed)
            writer.add_tensor(
                f"{name}.weight", (rng.standard_normal((rows, columns)) * columns**-0.5).astype(np.float16)
            )
            continue
        raw = random_blocks(type_name, rows, columns, seed, size=columns**-0.5)
        number = NUMBERS.get(type_name) or gguf.GGMLQuantizationType[type_name]
        with unittest.mock.patch.dict(gguf.GGML_QUANT_SIZES, {42: (64, 18)}):  # Q2_0, which gguf-py does not know
            writer.add_tensor(f"{name}.weight", raw, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
