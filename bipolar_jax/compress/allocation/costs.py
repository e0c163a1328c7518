"""What packed layers take: bits of their weights, scales and offsets."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float

from bipolar_jax.nn.compressible import Compressible, layer_at
from bipolar_jax.packing import BipolarArray


def stored_bits(kernel: BipolarArray) -> int:
    """Bits of the codes, scales, offsets and integer groups of a packed kernel.

    Row sums, which follow from the codes, do not count, nor does the padding of words.
    """
    terms = jax.tree.leaves((kernel.scale, kernel.offset, kernel.groups))
    return math.prod(kernel.shape) * kernel.bits + sum(8 * leaf.size * leaf.dtype.itemsize for leaf in terms)


def site_bits(models: Sequence[Compressible]) -> tuple[Float[np.ndarray, "blocks sites options"], int]:
    """Bits that the layers of each input take in models that are packed differently, and the number of their weights.

    Args:
      models: the options: models of the same blocks.
    """

    def bits(block: nnx.Module, names: Sequence[str]) -> int:
        return sum(stored_bits(layer_at(block, name).kernel.get_value()) for name in names)

    def of(model: Compressible) -> list[list[int]]:
        blocks = [jax.eval_shape(lambda model, i=i: model.block(i), model) for i in range(model.num_blocks)]
        return [[bits(block, sites.names) for sites in model.block_sites] for block in blocks]

    first = jax.eval_shape(lambda model: model.block(0), models[0])
    kernels = [layer_at(first, name).kernel.get_value() for sites in models[0].block_sites for name in sites.names]
    return np.moveaxis(np.array([of(model) for model in models], np.float64), 0, -1), (
        models[0].num_blocks * sum(math.prod(kernel.shape) for kernel in kernels)
    )
