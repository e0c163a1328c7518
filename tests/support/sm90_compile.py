"""Compiles programs for an NVIDIA H200 on any machine: XLA and ptxas need the chip's description, not the chip.

The compiler is JAX's CUDA plugin and the ptxas of CUDA 13, wheels that `make compiler` installs into a folder of their
own. Only this module puts that folder on `sys.path`: JAX would start the plugin in every program, and it fails without
a GPU. A test that compiles asks `missing()` for the reason to skip.

Reports are cached on disk, in pytest's cache, by a hash of the lowered module and the compiler's versions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jaxlib
import pytest
from jax.experimental import topologies

from tests.support.optimizations import optimizations

_ROOT = Path(__file__).resolve().parents[2]
COMPILER_FOLDER = Path(sys.prefix) / "compiler"  # as `make compiler` leaves it in the virtual environment
CACHE_FOLDER = _ROOT / ".pytest_cache" / "h200_programs"
_PLUGIN = "jax_plugins.xla_cuda13"

# What XLA asks a device for; these are the answers of an NVIDIA H200.
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
    """What ptxas reports on the Mosaic kernels of one program.

    Attributes:
      text: the whole output, with the PTX if `compile_for_h200` was asked for it.
      registers: registers per thread, one number for each kernel.
      spill_bytes: bytes of spill stores and loads, over all kernels.
      stack_bytes: bytes of stack frames, over all kernels.
      serialized_wgmma: whether ptxas serialized any wgmma (warnings C7510 and related).
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


@dataclasses.dataclass(frozen=True)
class MemoryAnalysis:
    """Bytes of device memory that a program allocates."""

    temp_size_in_bytes: int
    argument_size_in_bytes: int
    output_size_in_bytes: int
    alias_size_in_bytes: int


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program that cannot be called here: its optimized HLO and its memory, as jax.stages.Compiled has."""

    hlo: str
    memory: MemoryAnalysis

    def as_text(self) -> str:
        return self.hlo

    def memory_analysis(self) -> MemoryAnalysis:
        return self.memory


def missing() -> str | None:
    """The reason why nothing can be compiled here, or None."""
    if COMPILER_FOLDER.is_dir():
        return None
    with contextlib.suppress(ModuleNotFoundError):
        if importlib.util.find_spec(_PLUGIN) is not None:
            return None
    return "compiling for sm_90a needs JAX's CUDA plugin and ptxas: run make compiler"


def compile_for_h200(
    fn, *avals, ptx: bool = False, options: dict[str, int] | None = None
) -> tuple[Program, PtxasReport]:
    """Compiles fn for one H200, with optimizations, or takes the result from the cache.

    Args:
      fn: a function of arrays, jitted here.
      *avals: pytrees of jax.ShapeDtypeStruct.
      ptx: also put the kernels' PTX in the report's text.
      options: XLA's flags for this program.

    Raises:
      Whatever the lowering or the compiler raises.
    """
    with optimizations(True):
        lowered = lower_for_h200(fn, *avals)
        entry = CACHE_FOLDER / f"{_fingerprint(lowered, ptx, options or {})}.json.gz"
        if entry.exists():
            stored = json.loads(gzip.decompress(entry.read_bytes()))
            return Program(stored["hlo"], MemoryAnalysis(**stored["memory"])), PtxasReport(stored["ptxas"])
        compile_ = functools.partial(lowered.compile, compiler_options=_compiler_options() | (options or {}))
        compiled, report = reported(compile_, ptx=ptx)
    memory = compiled.memory_analysis()
    sizes = {field.name: getattr(memory, field.name) for field in dataclasses.fields(MemoryAnalysis)}
    program = Program(compiled.as_text(), MemoryAnalysis(**sizes))
    _store(entry, {"hlo": program.hlo, "memory": sizes, "ptxas": report.text})
    return program, report


def lower_for_h200(fn, *avals) -> jax.stages.Lowered:
    """Lowers fn, as a new function each time: JAX's own cache would leave nothing to report; arguments as above."""
    mesh = topologies.make_mesh(_topology(), (1,), ("device",))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    avals = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated), avals)
    return jax.jit(lambda *args: fn(*args)).lower(*avals)


def h200() -> jax.Device:
    """The device that programs are compiled for."""
    return _topology().devices[0]


def reported[Result](compile_: Callable[[], Result], *, ptx: bool = False) -> tuple[Result, PtxasReport]:
    """What a compilation returns, and ptxas' reports on the kernels that are not compiled yet in this process."""
    with tempfile.TemporaryFile() as output:
        with _ptxas_output_to(output, ptx):
            result = compile_()
        output.seek(0)
        return result, PtxasReport(output.read().decode(errors="replace"))


def _store(entry: Path, contents: dict) -> None:
    """Writes a cache entry; another worker that compiles the same sees all of it or nothing."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=entry.parent, delete=False) as file:
        file.write(gzip.compress(json.dumps(contents).encode()))
    os.replace(file.name, entry)


def _fingerprint(lowered, ptx: bool, options: dict[str, int]) -> str:
    """A hash of all that decides the result."""
    key = hashlib.sha256(lowered.as_text().encode())
    key.update(f"{_H200} {ptx} {jaxlib.__version__} {_ptxas_version()}".encode())
    key.update("".join(f" {name}={value}" for name, value in sorted(options.items())).encode())
    return key.hexdigest()


@functools.cache
def _ptxas_version() -> str:
    """Of the wheel; empty where ptxas comes from elsewhere."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("nvidia-cuda-nvcc")
    return ""


def _cuda_folder() -> Path:
    return COMPILER_FOLDER / "nvidia" / "cu13"


def _compiler_options() -> dict[str, str]:
    """Where XLA finds ptxas for its own kernels; JAX looked for it before the folder was on `sys.path`."""
    return {"xla_gpu_cuda_data_dir": str(_cuda_folder())} if COMPILER_FOLDER.is_dir() else {}


@functools.cache
def _topology():
    """One H200, from the CUDA plugin, which is started first."""
    jax.devices()  # starts the backends that JAX finds by itself: the plugin is none of them yet
    if COMPILER_FOLDER.is_dir():
        sys.path.append(str(COMPILER_FOLDER))
        importlib.invalidate_caches()

    def describe():
        return topologies.get_topology_desc(platform="cuda", target_config=_H200, topology="1x1x1")

    try:
        return describe()
    except NotImplementedError:  # no such platform yet
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # the plugin starts without a GPU and without cuDNN
        importlib.import_module(_PLUGIN).initialize()
        return describe()


@contextlib.contextmanager
def _ptxas_output_to(output, ptx: bool):
    """Within, Mosaic GPU prints what ptxas reports, and its prints go to a file.

    Mosaic GPU reads these variables at every compilation. It is C++ and prints to the process's standard output.
    """
    variables = {"MOSAIC_GPU_DUMP_PTXAS": "1"}
    if ptx:
        variables["MOSAIC_GPU_DUMP_PTX"] = "1"
    if COMPILER_FOLDER.is_dir():  # Mosaic GPU was imported before the folder was on `sys.path`, and found neither
        variables["MOSAIC_GPU_CUDA_ROOT"] = str(_cuda_folder())
        variables["MOSAIC_GPU_RUNTIME_LIB_PATH"] = str(
            COMPILER_FOLDER / "jax_cuda13_plugin" / "libmosaic_gpu_runtime.so"
        )
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(output.fileno(), 1)
    try:
        with pytest.MonkeyPatch.context() as environment:
            for name, value in variables.items():
                environment.setenv(name, value)
            yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
