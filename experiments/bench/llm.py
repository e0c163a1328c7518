"""Times prefill and decoding of language models at many precisions against the same model in bf16.

    python -m experiments.bench.llm --config=configs/bench/llm.py --workdir=DIR \\
        --config.model=llama-2-7b --config.precisions=W1A1,W2A8,W4A8g128 --config.workloads=1x512+128,8x512+128

Weights are random with the model's shapes; a precision applies to the decoder's linear layers. --config.model may also
be a GGUF file or a quantized Hugging Face directory, whose integers are timed as they are; --config.precisions=A8,A16
are then the activations. The baseline is the
same `Transformer` with `nnx.Linear` in bf16, jitted and timed in the same run: on GPUs once with XLA's defaults and
once with cuBLAS only; speed-ups are over the faster. With --config.mesh.model=2 packed models are cut over two devices,
baselines stay on one. All times are wall time; decode steps are timed as a loop on the device, divided by its steps.
Writes result.json and speedup.png to --workdir. A stopped run resumes and retries failed workloads; concurrent runs
with different precisions may share a workdir (see `device_lock`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import bipolar_jax as bj
from bipolar_jax.format import as_format
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.inference.prepare import prepare_for_inference
from bipolar_jax.models.inference.xla_flags import enable_command_buffers
from bipolar_jax.models.kv_cache.quantized_heads import check_cache_bits
from bipolar_jax.models.presets import preset
from bipolar_jax.models.random_weights import random_float, random_packed
from bipolar_jax.models.sharding.load import random_sharded
from bipolar_jax.models.sharding.sharded_transformer import ShardedTransformer
from bipolar_jax.models.transformer import Transformer
from bipolar_jax.nn.compressible import Rotation
from bipolar_jax.ops.dispatch import check_implementation
from experiments.bench.language_models.peers import PEERS, measure_peers
from experiments.bench.language_models.report import add_speedups, line, plot_speedup, print_tables
from experiments.bench.language_models.workload import CompiledWorkload, Workload, parse_workloads, peak_bytes
from experiments.distributed.mesh import cuts_of, mesh_of
from experiments.support import app
from experiments.support.device_lock import device_alone, device_lock, phase
from experiments.support.kernel_times import profile_kernels
from experiments.support.progress import console
from experiments.support.sources import load_model_source
from experiments.support.timing import one_line
from experiments.support.workdir import environment, kernels_fingerprint, read_result, save_result

# Settings that the figures depend on; all results in a workdir share them.
_SETTINGS = (
    "model",
    "implementation",
    "calibration",
    "cache_bits",
    "embed_bits",
    "embed_group_size",
    "layout",
    "rotated",
    "rotation_block",
    "fused_sequences",
    "mesh",
    "iterations",
    "seed",
)

# XLA compiler options of the bf16 baselines. By default XLA uses Triton for products with few rows and merges the q and
# k products; both copy the weights out of the scanned layer stack first. cuBLAS reads them in place, but is slower on
# some shapes.
BASELINES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "bf16 cuBLAS": {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0},
}


def main(config: ConfigDict, workdir: Path) -> None:
    """Runs the experiment; see the module docstring."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(device_lock(shared=True))
        _measure(config, workdir)


def make_model(
    config: ConfigDict, shape: TransformerConfig, precision: bj.Precision | int | None
) -> Transformer | ShardedTransformer:
    """A model to time.

    Args:
      config: of the program.
      shape: of the model.
      precision: of random packed weights; or the activations of the file that config.model names; None makes random
        weights in bf16.
    """
    key = jax.random.key(config.seed)
    if precision is None:
        return random_float(shape, jnp.bfloat16, key)
    prepared = {"layout": config.layout or None, "fused_sequences": config.fused_sequences}
    if isinstance(precision, int):
        model = _loaded(config.model, precision)
        _loaded.cache_clear()
        return prepare_for_inference(model, **prepared)
    if config.rotated:
        ffn = bj.ops.hadamard(shape.ffn_size, block=config.rotation_block or None)
        shape = dataclasses.replace(shape, rotation=Rotation(ffn=ffn, keys=bj.ops.hadamard(shape.head_dim)))
    options = {"embed_bits": config.embed_bits or None, "embed_group_size": config.embed_group_size or None}
    options |= {"key": key, "implementation": config.implementation}
    if (mesh := mesh_of(config)) is not None:
        return random_sharded(shape, precision, mesh, layout=config.layout or None, **cuts_of(config), **options)
    return prepare_for_inference(random_packed(shape, precision, **options), **prepared)


def _is_file(name: str) -> bool:
    return "/" in name or name.endswith(".gguf")


@functools.lru_cache(maxsize=1)
def _loaded(path: str, activations: int) -> Transformer:
    """A file's model, kept from the moment when its shape is asked for until it is timed."""
    return load_model_source(path, activations=activations).model


def num_devices(config: ConfigDict) -> int:
    """Devices that packed models are cut over; the baselines run on one."""
    return config.mesh.data * config.mesh.model


def _measure(config: ConfigDict, workdir: Path) -> None:
    check_implementation(config.implementation)
    mesh_of(config)  # rejects impossible ones
    if _is_file(config.model):
        precisions = _parse_activations(config)
        model_config = _loaded(config.model, next(iter(precisions.values()), 16)).config
    else:
        precisions, model_config = _parse_precisions(config), preset(config.model)
    workloads = parse_workloads(config.workloads, model_config.context_length)
    check_cache_bits(config.cache_bits or None, model_config.head_dim)
    models = precisions | dict.fromkeys(_parse_baselines(config.baselines))
    profiled = app.parse_names("profile", config.profile, models)
    peers = app.parse_names("peers", config.peers, PEERS)
    bandwidth = float(config.ceilings.bandwidth)
    settings = {name: config[name] for name in _SETTINGS} | {"mesh": config.mesh.to_dict()}
    if _is_file(config.model):
        settings["calibration"] = "of the file"
    settings |= {"bandwidth": bandwidth, "device": jax.devices()[0].device_kind}
    settings["sources_sha256"] = kernels_fingerprint("models", "nn", "ops")
    result = read_result(workdir, settings, {"models": (), "peers": (), "profiles": ()}) or {
        "settings": settings,
        "models": {},
        "peers": {},
        "profiles": {},
    }
    result["environment"] = environment() | {"xla_flags": os.environ.get("XLA_FLAGS", "")}

    def save() -> None:
        own = {"models": models, "peers": peers, "profiles": profiled}
        with device_alone():  # processes merge their results
            save_result(workdir, result, lambda merged: add_speedups(merged, list(BASELINES)), **own)

    for name, precision in models.items():
        _adopt_concurrent_rows(name, result, read_result(workdir, settings))
        rows = result["models"].setdefault(name, {"workloads": {}})["workloads"]
        todo = [workload for workload in workloads if "decode" not in rows.get(workload.name, {})]
        needs_profile = name in profiled and name not in result["profiles"]
        if not todo and not needs_profile:
            continue
        try:
            making: dict[str, float] = {}
            with phase(making, "make"):
                model = jax.block_until_ready(make_model(config, model_config, precision))
            result["models"][name]["make_seconds"] = round(making["make"], 2)
            console.print(f"{name}: made in {making['make']:.1f} s")
        except Exception as error:
            rows |= {workload.name: {"error": one_line(error)} for workload in todo}
            console.print(f"{name}: {one_line(error)}")
            save()
            continue
        for workload in workloads:
            with_profile = needs_profile and workload is workloads[0]
            if workload in todo or with_profile:
                _measure_workload(model, name, workload, with_profile, result, bandwidth, config, save)
        del model  # frees its memory before the next is made
    with device_alone():
        measure_peers(peers, model_config, workloads, result["peers"], config.iterations)
        save()
    plot_speedup(result, workdir / "speedup.png")
    print_tables(result)
    console.print(f"results and plot: {workdir}")


def _adopt_concurrent_rows(name: str, result: dict[str, Any], stored: dict[str, Any] | None) -> None:
    """Takes a model's figures that a concurrent run has stored since this run started, if this run has none of it."""
    if stored is not None and name in stored["models"] and name not in result["models"]:
        result["models"][name] = stored["models"][name]


def _parse_baselines(text: str) -> list[str]:
    """Reads "bf16,bf16 cuBLAS"; drops those with GPU options if there is no GPU."""
    names = app.parse_names("baselines", text, BASELINES)
    return [name for name in names if not BASELINES[name] or jax.devices()[0].platform == "gpu"]


def _parse_precisions(config: ConfigDict) -> dict[str, bj.Precision]:
    """Reads "W1A1,W2A8", all with config.calibration, or with their defaults if that is "".

    Sorted by weight bits, so that the process's peak memory is that of the latest model.
    """
    precisions = {bj.Precision.parse(name, config.calibration or None) for name in app.split_names(config.precisions)}
    ordered = sorted(precisions, key=lambda p: (as_format(p.w_bits).bits, p.a_bits or 16, str(p)))
    return {str(precision): precision for precision in ordered}


def _parse_activations(config: ConfigDict) -> dict[str, int]:
    """Reads "A8,A16", at which a file is loaded. Raises ValueError for others, and for settings of random weights."""
    names = app.split_names(config.precisions)
    if wrong := [name for name in names if not re.fullmatch(r"A([1-8]|16)", name)]:
        raise ValueError(
            f"config.precisions names {', '.join(wrong)}: the weights of {config.model} are the file's, give its "
            "activations, such as A8,A16"
        )
    defaults = {"embed_bits": 0, "embed_group_size": 0, "rotated": False, "rotation_block": 0, "implementation": "auto"}
    if given := [name for name, default in defaults.items() if config[name] != default]:
        raise ValueError(f"config.{given[0]} is of random weights: leave it out for the file {config.model}")
    if num_devices(config) > 1:
        raise ValueError(f"{config.model} is timed on one device: leave out config.mesh, or name a preset")
    return {name: int(name[1:]) for name in names}


def _measure_workload(
    model: Transformer,
    name: str,
    workload: Workload,
    with_profile: bool,
    result: dict[str, Any],
    bandwidth: float,
    config: ConfigDict,
    save: Callable[[], None],
) -> None:
    """Sets result["models"][name]["workloads"][workload.name], and result["profiles"][name] if `with_profile`; saves.

    Compiles beside other processes. The check already has the device alone, and so it warms up for the times: kernels
    whose blocks wait for one another bound these waits, which other processes would lengthen.
    """
    cache_bits, options = config.cache_bits or None, BASELINES.get(name, {})
    is_float, seconds = name in BASELINES, {}
    with contextlib.ExitStack() as locked:
        try:
            with phase(seconds, "compile"):
                compiled = CompiledWorkload(
                    model, workload, cache_bits=cache_bits, options=options, alone=is_float, seed=config.seed
                )
            with phase(seconds, "check"):
                locked.enter_context(device_alone())
                check_error = compiled.check()
            with phase(seconds, "time"):
                measured = _figures(compiled, bandwidth * (1 if is_float else num_devices(config)), config.iterations)
            rounded = {phase_name: round(value, 2) for phase_name, value in seconds.items()}
            measured |= {"check_error": float(f"{check_error:.3g}"), "seconds": rounded}
        except Exception as error:
            measured = {"error": one_line(error)}
        result["models"][name]["workloads"][workload.name] = measured
        save()  # before the profile: a run that is killed keeps its times
        spent = ", ".join(f"{phase_name} {value:.1f}" for phase_name, value in seconds.items())
        console.print(f"{name} {workload.name}: {line(measured)}; seconds: {spent}")
        if with_profile and "error" not in measured:
            _profile(compiled, name, result, config.profile_most)
            save()


def _profile(compiled: CompiledWorkload, name: str, result: dict[str, Any], most: int) -> None:
    """Sets result["profiles"][name]."""
    workload = compiled.workload
    try:
        profiles = {
            phase: profile_kernels(run, steps, most) for phase, (run, steps) in compiled.profiled_calls().items()
        }
        result["profiles"][name] = {"workload": workload.name} | profiles
    except Exception as error:
        console.print(f"{name} {workload.name}: no profile, {one_line(error)}")


def _figures(compiled: CompiledWorkload, bandwidth: float, iterations: int) -> dict[str, Any]:
    """The figures of one model and workload in result.json, without the check and the speed-ups."""
    workload, memory = compiled.workload, compiled.memory()
    prefill, decode = compiled.time_prefill(iterations), compiled.time_decode(iterations)
    prompt_tokens = workload.batch * workload.prompt
    share = 1e6 * (memory["read_bytes"] + memory["cache_bytes"]) / decode.median / bandwidth
    exchanged = {"collectives": compiled.collectives()} if isinstance(compiled.model, ShardedTransformer) else {}
    return exchanged | {
        "prefill": prefill.to_json() | {"tokens_per_second": round(1e6 * prompt_tokens / prefill.median, 1)},
        "decode": decode.to_json()
        | {
            "tokens_per_second": round(1e6 * workload.batch / decode.median, 1),
            "bandwidth_share": float(f"{share:.3g}"),
        },
        "memory": memory | {"peak_bytes": peak_bytes()},
    }


if __name__ == "__main__":
    enable_command_buffers()
    app.run(main)
