"""Times whole language models at many precisions, prefill and decoding, against the same model in bf16.

    python -m experiments.bench.llm --config=configs/bench/llm.py --workdir=DIR \\
        --config.model=llama-2-7b --config.precisions=W1A1,W2A8 --config.workloads=1x512+128,8x512+128

Weights are random, of the model's shapes; precisions are those of the decoder's linear layers. bf16 is the same
`Transformer` with `nnx.Linear`, jitted alike and timed in the same run; on GPUs once as XLA compiles it by itself, once
through cuBLAS alone, and speed-ups are over the faster. A decode step is a loop of steps on the device, on the wall,
divided by their number. Under --workdir come result.json and speedup.png. A run that was stopped goes on where it was,
and tries again what failed; several runs at once may share a workdir, each with precisions of its own (see `turns`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import bipolar_jax as bj
from bipolar_jax.format import as_format
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.inference.join import join_projections
from bipolar_jax.models.kv_cache.quantized_heads import check_cache_bits
from bipolar_jax.models.transformer import Transformer
from bipolar_jax.ops.dispatch import check_implementation
from experiments.bench.language_models.command_buffers import launch_graphs
from experiments.bench.language_models.peers import PEERS, measure_peers
from experiments.bench.language_models.report import add_speedups, line, plot_speedup, print_tables
from experiments.bench.language_models.runs import Runs, Workload, parse_workloads, peak_bytes
from experiments.bench.products.peers import parse_peers
from experiments.support import app
from experiments.support.kernel_times import profile_kernels
from experiments.support.progress import console
from experiments.support.timing import one_line
from experiments.support.turns import device_turn
from experiments.support.workdir import environment, kernels_fingerprint, read_result, save_result

# What a figure depends on; a workdir holds results of one choice of these.
_SETTINGS = ("model", "implementation", "cache_bits", "embed_bits", "iterations", "seed")

# Models in bf16, with the flags that they are compiled with. XLA's own choice for products with few rows, Triton, takes
# weights of a scanned layer only from a copy, and so does the product of q and k made one; cuBLAS reads them where they
# are, but multiplies some shapes more slowly.
BASELINES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "bf16 cuBLAS": {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0},
}


def main(config: ConfigDict, workdir: Path) -> None:
    """Runs the whole experiment; see the module's docstring."""
    with device_turn():
        _measure(config, workdir)


def make_config(name: str) -> TransformerConfig:
    """The published model's shapes. Raises ValueError for a name that is none."""
    from bipolar_jax.models.presets import preset

    return preset(name)


def make_model(config: ConfigDict, name: str, precision: bj.Precision | None) -> Transformer:
    """A model with random weights: packed, or in bf16 where `precision` is None."""
    from bipolar_jax.models.random_weights import random_float, random_packed

    key = jax.random.key(config.seed)
    if precision is None:
        return random_float(make_config(name), jnp.bfloat16, key)
    return join_projections(
        random_packed(
            make_config(name),
            precision,
            key=key,
            embed_bits=config.embed_bits or None,
            implementation=config.implementation,
        )
    )


def _measure(config: ConfigDict, workdir: Path) -> None:
    check_implementation(config.implementation)
    model_config = make_config(config.model)
    workloads = parse_workloads(config.workloads, model_config.context_length)
    check_cache_bits(config.cache_bits or None, model_config.head_dim)
    precisions = _parse_precisions(config.precisions)
    models = {str(precision): precision for precision in precisions}
    models |= dict.fromkeys(_parse_baselines(config.baselines))
    profiled = _names(config.profile)
    unknown = [name for name in profiled if name not in models]
    if unknown:
        raise ValueError(f"profile names {', '.join(unknown)}, which is not measured: {', '.join(models)} are")
    peers = parse_peers(config.peers, PEERS)
    bandwidth = float(config.ceilings.bandwidth)
    settings = {name: config[name] for name in _SETTINGS}
    settings |= {"bandwidth": bandwidth, "device": jax.devices()[0].device_kind}
    settings["sources_sha256"] = kernels_fingerprint("models", "nn", "ops")
    result = read_result(workdir, settings) or {"settings": settings, "models": {}, "peers": {}, "profiles": {}}
    result["environment"] = environment() | {"xla_flags": os.environ.get("XLA_FLAGS", "")}

    def save() -> None:
        own = {"models": models, "peers": peers, "profiles": profiled}
        save_result(workdir, result, lambda whole: add_speedups(whole, list(BASELINES)), **own)

    for name, precision in models.items():
        _take_over(name, result, read_result(workdir, settings))
        rows = result["models"].setdefault(name, {"workloads": {}})["workloads"]
        todo = [workload for workload in workloads if "decode" not in rows.get(workload.name, {})]
        profile_too = name in profiled and name not in result["profiles"]
        if not todo and not profile_too:
            continue
        try:
            model = make_model(config, config.model, precision)
        except Exception as error:
            rows |= {workload.name: {"error": one_line(error)} for workload in todo}
            console.print(f"{name}: {one_line(error)}")
            save()
            continue
        for workload in workloads:
            with_profile = profile_too and workload is workloads[0]
            if workload in todo or with_profile:
                _measure_workload(model, name, workload, with_profile, result, bandwidth, config)
                save()
        del model  # before the next is made
    measure_peers(peers, model_config, workloads, result["peers"], config.iterations)
    save()
    plot_speedup(result, workdir / "speedup.png")
    print_tables(result)
    console.print(f"results and plot: {workdir}")


def _take_over(name: str, result: dict[str, Any], there: dict[str, Any] | None) -> None:
    """Puts what a run beside this one measured of a model since into the result, unless this one has begun with it."""
    if there is not None and name in there["models"] and name not in result["models"]:
        result["models"][name] = there["models"][name]


def _names(text: str) -> list[str]:
    """What stands between commas, if anything does."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _parse_baselines(text: str) -> list[str]:
    """Reads "bf16,bf16 cuBLAS"; what needs a GPU is left out where there is none."""
    names = _names(text)
    if unknown := [name for name in names if name not in BASELINES]:
        raise ValueError(f"baselines name {', '.join(unknown)}: there are {', '.join(BASELINES)}")
    return [name for name in names if not BASELINES[name] or jax.devices()[0].platform == "gpu"]


def _parse_precisions(text: str) -> list[bj.Precision]:
    """Reads "W1A1,W2A8", fewest weight bits first: what a process ever held at most is then of the last model."""
    precisions = {bj.Precision.parse(name) for name in _names(text)}
    return sorted(precisions, key=lambda p: (as_format(p.w_bits).bits, p.a_bits or 16, str(p)))


def _measure_workload(
    model: Transformer,
    name: str,
    workload: Workload,
    with_profile: bool,
    result: dict[str, Any],
    bandwidth: float,
    config: ConfigDict,
) -> None:
    """Adds result["models"][name]["workloads"][...], and result["profiles"][name] where that is asked for."""
    cache_bits, options = config.cache_bits or None, BASELINES.get(name, {})
    try:
        runs = Runs(model, workload, cache_bits=cache_bits, options=options, seed=config.seed)
        measured = _figures(runs, bandwidth, config.iterations)
    except Exception as error:
        measured = {"error": one_line(error)}
    result["models"][name]["workloads"][workload.name] = measured
    console.print(f"{name} {workload.name}: {line(measured)}")
    if not with_profile or "error" in measured:
        return
    try:
        parts = {part: profile_kernels(run, steps, config.profile_most) for part, (run, steps) in runs.once().items()}
        result["profiles"][name] = {"workload": workload.name} | parts
    except Exception as error:
        console.print(f"{name} {workload.name}: no profile, {one_line(error)}")


def _figures(runs: Runs, bandwidth: float, iterations: int) -> dict[str, Any]:
    """What result files hold of one model and workload; speed-ups are added to it later."""
    workload, memory = runs.workload, runs.memory()
    error = runs.check()
    prefill, decode = runs.time_prefill(iterations), runs.time_decode(iterations)
    prompts = 1e6 * workload.batch * workload.prompt
    share = 1e6 * (memory["read_bytes"] + memory["cache_bytes"]) / decode.median / bandwidth
    return {
        "check_error": float(f"{error:.3g}"),
        "prefill": prefill.to_json() | {"tokens_per_second": round(prompts / prefill.median, 1)},
        "decode": decode.to_json()
        | {
            "tokens_per_second": round(1e6 * workload.batch / decode.median, 1),
            "bandwidth_share": float(f"{share:.3g}"),
        },
        "memory": memory | {"peak_bytes": peak_bytes()},
    }


if __name__ == "__main__":
    launch_graphs()
    app.run(main)
