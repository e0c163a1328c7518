"""Readers of Hugging Face directories in low-bit formats: the tensors of each, and what config.json says of them."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from pathlib import Path

import tokenizers

from bipolar_jax.models.loaders import load_huggingface
from bipolar_jax.models.loaders.huggingface.quantized.method import read_format
from tests.fuzz import mutations
from tests.fuzz.reader import Reader
from tests.models.loaders import tiny_quantized as formats
from tests.models.loaders.test_quantized_formats import CASES, ORDERS, ct_config, gptq_config, maker, weights_of
from tests.support import tiny_checkpoints as tiny

_ZEROS = weights_of(num_bits=3, symmetric=False, strategy="group", group_size=32)
# Of each format the case with the most tensors.
FORMATS = {
    "gptq": CASES["gptq v2, act-order"][:2],
    "awq": CASES["awq"][:2],
    "pack_quantized": (
        ct_config(_ZEROS, ignore=["lm_head"]),
        dict(of=formats.compressed, bits=3, group=32, symmetric=False, order=ORDERS),
    ),
    "int_quantized": CASES["int-quantized W4 with zeros"][:2],
    "bitnet": CASES["bitnet"][:2],
    "bitsandbytes": CASES["bitsandbytes"][:2],
}
# Settings that the formats above leave out.
_MORE_SETTINGS = (
    gptq_config(bits=3, checkpoint_format="gptq_v2", desc_act=True, modules_to_not_convert=["lm_head"], dynamic={}),
    {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline", "use_rms_norm": False},
    {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": []},
)


def make_readers(folder: Path) -> dict[str, Reader]:
    """The readers by name; writes their files below `folder`."""
    tensors = {name: _tensors(folder / name, *written) for name, written in FORMATS.items()}
    return {**tensors, "quantization_methods": _methods(folder / "quantization_methods")}


def _one_layer() -> tiny.Tiny:
    model = tiny.make(tied=True)
    weights = {name: array for name, array in model.weights.items() if not re.search(r"layers\.[12]", name)}
    return dataclasses.replace(model, weights=weights, config={"num_hidden_layers": 1})


def _tensors(directory: Path, config: dict, options: dict) -> Reader:
    """model.safetensors."""
    floats = ("q_proj", "k_proj", "gate_proj", "up_proj")  # every reading builds the packed layers
    formats.write(directory, config, maker(**options), model=_one_layer(), float_layers=floats)
    # Every reading parses it, so it is small.
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).save(str(directory / "tokenizer.json"))
    path = directory / "model.safetensors"
    raw = path.read_bytes()

    def damage(rng: random.Random) -> bytes:
        if rng.random() < 0.85:
            return mutations.damaged_safetensors(raw, rng)
        return _with_damaged_numbers(raw, rng)

    return Reader(path, raw, damage, lambda: load_huggingface(directory))


def _with_damaged_numbers(raw: bytes, rng: random.Random) -> bytes:
    """A file with other numbers in one tensor of a layer, which is more often a small one: scales, zeros, orders."""
    length = int.from_bytes(raw[:8], "little")
    spans = [fields["data_offsets"] for name, fields in json.loads(raw[8 : 8 + length]).items() if ".layers." in name]
    start, end = (8 + length + at for at in rng.choice(spans))
    data = bytearray(raw)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(start, end)
        count = min(rng.choice((1, 2, 4, 64)), end - at)
        data[at : at + count] = rng.choice((rng.randbytes(count), b"\xff" * count, b"\x00" * count, b"\x7f" * count))
    return bytes(data)


def _methods(directory: Path) -> Reader:
    """The quantization_config of config.json, of every format; read without a tensor."""
    directory.mkdir(parents=True)
    path = directory / "config.json"
    configs = [config for config, _ in FORMATS.values()] + list(_MORE_SETTINGS)
    fields = tiny.hf_config(_one_layer())

    def damage(rng: random.Random) -> bytes:
        stated = fields | {"quantization_config": rng.choice(configs)}
        return mutations.damaged_field(stated, ("quantization_config",), rng).encode("utf-8", "replace")

    intact = json.dumps(fields | {"quantization_config": configs[0]}).encode()
    return Reader(path, intact, damage, lambda: read_format(directory))
