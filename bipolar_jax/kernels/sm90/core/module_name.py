"""The same kernel is the same module, however many kernels its process has lowered before.

Mosaic GPU numbers the modules of one name within a process and writes the number into the module, as the name of its
dumps. JAX's persistent compilation cache and Mosaic GPU's own take modules by their bytes, so that a program would be
found in the cache only by processes that lower the same kernels in the same order.
"""

from __future__ import annotations

from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

_NAME_OF_DUMPS = "mosaic_gpu.dump_basename"


def keep_module_name(name: str) -> None:
    """Within a kernel's body: its dumps get this name, without a number; another kernel of the name overwrites them."""

    @plgpu.inline_mgpu()
    def inline(_):
        operation = ir.InsertionPoint.current.block.owner.operation
        while operation.parent is not None:
            operation = operation.parent.operation
        operation.attributes[_NAME_OF_DUMPS] = ir.StringAttr.get(name)

    inline()
