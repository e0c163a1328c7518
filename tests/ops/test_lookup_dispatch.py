"""ops.lookup decodes rows; ops.dispatch chooses a backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bipolar_jax import BipolarArray, explain, lookup, matmul, quantize
from bipolar_jax.kernels.unsupported import Unsupported
from bipolar_jax.ops import dispatch


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module", params=["absmax", "minmax"])
def table(request) -> BipolarArray:
    return quantize(normal(300, 40), 4, -1, 16, request.param, scales="float")


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 1, 3)])
def test_rows_are_those_of_the_dequantized_table(table, shape):
    ids = np.random.default_rng(1).integers(0, 300, shape)
    rows = lookup(table, jnp.asarray(ids))
    assert rows.shape == (*shape, 40)
    np.testing.assert_array_equal(rows, np.asarray(table.dequantize())[ids])


def test_no_ids_give_no_rows(table):
    assert lookup(table, jnp.zeros((2, 0), jnp.int32)).shape == (2, 0, 40)


def test_ids_out_of_range_give_rows_of_nan_and_spoil_no_others(table):
    ids = jnp.array([-1, 0, 299, 300, 2**31 - 1, -(2**31)])
    rows = np.asarray(jax.jit(lookup)(table, ids))
    np.testing.assert_array_equal(np.isnan(rows).all(-1), [True, False, False, True, True, True])
    np.testing.assert_allclose(rows[1:3], np.asarray(table.dequantize())[[0, 299]], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int16, jnp.uint32])
def test_ids_of_any_integer_dtype(table, dtype):
    np.testing.assert_array_equal(lookup(table, jnp.array([100, 7], dtype)), table.dequantize()[jnp.array([100, 7])])


def test_wide_ids_do_not_wrap_around(table):
    with jax.enable_x64(True):
        assert np.isnan(lookup(table, jnp.array([2**32 + 1]))).all()


def test_negative_narrow_ids_are_out_of_range(table):
    assert np.isnan(lookup(table, jnp.array([-1], jnp.int8))).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_rows_come_in_the_dtype_asked_for(table, dtype):
    rows = lookup(table, jnp.arange(3), dtype)
    assert rows.dtype == dtype
    np.testing.assert_array_equal(rows, table.dequantize()[:3].astype(dtype))


def test_lookup_errors(table):
    with pytest.raises(ValueError, match="ids must be integers, got float32"):
        lookup(table, jnp.ones(3))
    with pytest.raises(ValueError, match=r"shape \(40, 300\) packed along axis -2.*axis=-1"):
        lookup(table.T, jnp.arange(3))
    with pytest.raises(ValueError, match="the table must be a BipolarArray, got ndarray"):
        lookup(normal(4, 40), [1])
    with pytest.raises(ValueError, match="rows are float numbers, got dtype int8"):
        lookup(table, [1], jnp.int8)
    with pytest.raises(ValueError, match=r"shape \(2, 3, 40\).*two axes"):
        lookup(quantize(normal(2, 3, 40), 4, -1), jnp.arange(2))


def unable(reason):
    def refuse(*_):
        raise Unsupported(reason)

    return type("stub", (), {"quantized_matmul": staticmethod(refuse), "weight_only_matmul": staticmethod(refuse)})


@pytest.fixture
def stubbed(monkeypatch):
    """Two backends that can do nothing are tried before xla."""
    stubs = {"tiny": unable("K is too large"), "odd": unable("no even n")}
    monkeypatch.setattr(dispatch, "BACKENDS", {**stubs, **dispatch.BACKENDS})
    monkeypatch.setattr(dispatch, "AUTO_ORDER", ("tiny", "odd", "xla"))


@pytest.mark.usefixtures("stubbed")
def test_auto_passes_on_what_a_backend_cannot_serve():
    x, w = normal(3, 40), quantize(normal(40, 6), 4, 0)
    np.testing.assert_array_equal(matmul(x, w, 8), matmul(x, w, 8, implementation="xla"))


@pytest.mark.usefixtures("stubbed")
def test_the_error_lists_every_reason(monkeypatch):
    monkeypatch.setattr(dispatch, "AUTO_ORDER", ("tiny", "odd"))
    x, w = normal(3, 40), quantize(normal(40, 6), 4, 0)
    with pytest.raises(NotImplementedError, match="tiny: K is too large; odd: no even n"):
        matmul(x, w, 8)


@pytest.mark.usefixtures("stubbed")
def test_a_backend_asked_for_by_name_has_no_stand_in():
    with pytest.raises(NotImplementedError, match="product: odd: no even n") as error:
        matmul(normal(3, 40), quantize(normal(40, 6), 4, 0), 8, implementation="odd")
    assert "tiny" not in str(error.value)


def test_dispatch_calls_the_backend_named():
    for name, backend in dispatch.BACKENDS.items():
        assert dispatch.dispatch(name, lambda chosen: chosen) is backend


def test_auto_is_xla_where_there_is_no_hopper_gpu():
    x, w = normal(3, 40), quantize(normal(40, 6), 4, 0)
    explanation = explain(x, w, 8)
    assert (explanation.implementation, set(explanation.passed_over)) == ("xla", {"sm90"})
    assert "compute capability 9.0, not cpu" in explanation.passed_over["sm90"]
    with pytest.raises(NotImplementedError, match="sm90: its kernels need an NVIDIA GPU"):
        matmul(x, w, 8, implementation="sm90")
    np.testing.assert_array_equal(matmul(x, w, 8), matmul(x, w, 8, implementation="xla"))


def test_explain_checks_as_matmul_does():
    w = quantize(normal(40, 6), 4, 0)
    with pytest.raises(ValueError, match="k=40"):
        explain(normal(3, 41), w, 8)
    with pytest.raises(NotImplementedError, match="sm90: its kernels"):
        explain(normal(3, 40), w, 8, implementation="sm90")
    text = str(explain(jax.ShapeDtypeStruct((3, 40), jnp.bfloat16), w, None))
    assert text.startswith("xla: XLA's float dot")
    assert "not sm90" in text


def test_errors_of_the_caller_are_not_passed_on():
    def wrong(_):
        raise ValueError("the caller's")

    with pytest.raises(ValueError, match="the caller's"):
        dispatch.dispatch("auto", wrong)
