"""Makes XLA launch the kernels of a decode step as CUDA graphs."""

from __future__ import annotations

import os
import pkgutil

_FLAG = "xla_gpu_enable_command_buffer"
# XLA's defaults plus DYNAMIC_SLICE_FUSION and WHILE: without slices of the stacked weights and the loop over layers in
# the graph, the kernels of every layer are launched one by one.
_COMMANDS = "+FUSION,+CUSTOM_CALL,+CUBLAS,+CUBLASLT,+DYNAMIC_SLICE_FUSION,+WHILE"


def enable_command_buffers() -> bool:
    """Adds XLA's flag for them to XLA_FLAGS, unless the flag is set or no CUDA plugin is installed.

    Call it before JAX runs anything: XLA reads its flags once, when the first backend starts. Programs of this project
    call it themselves.

    Returns:
      Whether the flag is in XLA_FLAGS now.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _FLAG not in flags and _has_cuda_plugin():
        flags = os.environ["XLA_FLAGS"] = f"{flags} --{_FLAG}={_COMMANDS}".strip()
    return _FLAG in flags


def _has_cuda_plugin() -> bool:
    try:
        import jax_plugins
    except ModuleNotFoundError:
        return False
    return any(module.name.startswith("xla_cuda") for module in pkgutil.iter_modules(jax_plugins.__path__))
