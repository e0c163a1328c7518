"""Has XLA launch the kernels of a decode step as CUDA graphs; must be called before JAX starts its GPU backend."""

from __future__ import annotations

import os
import pkgutil

_FLAG = "xla_gpu_enable_command_buffer"
# Beside XLA's own choice, slices of stacked layers' weights and the loop over layers, without which each layer's
# kernels are launched one by one: DESIGN.md, section 3, has 15 and 8 microseconds for a link of two kernels.
_COMMANDS = "+FUSION,+CUSTOM_CALL,+CUBLAS,+CUBLASLT,+DYNAMIC_SLICE_FUSION,+WHILE"


def launch_graphs() -> None:
    """Adds the flag to XLA_FLAGS where a plugin for NVIDIA GPUs is installed and the flag is not set already."""
    flags = os.environ.get("XLA_FLAGS", "")
    if _FLAG not in flags and _has_cuda_plugin():
        os.environ["XLA_FLAGS"] = f"{flags} --{_FLAG}={_COMMANDS}".strip()


def _has_cuda_plugin() -> bool:
    try:
        import jax_plugins
    except ModuleNotFoundError:
        return False
    return any(module.name.startswith("xla_cuda") for module in pkgutil.iter_modules(jax_plugins.__path__))
