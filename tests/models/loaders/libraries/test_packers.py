"""The packers of these tests write what the formats' own libraries write, byte for byte.

Skipped where a library is not installed, as in the project's own environment: all need torch. Seen with AutoGPTQ 0.7.1,
AutoAWQ 0.2.9, compressed-tensors 0.20.1, transformers 5.24.0 and bitsandbytes 0.50.2 (on a CPU).
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.models.loaders import tiny_quantized as formats

torch = pytest.importorskip("torch")
N, K = 64, 96


@pytest.fixture
def grids(monkeypatch):
    """Integers, zeros and scales of the layers that `tiny_quantized` packs.

    Zeros are at least 1: AutoGPTQ stores the z - 1 of a zero of 0 as 32 bits of ones.
    """
    drawn, grid = [], formats.grid

    def positive(*arguments):
        codes, zeros, scales = grid(*arguments)
        drawn.append((codes, np.maximum(zeros, 1), scales))
        return drawn[-1]

    monkeypatch.setattr(formats, "grid", positive)
    return drawn


def linear(weight):
    layer = torch.nn.Linear(*weight.shape[::-1], bias=False)
    layer.weight.data = torch.tensor(weight)
    return layer


@pytest.mark.parametrize(
    ("bits", "group", "is_ordered"), [(2, 16, False), (3, 32, False), (3, 32, True), (4, 32, True), (8, 96, False)]
)
def test_auto_gptq(bits, group, is_ordered, grids):
    rng = np.random.default_rng(bits)
    library = pytest.importorskip("auto_gptq.nn_modules.qlinear.qlinear_cuda")
    order = rng.permutation(K) if is_ordered else None
    layer = formats.gptq(rng, N, K, bits=bits, group=group, order=order)
    ((_, zeros, scales),) = grids
    packed = library.QuantLinear(bits, group, K, N, False)
    of_row = torch.tensor(layer.tensors["g_idx"])
    packed.pack(linear(layer.weight), torch.tensor(scales), torch.tensor(zeros).float(), of_row)
    for name in ("qweight", "qzeros", "scales", "g_idx"):
        np.testing.assert_array_equal(getattr(packed, name).numpy(), layer.tensors[name], err_msg=name)


def test_auto_awq(grids):
    """Its weights, too, which are float16."""
    library, packing = (pytest.importorskip(f"awq.{name}") for name in ("modules.linear.gemm", "utils.packing_utils"))
    layer = formats.awq(np.random.default_rng(0), N, K)
    ((_, zeros, scales),) = grids
    zeros, scales = torch.tensor(zeros.T.copy()).float(), torch.tensor(scales.T.copy())
    packed = library.WQLinear_GEMM.from_linear(linear(layer.weight), 4, 32, scales=scales, zeros=zeros)
    for name in ("qweight", "qzeros", "scales"):
        np.testing.assert_array_equal(getattr(packed, name).numpy(), layer.tensors[name], err_msg=name)
    weight = packing.dequantize_gemm(packed.qweight, packed.qzeros, packed.scales, 4, 32)
    np.testing.assert_array_equal(weight.numpy().T, layer.weight.astype(np.float16))


@pytest.mark.parametrize("is_symmetric", [False, True])
@pytest.mark.parametrize(
    ("bits", "group"), [(1, None), (2, 32), (3, 32), (4, 32), (5, None), (6, 48), (7, 32), (8, None)]
)
@pytest.mark.parametrize("as_integers", [False, True])
def test_compressed_tensors(as_integers, bits, group, is_symmetric):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    options = {"bits": bits, "group": group, "symmetric": is_symmetric}
    integers = formats.compressed(np.random.default_rng(bits), 64, 96, ints=True, **options)
    layer = integers if as_integers else formats.compressed(np.random.default_rng(bits), 64, 96, **options)
    strategy = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=is_symmetric, **strategy)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    zeros = integers.tensors.get("weight_zero_point")
    scale = layer.tensors["weight_scale"].astype(np.float32)
    state = {"weight": torch.tensor(layer.weight), "weight_scale": torch.tensor(scale)}
    state |= {} if zeros is None else {"weight_zero_point": torch.tensor(zeros)}
    name = "int-quantized" if as_integers else "pack-quantized"
    found = BaseCompressor.get_value_from_registry(name).compress(state, scheme)
    assert set(found) == set(layer.tensors)
    for name in set(found) - {"weight_scale"}:
        np.testing.assert_array_equal(found[name].numpy(), layer.tensors[name], err_msg=name)


def test_bitnet_of_transformers():
    pack_weights = pytest.importorskip("transformers.integrations.bitnet").pack_weights
    layer = formats.bitnet(np.random.default_rng(0), 64, 96, divides=True)
    found = pack_weights(torch.tensor(np.sign(layer.weight)))
    np.testing.assert_array_equal(found.numpy(), layer.tensors["weight"])


@pytest.mark.parametrize("exact", [False, True])
def test_bitsandbytes(exact):
    """The tensors of a layer that it quantizes, saved, and the weights that it reads from them."""
    library = pytest.importorskip("bitsandbytes")
    weight = formats.rows(np.random.default_rng(0), N, K, exact=exact)
    layer = formats.bitsandbytes_of(weight)
    packed = library.nn.Linear8bitLt(K, N, bias=False, has_fp16_weights=False)
    packed.load_state_dict({"weight": torch.tensor(weight)})
    found = packed.to("cpu").state_dict()
    assert set(found) == set(layer.tensors)
    for name, tensor in layer.tensors.items():
        np.testing.assert_array_equal(found[name].numpy(), tensor, err_msg=name)
    read = library.functional.int8_vectorwise_dequant(found["weight"], found["SCB"])
    np.testing.assert_array_equal(read.numpy(), layer.weight)
