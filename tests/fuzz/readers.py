"""The readers under test: each damages one file of an intact model and reads it."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import bipolar_jax as bj
from bipolar_jax.models.blocks.rope import rope_frequencies
from bipolar_jax.models.checkpoint import load_model, save_model
from bipolar_jax.models.loaders import load_gguf, load_huggingface
from bipolar_jax.models.loaders.error_source import errors_name
from bipolar_jax.models.loaders.huggingface.chat_template import read_chat_template
from bipolar_jax.models.loaders.huggingface.config import read_config
from bipolar_jax.models.loaders.huggingface.quantized.method import read_format, read_transforms
from bipolar_jax.models.loaders.huggingface.quantized.tensors import packed_tensors
from bipolar_jax.models.loaders.huggingface.safetensors_files import SafetensorsFiles
from bipolar_jax.models.tokenizer_json import encode, load_tokenizer
from bipolar_jax.tuning.parse import parse_table
from experiments.support.workdir import RESULT_NAME, read_result
from tests.fuzz import experts, mutations, quantized
from tests.fuzz.reader import Reader
from tests.models.loaders import tiny_quantized
from tests.models.loaders.compressed_tensors.test_transforms import R1, R3, R4
from tests.models.loaders.gguf_integers import tiny_blocks
from tests.models.loaders.golden import checkpoints
from tests.models.loaders.test_quantized_formats import ct_config, maker, weights_of
from tests.support import tiny_checkpoints as tiny

# Golden checkpoints with windows, caps, two kinds of rotary tables, partial and long ones.
NEWER = ("qwen3 8b, yarn", "gemma 2", "gemma 3 1b", "phi 4 mini", "bitnet 2b")


def make_readers(folder: Path) -> dict[str, Reader]:
    """All readers by name; writes their files below `folder`."""
    checkpoint = tiny.make()
    return {
        "packed": _packed(folder),
        "gguf": _gguf(folder / "model.gguf", checkpoint),
        "gguf_integers": _gguf_integers(folder / "integers.gguf"),
        "sentencepiece": _gguf(folder / "sentencepiece.gguf", with_sentencepiece(checkpoint)),
        "safetensors": _safetensors(folder, checkpoint),
        "config": _config(folder, checkpoint),
        "quantization": _quantization(folder),
        "tokenizer": _tokenizer(folder, checkpoint),
        "index": _index(folder, checkpoint),
        "chat": _chat(folder, checkpoint),
        "tuning": _tuning(folder),
        "result": _result(folder),
        **quantized.make_readers(folder),
        **experts.make_readers(folder),
    }


def _packed(folder: Path) -> Reader:
    path = folder / "packed.safetensors"
    loaded = load_huggingface(tiny.write_huggingface(tiny.make(), folder / "float"))
    rules = [
        ("attention", bj.Precision(3, 8, 16, "minmax")),
        ("ffn/up", bj.Precision(4, 8, 32, scales="integer")),
        (".*", bj.Precision(4, 8)),
    ]
    model = bj.quantize_model(loaded.model, rules)
    save_model(path, dataclasses.replace(loaded, model=model))
    raw = path.read_bytes()
    return Reader(path, raw, lambda rng: mutations.damaged_packed(raw, rng), lambda: load_model(path))


def _gguf(path: Path, checkpoint: tiny.Tiny) -> Reader:
    raw = tiny.write_gguf(checkpoint, path, "Q8_0").read_bytes()
    return Reader(path, raw, lambda rng: mutations.damaged_gguf(raw, rng), lambda: load_gguf(path))


def _gguf_integers(path: Path) -> Reader:
    """Every type of integers, which stay as they are."""
    tiny_blocks.write(path, tiny_blocks.EVERY_TYPE, "Q1_0", tied=True, heads=(2, 1), ffn=32)
    raw = path.read_bytes()
    return Reader(
        path, raw, lambda rng: mutations.damaged_gguf_integers(raw, rng), lambda: load_gguf(path, activations=16)
    )


def with_sentencepiece(checkpoint: tiny.Tiny) -> tiny.Tiny:
    """The checkpoint with the tokens of bytes and some words, instead of byte-level BPE."""
    words = ["\u2581", "\u2581the", "th", "he", "\u2581quick", "qu", "ick", *"abcdehiknoqrtuwxyz", "\u2581q"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    changes = {
        "model": "llama",
        "tokens": tokens,
        "token_type": [2, 3, 3, *[6] * 256, *[1] * len(words)],
        "scores": [-float(rank) for rank in range(len(tokens))],
        "unknown_token_id": 0,
        "eot_token_id": None,
        "add_bos_token": None,
        "pre": None,
        "merges": None,
    }
    metadata = {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    metadata |= {"tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    sizes = {"llama.vocab_size": len(checkpoint.weights["model.embed_tokens.weight"])}
    return dataclasses.replace(checkpoint, metadata=metadata | sizes)


def _safetensors(folder: Path, checkpoint: tiny.Tiny) -> Reader:
    directory = tiny.write_huggingface(checkpoint, folder / "safetensors", dtype="bfloat16")
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    return Reader(path, raw, lambda rng: mutations.damaged_safetensors(raw, rng), lambda: load_huggingface(directory))


def _config(folder: Path, checkpoint: tiny.Tiny) -> Reader:
    directory = tiny.write_huggingface(checkpoint, folder / "config")
    path = directory / "config.json"
    fields = tiny.hf_config(checkpoint)
    scaled = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 1.0}
    variants = [
        fields,
        fields | {"rope_scaling": scaled | {"beta_fast": 32.0, "beta_slow": 1.0}},
        fields | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        fields | {"model_type": "mistral", "sliding_window": 64, "layer_types": ["full_attention"] * 3},
        *(golden.configs[layout] for name, golden in checkpoints.read().items() for layout in "45" if name in NEWER),
    ]

    def read():
        _, config = read_config(directory)
        if config.positions == "rope" and config.head_dim <= 1024:
            frequencies, factor = rope_frequencies(config)
            angles = np.float32(frequencies) * np.float32(factor)
            assert np.isfinite(angles).all(), "the logits would be NaN"
        jnp.zeros((), jnp.int32) + config.context_length

    def damage(rng):
        return mutations.damaged_json(rng.choice(variants), rng).encode("utf-8", "replace")

    return Reader(path, json.dumps(fields).encode(), damage, read)


def _quantization(folder: Path) -> Reader:
    """What config.json says of quantized layers and of rotations at run time; their words are not read."""
    directory, path = folder / "quantization", folder / "quantization" / "config.json"
    config = ct_config(
        weights_of(strategy="group", group_size=32, num_bits=4, symmetric=True),
        {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
        transform_config={"config_groups": {"R1": R1, "R3": R3, "R4": R4}},
        ignore=["lm_head"],
    )
    tiny_quantized.write(directory, config, maker(of=tiny_quantized.compressed, group=32))
    fields = json.loads(path.read_text())

    def read():
        architecture, config = read_config(directory)
        quantized, transforms = read_format(directory), read_transforms(directory)
        with SafetensorsFiles(directory) as files, errors_name(directory):
            config = transforms.applied(config, architecture, files)
            if quantized is not None:
                packed_tensors(architecture, config, files, quantized)

    def damage(rng):
        return mutations.damaged_field(fields, ("quantization_config",), rng).encode("utf-8", "replace")

    return Reader(path, path.read_bytes(), damage, read)


def _tokenizer(folder: Path, checkpoint: tiny.Tiny) -> Reader:
    directory = tiny.write_huggingface(checkpoint, folder / "tokenizer")
    path = directory / "tokenizer.json"
    fields = json.loads(path.read_text())
    # Fewer tokens, so that changes meet the rest of the file too.
    fields["model"]["merges"] = fields["model"]["merges"][:8]
    fields["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    expression = {"Regex": r"\p{N}{1,3}| ?\p{L}+|\s+"}
    replaced = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    fields["normalizer"] = {
        "type": "Sequence",
        "normalizers": [{"type": "NFC"}, {"type": "Prepend", "prepend": "x"}, replaced],
    }
    fields["pre_tokenizer"]["pretokenizers"].insert(
        0, {"type": "Split", "pattern": expression, "behavior": "Isolated", "invert": False}
    )

    def read():
        tokenizer = load_tokenizer(path, 400)
        try:
            tokenizer.decode(encode(tokenizer, "the quick brown fox, in 1984\n"))
        except ValueError as error:  # of a text, which is no file
            raise ValueError(f"{path}: {error}") from error

    def damage(rng):
        kind = rng.random()
        if kind < 0.1:
            found = rng.choice((expression, replaced["pattern"]))["Regex"]
            changed = rng.choice(
                (*mutations.EXPRESSIONS, mutations.damaged_bytes(found.encode(), rng).decode("latin1"))
            )
            return json.dumps(fields).replace(json.dumps(found), json.dumps(changed)).encode()
        if kind < 0.4:
            return mutations.damaged_json(fields, rng).encode("utf-8", "replace")
        return mutations.damaged_field(fields, mutations.TOKENIZER_PARTS, rng).encode("utf-8", "replace")

    return Reader(path, json.dumps(fields).encode(), damage, read)


def _index(folder: Path, checkpoint: tiny.Tiny) -> Reader:
    directory = tiny.write_huggingface(checkpoint, folder / "index", shards=3)
    path = directory / "model.safetensors.index.json"
    fields = json.loads(path.read_text())

    def damage(rng):
        return mutations.damaged_json(fields, rng).encode("utf-8", "replace")

    return Reader(path, path.read_bytes(), damage, lambda: load_huggingface(directory))


def _chat(folder: Path, checkpoint: tiny.Tiny) -> Reader:
    """tokenizer_config.json, whose template is rendered; a template that fails at a conversation is no damage."""
    directory = tiny.write_huggingface(checkpoint, folder / "chat")
    path = directory / "tokenizer_config.json"
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
    fields = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": template}
    several = fields | {"chat_template": [{"name": "default", "template": template}, {"name": "x", "template": ""}]}

    def read():
        found = read_chat_template(directory)
        if found is not None:
            try:
                found.render([{"role": "user", "content": "x"}])
            except ValueError as error:
                assert "chat template refuses the messages" in str(error)

    def damage(rng):
        return mutations.damaged_json(rng.choice((fields, several)), rng).encode("utf-8", "replace")

    return Reader(path, json.dumps(fields).encode(), damage, read)


def _tuning(folder: Path) -> Reader:
    path = folder / "table.json"
    many = {"tile_m": 64, "tile_n": 64, "schedule": "split_m", "slots": 4}
    many |= {"cluster_m": 1, "cluster_n": 1, "band": 8, "band_axis": "n"}
    few = {"warpgroups": 4, "w_slots": 8, "x_slots": 4, "parts": 1}
    entries = [
        {"kind": kind, "m": 64, "n": 128, "steps": 8, "shape": "s", "microseconds": 9.5, "tiling": tiling}
        for kind, tiling in (("planes", many), ("int8", many), ("few tokens", few))
    ]
    fields = {"device": "NVIDIA H200", "entries": entries}

    def damage(rng):
        return mutations.damaged_json(fields, rng).encode("utf-8", "replace")

    return Reader(
        path, json.dumps(fields).encode(), damage, lambda: parse_table(path.read_bytes().decode(errors="replace"), path)
    )


def _result(folder: Path) -> Reader:
    """The result.json of a training run, which a resumed one continues."""
    settings = {"seed": 0, "steps": 16, "rules": [["^layers/", "W2A2"]], "optimizer": {"learning_rate": 0.01}}
    evaluations = [{"step": step, "loss": 2.5, "perplexity": 12.0} for step in (0, 8, 16)]
    fields = {"settings": settings, "evaluations": evaluations, "environment": {"jax": "0.11.2"}}

    def damage(rng):
        return mutations.damaged_json(fields, rng).encode("utf-8", "replace")

    path = folder / RESULT_NAME
    read = functools.partial(read_result, folder, settings, {"evaluations": ["step", "loss"]})
    return Reader(path, json.dumps(fields).encode(), damage, read)
