"""Compiles for the H200 on any machine: XLA and ptxas need the chip's numbers, not the chip.

Needs the wheels jax-cuda13-plugin and jax-cuda13-pjrt and a ptxas of CUDA 13 (on the PATH, in
/usr/local/cuda, or of the wheel nvidia-cuda-nvcc). A test that uses it asks `missing()` for
the reason to skip.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import os
import re
import sys
import tempfile

# Read by the CUDA plugin when JAX's first backend starts: it is used without a GPU and without cuDNN.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax
from jax.experimental import topologies

from tests.support.optimizations import optimizations

_PLUGIN = "jax_plugins.xla_cuda13"

# What XLA reads from the device, for an NVIDIA H200.
_H200 = """
gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
 shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
 memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 150754820096
 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 minor: 0 }
 registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H200"
"""


@dataclasses.dataclass(frozen=True)
class PtxasReport:
    """What ptxas says about the Mosaic kernels of one compilation.

    Attributes:
      text: its whole output, and the PTX's when `compile_for_h200` was asked for that.
      registers: registers a thread, one number for each kernel.
      spill_bytes: bytes of spill stores and loads, all kernels together.
      stack_bytes: bytes of stack frames, likewise.
      serialized_wgmma: whether any wgmma was serialized (warning C7510 and its like).
    """

    text: str

    @property
    def registers(self) -> tuple[int, ...]:
        return tuple(int(n) for n in re.findall(r"Used (\d+) registers", self.text))

    @property
    def spill_bytes(self) -> int:
        return sum(int(n) for n in re.findall(r"(\d+) bytes spill", self.text))

    @property
    def stack_bytes(self) -> int:
        return sum(int(n) for n in re.findall(r"(\d+) bytes stack frame", self.text))

    @property
    def serialized_wgmma(self) -> bool:
        return re.search(r"C75\d\d|wgmma.*serializ", self.text, re.IGNORECASE) is not None


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    with contextlib.suppress(ModuleNotFoundError):
        if importlib.util.find_spec(_PLUGIN) is not None:
            return None
    return "compiling for sm_90a needs the wheels jax-cuda13-plugin and jax-cuda13-pjrt"


def compile_for_h200(fn, *avals, ptx: bool = False):
    """Compiles fn for one H200, optimized whatever is the case around it.

    Args:
      fn: a function of arrays, jitted here.
      *avals: pytrees of jax.ShapeDtypeStruct.
      ptx: also put the kernels' PTX in the report's text.

    Returns:
      The compiled function, which cannot be called here, and a `PtxasReport`.

    Raises:
      Whatever the lowering or the compiler raises.
    """
    replicated = jax.sharding.NamedSharding(
        topologies.make_mesh(_topology(), (1,), ("device",)), jax.sharding.PartitionSpec()
    )
    avals = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated), avals)
    # A new function each time: a cached compilation says nothing.
    jitted = jax.jit(lambda *args: fn(*args))
    with tempfile.TemporaryFile() as output, _dump_to(output, ptx), optimizations(True):
        compiled = jitted.lower(*avals).compile()
        output.seek(0)
        text = output.read().decode(errors="replace")
    return compiled, PtxasReport(text)


@functools.cache
def _topology():
    def describe():
        return topologies.get_topology_desc(platform="cuda", target_config=_H200, topology="1x1x1")

    try:
        return describe()
    except NotImplementedError:
        # A backend started before this module was imported, and its search for plugins gave CUDA up.
        importlib.import_module(_PLUGIN).initialize()
        return describe()


@contextlib.contextmanager
def _dump_to(output, ptx: bool):
    """Has Mosaic GPU, which reads these variables at every compilation, print what ptxas says; and catches it.

    The compiler is C++ and prints to the process's standard output.
    """
    names = ["MOSAIC_GPU_DUMP_PTXAS"] + ["MOSAIC_GPU_DUMP_PTX"] * ptx
    before = {name: os.environ.get(name) for name in names}
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(output.fileno(), 1)
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
