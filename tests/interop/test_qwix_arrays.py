"""bipolar_jax.from_qwix and to_qwix: the same integers, scales and zeros in both directions, or a refusal."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bipolar_jax as bj

qwix = pytest.importorskip("qwix", reason="qwix is not installed")

K, N = 16, 6
FLOATS = np.random.default_rng(0).normal(size=(2, K, N)).astype(np.float32)


def rounded_by_qwix(qtype, method, tile=None, dtype=jnp.bfloat16, shape=(K, N)) -> qwix.QArray:
    """Weights [..., k, n] as qwix rounds them, with one scale for each column, and for each tile of k."""
    x = jnp.asarray(FLOATS.reshape(-1)[: np.prod(shape)].reshape(shape), dtype)
    ndim = len(shape)
    channels = [i for i in range(ndim) if i != ndim - 2]
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        tiles = None if tile is None else {ndim - 2: tile}
        return qwix.quantize(x, qtype, channelwise_axes=channels, tiled_axes=tiles, calibration_method=method)


def numbers(array: qwix.QArray) -> np.ndarray:
    """d (q - z) in float64, which rounds nothing."""

    def spread(x):
        x = np.asarray(x.astype(jnp.float32), np.float64)
        for i, (size, whole) in enumerate(zip(x.shape, array.shape, strict=True)):
            x = np.repeat(x, whole // size, axis=i)
        return x

    zero = 0 if array.zero_point is None else spread(array.zero_point)
    return (np.asarray(array.qvalue.astype(jnp.int32)) - zero) * spread(array.scale)


def equal(a, b) -> None:
    assert (a is None) == (b is None)
    if a is not None:
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(*(np.asarray(each.astype(jnp.float32)) for each in (a, b)))


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("qtype", "method", "tile", "shape"),
    [
        (jnp.int8, "absmax", None, (K, N)),
        (jnp.int8, "minmax", None, (2, K, N)),
        (jnp.int4, "minmax", 4, (2, K, N)),
        (jnp.int4, "absmax", 8, (K, N)),
        ("int3", "absmax", None, (K, N)),
        ("int2", "absmax", 4, (K, N)),
        ("int6", "absmax", 8, (K, N)),
    ],
)
def test_integers_scales_and_zeros_go_there_and_back(qtype, method, tile, shape):
    array = rounded_by_qwix(qtype, method, tile, shape=shape)
    packed = bj.from_qwix(array)
    assert packed.shape == shape
    assert packed.bits == (int(qtype[3:]) if isinstance(qtype, str) else jnp.iinfo(qtype).bits)
    assert packed.group_size == tile
    np.testing.assert_array_equal(np.asarray(packed.dequantize(), np.float64), numbers(array))
    back = bj.to_qwix(packed, jnp.bfloat16)
    assert back.qtype == array.qtype
    for name in ("qvalue", "scale", "zero_point"):
        equal(getattr(back, name), getattr(array, name))


def test_scales_of_the_whole_array_and_other_axes_spread():
    """Of an embedding [n, k], with one scale for all, float32 ones, zeros in other tiles, and unsigned integers."""
    codes = np.random.default_rng(1).integers(0, 16, (N, K))
    zero = np.random.default_rng(2).integers(0, 16, (N // 2, K // 8))
    array = qwix.QArray(jnp.asarray(codes, jnp.uint4), jnp.full((1, 1), 0.3), jnp.asarray(zero, jnp.uint4))
    packed = bj.from_qwix(array, axis=1)
    assert (packed.shape, packed.axis, packed.group_size) == ((N, K), -1, 8)
    np.testing.assert_allclose(packed.dequantize(), numbers(array), rtol=1e-6, atol=1e-7)
    back = bj.to_qwix(packed)
    np.testing.assert_array_equal(numbers(back), numbers(array))
    assert (back.scale.shape, back.qtype) == ((N, 2), jnp.int4)
    np.testing.assert_array_equal(bj.from_qwix(back, axis=1).planes, packed.planes)


@pytest.mark.covered("tiles, by the tests above; products, by test_a_layer_that_qwix_quantized_computes_the_same")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # qwix uses old names of Flax
def test_parameters_of_a_quantized_model_multiply_as_qwix_does():
    """The kernel of a linen layer that `quantize_params` rounded; the product is exact but for its scale."""
    from flax import linen

    x = jnp.asarray(FLOATS[0, :3, :].repeat(3, axis=1)[:, :K])
    layer = linen.Dense(N, use_bias=False)
    params = layer.init(jax.random.key(0), x)["params"]
    rule = qwix.QuantizationRule(module_path=".*", weight_qtype=jnp.int4, tile_size=8)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        model = qwix.quantize_model(layer, qwix.PtqProvider([rule]))
        template = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
        quantized = qwix.quantize_params(params, template)
        wanted = model.apply({"params": quantized}, x)
    found = bj.matmul(x, bj.from_qwix(quantized["kernel"]), a_bits=None)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("bits", "options", "qtype"),
    [
        (4, {"group_size": 4, "calibration": "minmax", "scales": "float"}, jnp.int4),
        (8, {"calibration": "minmax"}, jnp.int8),
        (1, {}, "int2"),
        (3, {"calibration": "absmax"}, jnp.int4),
        (bj.TERNARY, {}, "int2"),
        (4, {"group_size": 4}, jnp.int8),
    ],
)
def test_our_arrays_become_qwix_arrays_of_the_same_numbers(bits, options, qtype):
    kernel = FLOATS.copy()
    kernel[0, :, 1] = 0  # a column of zeros
    packed = bj.quantize(kernel, bits, axis=-2, **options)
    array = bj.to_qwix(packed)
    assert array.qtype == qtype
    np.testing.assert_allclose(numbers(array), packed.dequantize(), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(qwix.dequantize(array), packed.dequantize(), rtol=1e-6, atol=1e-7)
    again = bj.to_qwix(bj.from_qwix(array))
    np.testing.assert_array_equal(numbers(again), numbers(array))
    np.testing.assert_array_equal(numbers(bj.to_qwix(packed.unpack())), numbers(array))


def test_what_is_not_held_is_refused():
    floats = jnp.asarray(FLOATS[0])
    with pytest.raises(ValueError, match="takes a qwix.QArray, got .*: use bipolar_jax.quantize"):
        bj.from_qwix(floats)
    with pytest.raises(ValueError, match="takes a packed array, got .*: qwix.quantize rounds floats"):
        bj.to_qwix(floats)
    for qtype in ("nf4", jnp.float8_e4m3fn):
        with pytest.raises(ValueError, match=r"(nf4|float8_e4m3fn) is no type of integers: .* no integer grid"):
            bj.from_qwix(rounded_by_qwix(qtype, "absmax"))
    with pytest.raises(ValueError, match=r"axis 0 of a QArray of shape \(2, 16, 6\) is not one of its last two"):
        bj.from_qwix(rounded_by_qwix(jnp.int8, "absmax", shape=(2, K, N)), axis=0)
    wide = bj.quantize(floats, 8, axis=0, calibration="absmax")
    with pytest.raises(ValueError, match="values -255 to 255, which are no int8"):
        bj.to_qwix(wide)
    with pytest.raises(ValueError, match="groups of 5 do not divide 16"):
        bj.to_qwix(bj.quantize(floats, 8, axis=0, group_size=5))
    minmax = bj.quantize(floats, 8, axis=0, calibration="minmax")
    with pytest.raises(ValueError, match="bfloat16 does not hold the scales of"):
        bj.to_qwix(minmax, jnp.bfloat16)
    with pytest.raises(ValueError, match=r"row and group \(0, 0\) is no odd multiple .* 6 of 6"):
        bj.to_qwix(bj.from_codes(minmax.codes().T, 8, 0, minmax.scale, 1.1 * minmax.offset))
    with pytest.raises(ValueError, match="cannot be traced"):
        jax.jit(lambda array: bj.to_qwix(array).scale)(minmax)
