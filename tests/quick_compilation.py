"""What lets XLA compile programs that run once in half the time, in tests and in programs that they start."""

from __future__ import annotations

from collections.abc import Mapping


def quick_compilation(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables for a process, beside what it sets itself; XLA reads them when its first backend starts."""
    flags = environment.get("XLA_FLAGS", "").split()
    # XLA's newer emitters set up MLIR for every fusion, which is half of what compiling takes; `make test-exhaustive`
    # uses them.
    if environment.get("TEST_NEWER_EMITTERS") != "1" and not any("xla_backend_extra_options" in flag for flag in flags):
        flags.append("--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters=true")
    # XLA cuts the code of a program into up to 32 modules that it compiles in parallel, which costs a third more CPU
    # time than one module does; the cores are busy with other tests.
    if not any("parallel_codegen_split_count" in flag for flag in flags):
        flags.append("--xla_cpu_parallel_codegen_split_count=1")
    # Unoptimized, compilation takes half as long. See `optimizations` for tests that compare last bits of optimized
    # code.
    unoptimized = environment.get("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    return {"XLA_FLAGS": " ".join(flags), "JAX_DISABLE_MOST_OPTIMIZATIONS": unoptimized}
