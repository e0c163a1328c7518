"""The kernels of a lowered program as programs of their own, which can be compiled at the same time.

XLA compiles the Mosaic kernels of a program one after the other, each for half a second to a second. Mosaic GPU keeps
what it has compiled for the rest of the process, by a hash of the kernel's module, whatever program the kernel is in.
So a program finds the kernels that other threads have compiled meanwhile.
"""

from __future__ import annotations

import jax
import numpy as np
from jax._src import compiler
from jax._src.lib import xla_client
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import func

_TARGET = "mosaic_gpu_v2"


def kernels_of(program: jax.stages.Lowered) -> dict[bytes, ir.Module]:
    """A program for each Mosaic kernel of the program, by the hash of the kernel's module; {} without any."""
    calls: dict[bytes, ir.Operation] = {}

    def visit(operation: ir.Operation) -> ir.WalkResult:
        if operation.name == "stablehlo.custom_call" and operation.attributes["call_target_name"].value == _TARGET:
            kernel_hash = operation.attributes["mhlo.backend_config"]["kernel_hash"].value_bytes
            calls.setdefault(kernel_hash, operation)
        return ir.WalkResult.ADVANCE

    source = program.compiler_ir("stablehlo")
    source.operation.walk(visit)
    with source.context, ir.Location.unknown():
        return {kernel_hash: _program_of(call) for kernel_hash, call in calls.items()}


def compile_kernel(kernel: ir.Module, device: jax.Device) -> None:
    """Compiles one of `kernels_of` for a device, outside of JAX's persistent compilation cache.

    Raises:
      jax.errors.JaxRuntimeError: what the compiler raises.
    """
    options = compiler.get_compile_options(
        num_replicas=1, num_partitions=1, device_assignment=np.array([[device.id]]), backend=device.client
    )
    devices = xla_client.DeviceList((device,))
    compiler.backend_compile_and_load(device.client, kernel, devices, options, host_callbacks=[])


def _program_of(call: ir.Operation) -> ir.Module:
    """A program that makes the call with its own arguments."""
    program = ir.Module.create()
    program.operation.attributes["sym_name"] = ir.StringAttr.get("kernel")
    operands, results = ([value.type for value in values] for values in (call.operands, call.results))
    with ir.InsertionPoint(program.body):
        block = func.FuncOp("main", (operands, results), visibility="public").add_entry_block()
    # A clone would be a use of the call's operands for a moment: a thread that writes the program as bytecode crashes.
    attributes = dict(call.attributes.items())
    with ir.InsertionPoint(block):
        copy = ir.Operation.create(call.name, results, list(block.arguments), attributes)
        func.ReturnOp(list(copy.results))
    return program
