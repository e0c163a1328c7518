"""State of Pallas' GPU interpreter, which JAX keeps in a private module: the only private import of the tests."""

from __future__ import annotations

from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call


def races_found() -> bool:
    """Whether the last interpreted kernel, run with `InterpretGPUParams(detect_races=True)`, had data races."""
    return interpret_pallas_call.get_races().races_found


def reset() -> None:
    """Forgets buffers, barriers and races; needed after a kernel that raised."""
    interpret_pallas_call.reset_gpu_interpret_mode_state()
