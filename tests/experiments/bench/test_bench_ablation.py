"""experiments/bench/ablation.py on a tiny shape and the interpreted Hopper kernels; what it and the tuner reject."""

from __future__ import annotations

import math

import numpy as np
import pytest
from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams

from bipolar_jax import BipolarFormat
from bipolar_jax.kernels.sm90.core.execution import interpreted
from configs.bench import ablation as ablation_config
from configs.bench import tune as tune_config
from experiments.bench import ablation, tune
from experiments.bench.products import ablation_variants
from experiments.support.workdir import RESULT_NAME
from tests.support.tiny_benchmarks import PNG_SIGNATURE, result_of, tiny


@pytest.mark.covered("the products and their checks, by test_bench_matmul.py")
def test_every_variant_is_checked_and_timed(tmp_path):
    config = tiny(ablation_config.get_config(), shapes="65x40x96", precisions="W1A2", iterations=1)
    with interpreted(InterpretGPUParams()):
        ablation.main(config, tmp_path)
    (row,) = result_of(tmp_path)["products"].values()
    assert list(row["variants"]) == [
        "full system",
        "signed planes",
        "packed in the call",
        "recovered in memory",
        "fixed tiling",
        "XLA bf16",
    ]
    assert row["variants"]["full system"]["slowdown"] == 1
    assert all(math.isfinite(figures["slowdown"]) for figures in row["variants"].values())
    assert (tmp_path / "ablation.png").read_bytes().startswith(PNG_SIGNATURE)


@pytest.mark.parametrize("precision", ["W8A8", "W1.58A2"])
def test_precisions_without_signed_planes_are_rejected(tmp_path, precision):
    config = tiny(ablation_config.get_config(), shapes="65x40x96", precisions=precision)
    with pytest.raises(ValueError, match=f"{precision} has no variant with two's complement planes"):
        ablation.main(config, tmp_path)


@pytest.mark.parametrize(
    ("program", "config", "precision", "message"),
    [
        (ablation, ablation_config, "W1A1", "runs the few-token kernel"),
        (tune, tune_config, "W1A8", "splits its tokens into 2 launches"),
    ],
)
def test_products_of_few_tokens_are_rejected(tmp_path, program, config, precision, message):
    with interpreted(InterpretGPUParams()), pytest.raises(ValueError, match=message):
        program.main(tiny(config.get_config(), shapes="64x40x96", precisions=precision), tmp_path)


@pytest.mark.parametrize(("program", "config"), [(ablation, ablation_config), (tune, tune_config)])
def test_hopper_kernels_are_rejected_on_other_devices(tmp_path, program, config):
    with pytest.raises(ValueError, match="nothing to measure: its kernels need an NVIDIA GPU"):
        program.main(tiny(config.get_config(), shapes="65x40x96", precisions="W1A1"), tmp_path)
    assert not (tmp_path / RESULT_NAME).exists()


@pytest.mark.parametrize("a_bits", [1, 2, 3])
@pytest.mark.parametrize("w_bits", [1, 2, 3])
def test_signed_groups_add_up_to_twos_complement(a_bits, w_bits):
    """Horner's rule over the groups, on integers in place of accumulators."""
    formats = BipolarFormat(a_bits), BipolarFormat(w_bits)
    recovery = ablation_variants._SignedRecovery("planes", *formats, 8, with_zero=True)
    rng = np.random.default_rng(0)
    x, w = (rng.integers(0, 2, (fmt.bits, 1, 8)) for fmt in formats)
    total = np.zeros((), np.int64)
    for factor, pairs in recovery.pair_groups():
        total = total * factor + sum(int(x[i, 0] @ w[j, 0]) for i, j in pairs)
    values = [
        np.tensordot(ablation_variants._signed_weights(fmt), planes, axes=1)[0]
        for fmt, planes in zip(formats, (x, w), strict=True)
    ]
    assert total * recovery.product_weight == values[0] @ values[1]
    assert recovery.num_pairs == a_bits * w_bits
