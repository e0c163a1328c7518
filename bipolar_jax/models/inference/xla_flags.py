"""Flags of XLA that suit models on GPUs. XLA reads them once, when the first backend starts."""

from __future__ import annotations

import os
import pkgutil

_COMMAND_BUFFERS = "xla_gpu_enable_command_buffer"
# XLA's defaults plus DYNAMIC_SLICE_FUSION and WHILE: without slices of the stacked weights in graphs, most kernels of a
# layer are launched one by one. A layer is one graph; `kernels/sm90/backend/README.md` says when loops are.
_COMMANDS = "+FUSION,+CUSTOM_CALL,+CUBLAS,+CUBLASLT,+DYNAMIC_SLICE_FUSION,+WHILE"
# XLA compiles each of its fusions an extra time, one after the other, to let Triton's code compete with its own: for a
# first text of SmolLM2 39 of 83 compilations.
_FUSION_AUTOTUNER = "xla_gpu_experimental_enable_fusion_autotuner"
_GENERATION = {_COMMAND_BUFFERS: _COMMANDS, _FUSION_AUTOTUNER: "false"}
# Without Triton's products there is nothing worth timing: cuBLAS chooses by the shape.
PINNED = {"xla_gpu_enable_triton_gemm": "false", "xla_gpu_autotune_level": "0"}


def enable_command_buffers() -> bool:
    """Makes XLA launch the kernels of a decode step as CUDA graphs and compile fusions once, by flags in XLA_FLAGS.

    Products and attention are autotuned as before; fusions take XLA's own code, not Triton's where that was faster when
    XLA compiled. A flag that is set stays; nothing changes where no CUDA plugin is installed. Call it before JAX runs
    anything. Programs of this project that write text call it themselves.

    Returns:
      Whether both flags are in XLA_FLAGS now.
    """
    return _add(_GENERATION)


def pin_float_products() -> bool:
    """Makes XLA leave float products to cuBLAS without timing any, by two flags in XLA_FLAGS.

    Every process then runs the same kernels, as a calibration needs that is stopped and is to resume with the same
    bytes, and programs compile in half of the time. A flag that is set stays; nothing changes where no CUDA plugin is
    installed. Call it before JAX runs anything. Programs of this project that calibrate, distil, train and score call
    it themselves.

    Returns:
      Whether both flags are in XLA_FLAGS now.
    """
    return _add(PINNED)


def _add(flags: dict[str, str]) -> bool:
    """Adds flags that XLA_FLAGS lacks, if a CUDA plugin is installed; returns whether it has all of them."""
    text = os.environ.get("XLA_FLAGS", "")
    missing = {name: value for name, value in flags.items() if name not in text}
    if not missing:
        return True
    if not _has_cuda_plugin():
        return False
    os.environ["XLA_FLAGS"] = " ".join([text, *(f"--{name}={value}" for name, value in missing.items())]).strip()
    return True


def _has_cuda_plugin() -> bool:
    try:
        import jax_plugins
    except ModuleNotFoundError:
        return False
    return any(module.name.startswith("xla_cuda") for module in pkgutil.iter_modules(jax_plugins.__path__))
