"""Calibration of a model: its layers are rounded one after the other, for the inputs of the packed model."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Num

from bipolar_jax.compress.activation_spans import with_learned_spans
from bipolar_jax.compress.block_programs import (
    add_moments,
    compile_programs,
    empty_moments,
    enter_blocks,
    float_matrices,
    formats_of_inputs,
    rounded_block,
    run_block,
)
from bipolar_jax.compress.layer_store import LayerStore, digest_of_arrays, digest_of_model
from bipolar_jax.compress.packed_sites import BlockPlan, packed_kernels, plan_blocks, with_packed_layers
from bipolar_jax.compress.reconstruction import Reconstruction
from bipolar_jax.compress.reconstruction.reconstruct import check_reconstruction, reconstructed
from bipolar_jax.compress.rounding import Rounding
from bipolar_jax.compress.whole_model import WholeModel
from bipolar_jax.nn.compressible import CachesHeads, Compressible, layer_at, without_signs
from bipolar_jax.nn.convert.layer_runs import cut_by_rules
from bipolar_jax.nn.convert.quantize_model import quantize_model
from bipolar_jax.nn.convert.rules import Rules
from bipolar_jax.packing import BipolarArray
from bipolar_jax.quantize.rounding import check_finite

DEFAULT_METHOD = Rounding()
_SPAN_WINDOWS = 8  # spans are learned on so many


def calibrate[Model: nnx.Module](
    model: Model,
    inputs: Num[np.ndarray | Array, "windows ..."] | tuple[Num[np.ndarray | Array, "windows ..."], ...],
    rules: Rules,
    *,
    method: Rounding = DEFAULT_METHOD,
    reconstruction: Reconstruction | None = None,
    learn_spans: int = 4,
    cache_bits: int | None = None,
    windows_per_step: int = 4,
    on_block: Callable[[int], None] | None = None,
    store: str | os.PathLike[str] | None = None,
) -> Model:
    """Copies a model and replaces its float layers by packed layers that are rounded for a text.

    Block by block, and within a block in the order in which they run, the layers of one input are rounded against its
    second moments (`Rounding`, GPTQ by default, arXiv 2210.17323). The inputs are those of the packed model: what runs
    before is packed already, and activations are quantized. For layers that add to the residual stream every token
    counts 1 / mean square of its stream; each expert is rounded for the tokens that reach it. All other layers are
    rounded as `quantize_model` does it, before.

    In memory are, beside the model and the layers that are finished, the hidden states of all windows, and of one block
    its float layers, their rounded numbers and second moments; with a reconstruction as many states once more, and with
    `Rounding.asymmetry` those of the float model. All blocks run the same compiled programs, where rules give them the
    same precisions; most of them serve all precisions with the same activations.

    A model that is not `Compressible` is one block: its `nnx.Linear` and `nnx.LinearGeneral` are found by running it.
    Layers in stacks, with two paths, or over batch axes are rounded as `quantize_model` does it; so are, with a
    warning, layers that run within `nnx.jit`, `remat`, `scan` or `vmap`. Call its `eval()` first, if it has dropout or
    batch norms.

    Args:
      model: float or partly packed, see `nn.compressible.Compressible`; it is not changed. Projections must not have
        been joined.
      inputs: of a Compressible token ids, [windows, length], such as text that the model wrote itself: 128 windows of
        512 tokens are enough for 4 bits. Of another model what it is called with: an array, or a tuple of arrays, whose
        first axes are examples.
      rules: as those of `quantize_model`.
      method: how weights are rounded.
      reconstruction: how the layers of a block then learn together what the float model's block puts out: for 2 and 3
        bits, and activations of 4 (`Reconstruction.of`). A block that does not come nearer stays as it was rounded.
        None learns nothing.
      learn_spans: activations of at most so many bits get the part of a token's range that their grid should span
        (`Precision.a_span`), one for each input of a block; 0 learns none. The first windows are enough for it.
      cache_bits: of the cache of keys and values that the model will decode with, 8 or 4: layers are then rounded for
        what attention reads from it. None leaves keys and values as they are.
      windows_per_step: windows, or examples, that run at once; more is faster and takes more memory. With a
        reconstruction its `windows_per_update` do.
      on_block: called with the number of blocks that are finished.
      store: a folder where finished blocks are kept. A calibration that was stopped resumes from it, with the same
        result; it must be called with the same arguments.

    Returns:
      A model of the same class.

    Raises:
      ValueError: no windows, or such as the model cannot read; as `quantize_model`; a layer that was trained with
        `DotGeneral`; NaN or Inf in weights or in what enters a layer; experts in some layers only, or beside an
        asymmetry or a reconstruction; a reconstruction of a model without blocks, with nested codes or cache_bits; or a
        store that is a file, or holds blocks of another model, text, rules or method.

    Warns:
      UserWarning: experts that no token goes to; layers in training mode; blocks that a reconstruction did not improve.
    """
    if not isinstance(model, nnx.Module):
        raise ValueError(
            f"got a {type(model).__name__}: give an nnx.Module, such as the model of a PretrainedModel; linen models "
            "are rounded by quantize_model alone"
        )
    if not isinstance(method, Rounding):
        raise ValueError(f"method must be a Rounding, such as Rounding('nearest'), got {method!r:.60}")
    if cache_bits is not None and not (isinstance(model, CachesHeads) and cache_bits in model.cached_bits):
        kinds = model.cached_bits if isinstance(model, CachesHeads) else "no"
        raise ValueError(f"cache_bits is {cache_bits!r}, but the model keeps caches of {kinds} bits: leave it None")
    if type(learn_spans) is not int:
        raise ValueError(f"learn_spans must be a number of activation bits, 0 to learn none, got {learn_spans!r:.40}")
    if reconstruction is not None:
        check_reconstruction(model, reconstruction, method, cache_bits)
        windows_per_step = reconstruction.windows_per_update
    _warn_of_training_mode(model)
    batches = _batches(inputs, windows_per_step, tokens=isinstance(model, Compressible))
    if isinstance(model, Compressible):
        model.check_ids(inputs)
        model, rules = cut_by_rules(model, rules)
        blocks, (plans, other_rules) = model, plan_blocks(model, rules)
    else:
        blocks = WholeModel.of(model, batches[0])
        plan, other_rules = blocks.plan(rules)
        plans = (plan,)
    if any(sites.sites.experts and sites.precisions for block in plans for sites in block):
        if method.asymmetry:
            raise ValueError(
                f"asymmetry is {method.asymmetry:g}, which pairs inputs of the packed and of the float model, but "
                "their tokens may go to other experts: use a Rounding with asymmetry=0"
            )
        if reconstruction is not None:
            raise ValueError("blocks with packed experts are not reconstructed: leave reconstruction None")
    for precision in dict.fromkeys(each for block in plans for plan in block for each in plan.precisions.values()):
        method.check(precision)
    _check_weights(blocks, plans)
    floats, float_blocks = model, blocks
    if other_rules:
        model = quantize_model(model, other_rules)
        blocks = model if isinstance(model, Compressible) else dataclasses.replace(blocks, module=model)
    if learn_spans:
        plans = with_learned_spans(blocks, batches[: -(-_SPAN_WINDOWS // windows_per_step)], plans, learn_spans)
    finished = None
    if store is not None:
        by_block = [sorted(item for plan in block for item in plan.precisions.items()) for block in plans]
        precisions = by_block[0] if all(each == by_block[0] for each in by_block) else by_block
        options = [each for each in (cache_bits, reconstruction) if each is not None]
        settings = repr((method, *options)) if options else repr(method)
        digests = {"model": digest_of_model(floats), "inputs": digest_of_arrays(inputs)}
        finished = LayerStore(store, digests | {"rules": repr((precisions, other_rules)), "method": settings})
    learns_stream = reconstruction is not None and reconstruction.target == "float_model"
    float_blocks = float_blocks if method.asymmetry or learns_stream else None
    calibrated = _pass_over_blocks(
        blocks, float_blocks, batches, plans, method, reconstruction, cache_bits, on_block, finished
    )
    return calibrated.module if isinstance(calibrated, WholeModel) else calibrated


def _warn_of_unreached(unreached: dict[int, str]) -> None:
    """Warns once of experts that no token of the inputs goes to."""
    if unreached:
        named = ", ".join(list(unreached.values())[:5]) + (" and others" if len(unreached) > 5 else "")
        warnings.warn(
            f"experts that no token goes to are rounded as if all their inputs counted the same: {named}; give more "
            "windows",
            stacklevel=4,
        )


def _warn_of_training_mode(model: nnx.Module) -> None:
    """Warns of layers that change numbers at random, or by their batch, as they do in training."""
    training = [
        "/".join(map(str, path))
        for path, layer in nnx.iter_modules(model)
        if (isinstance(layer, nnx.Dropout) and layer.rate > 0 and not layer.deterministic)
        or (isinstance(layer, nnx.BatchNorm) and not layer.use_running_average)
    ]
    if training:
        warnings.warn(
            f"{', '.join(training[:5])}{' and others' if len(training) > 5 else ''}: in training mode, so that layers "
            "are rounded for numbers of training; call the model's eval() first",
            stacklevel=3,
        )


def _batches(inputs: Any, size: int, *, tokens: bool) -> list[Any]:
    """The inputs in steps of `size` windows. Raises ValueError as `calibrate`."""
    arrays = inputs if isinstance(inputs, tuple) else (inputs,)
    shapes = [np.shape(array) for array in arrays]
    differ = not shapes or any(not shape or 0 in shape or shape[0] != shapes[0][0] for shape in shapes)
    if type(size) is not int or size < 1 or differ:
        raise ValueError(
            f"needs at least 1 window, and 1 window a step, got inputs of shape {shapes} and {size!r} a step"
        )
    if tokens and (isinstance(inputs, tuple) or len(shapes[0]) != 2):
        raise ValueError(f"needs tokens [windows, length], got inputs of shape {shapes}")
    starts = range(0, shapes[0][0], size)
    batches = [tuple(jnp.asarray(array[start : start + size]) for array in arrays) for start in starts]
    return [batch[0] for batch in batches] if tokens else batches


def _check_weights(model: Compressible, plans: Sequence[BlockPlan]) -> None:
    """Raises ValueError for weights that cannot be rounded, before anything is calculated; programs do not check."""
    for index, plan in enumerate(plans):
        names = [name for sites in plan for name in sites.precisions]
        block = model.block(index) if names else None
        for name in names:
            check_finite(layer_at(block, name).kernel[...], f"the kernel of {name} of block {index}")


def _pass_over_blocks(
    model: Compressible,
    floats: Compressible | None,
    batches: Sequence[Any],
    plans: Sequence[BlockPlan],
    method: Rounding,
    reconstruction: Reconstruction | None,
    cache_bits: int | None,
    on_block: Callable[[int], None] | None,
    finished: LayerStore | None,
) -> Compressible:
    """The model with packed layers in its blocks; `floats` runs beside it where the rounding asks for its inputs."""
    whole, (model, signs) = model, without_signs(model)
    carries = [enter_blocks(model, batch, cache_bits, signs) for batch in batches]
    float_carries = None
    if floats is not None:
        floats = without_signs(floats)[0]
        float_carries = [enter_blocks(floats, batch, None, signs) for batch in batches]
    blocks, compiled, unreached, unlearned = [], [], {}, []
    for index, plan in enumerate(plans):
        block = model.block(index)
        float_block = None if floats is None else floats.block(index)
        kernels = None if finished is None else finished.read(index)
        is_new = kernels is None
        if is_new:
            beside = (float_block, float_carries) if method.asymmetry else None
            if plan not in compiled:
                first = None if beside is None else (float_block, float_carries[0])
                compile_programs(model, block, carries[0], plan, method, first, reconstruction)
                compiled.append(plan)
            rounded, kernels = _calibrated(model, block, index, carries, plan, method, beside, unreached)
        if float_block is not None:
            for each, carry in enumerate(float_carries):
                float_carries[each] = run_block(model, float_block, carry)
        if is_new and reconstruction is not None and kernels:
            if reconstruction.target == "float_model":
                targets = [model.stream(carry) for carry in float_carries]
            else:
                targets = [model.stream(run_block(model, block, carry)) for carry in carries]
            learned = reconstructed(model, block, carries, targets, kernels, plan, reconstruction, method.grid)
            unlearned += [] if learned else [index]
            kernels = learned or kernels
        if is_new and finished is not None:
            finished.write(index, kernels)
        if not is_new or reconstruction is not None:
            rounded = block
            for sites in plan:
                own = {name: kernels[name] for name in sites.precisions}
                rounded = rounded_block(rounded, sites, own) if own else rounded
        precisions = {name: precision for sites in plan for name, precision in sites.precisions.items()}
        blocks.append(with_packed_layers(block, kernels, precisions))
        if index + 1 < model.num_blocks:
            for each in range(len(carries)):  # one by one, so that old and new states are not all in memory
                carries[each] = run_block(model, rounded, carries[each])
        del block, rounded, float_block
        if on_block is not None:
            jax.block_until_ready(carries[-1])
            on_block(index + 1)
    _warn_of_unreached(unreached)
    if unlearned:
        warnings.warn(
            f"blocks {', '.join(map(str, unlearned))} lost more after they had learned together, and stay as they were "
            f"rounded: give a reconstruction lower rates than {reconstruction.code_rate:g} and "
            f"{reconstruction.grid_rate:g}",
            stacklevel=3,
        )
    return whole.with_blocks(blocks)


def _calibrated(
    model: Compressible,
    block: nnx.Module,
    block_index: int,
    carries: Sequence[Any],
    plans: BlockPlan,
    method: Rounding,
    beside: tuple[nnx.Module, Sequence[Any]] | None,
    unreached: dict[int, str],
) -> tuple[nnx.Module, dict[str, BipolarArray]]:
    """The block with layers that compute what packed ones will, and these packed layers' kernels by path.

    `beside` has the float block and its carries. `unreached` gets a text by the block's index, if it has experts that
    no token goes to.
    """
    kernels: dict[str, BipolarArray] = {}
    for index, plan in enumerate(plans):
        a_formats = formats_of_inputs(plan)
        if not a_formats:
            continue
        remaining = tuple(each.sites for each in plans[index:])
        moments = empty_moments(block, plan, with_cross=beside is not None)
        for each, carry in enumerate(carries):
            own = None if beside is None else (beside[0], beside[1][each])
            moments = add_moments(model, block, carry, moments, own, remaining=remaining, a_formats=a_formats)
        if not all(jnp.isfinite(sums.products).all() for sums in moments):
            raise ValueError(
                f"what enters {', '.join(plan.sites.names)} of block {block_index} has NaN or Inf: the model makes "
                "them of these inputs, so look for them in its embeddings, norms and biases, or in the inputs"
            )
        if plan.sites.experts and (count := int(jnp.sum(moments[0].weight == 0))):
            unreached.setdefault(block_index, f"{count} of {len(moments[0].weight)} of block {block_index}")
        by_format = dict(zip(a_formats, moments, strict=True))
        of_site: dict[str, BipolarArray] = {}
        for precision, names in plan.joined().items():
            floats = float_matrices(block, names)
            packed = packed_kernels(floats, by_format[precision.a_format], precision, method)
            of_site |= dict(zip(names, packed, strict=True))
        block = rounded_block(block, plan, of_site)
        kernels |= of_site
    return block, kernels
