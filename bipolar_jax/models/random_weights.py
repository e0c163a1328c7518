"""Models with random weights, float or packed, for measuring speed and memory without a checkpoint.

Packed models are drawn directly, without a float model: one parameter at a time, layer by layer and in blocks of rows,
so that temporaries stay smaller than one layer, on every device that has a part of them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Int, PRNGKeyArray, UInt32

from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.transformer import Transformer
from bipolar_jax.nn import quantize_model
from bipolar_jax.packing import BipolarArray
from bipolar_jax.packing.words import WORD_BITS, num_words
from bipolar_jax.quantize import Precision
from bipolar_jax.quantize.groups import group_lengths
from bipolar_jax.quantize.integer_groups import LARGEST_VALUE, IntegerGroups

# State of XLA's RngBitGenerator; threefry would need several times the memory of its output.
Generator = UInt32[Array, "4"]
_MOST_BLOCKS = 64  # blocks of rows per layer
# Layers whose output is added to the residual stream, 2 per decoder layer.
_RESIDUAL = ("o_proj", "down_proj")


def random_packed(
    config: TransformerConfig,
    precision: Precision,
    *,
    key: PRNGKeyArray,
    dtype: Any = jnp.bfloat16,
    embed_bits: int | None = 8,
    embed_group_size: int | None = None,
    implementation: str = "auto",
    place: Callable[[Transformer], Mapping[str, Any]] | None = None,
) -> Transformer:
    """A packed model with random bits and the structure of `quantize_model`'s result.

    The bits are independent and uniform. Scales keep activations of order one through all layers,
    except 1-bit activations, which grow because they are rounded to their largest magnitude.

    Args:
      config: the model, such as one of `presets`.
      precision: precision of every linear layer of the decoder.
      key: PRNG key. Bits are reproducible on one kind of device; XLA's generators differ between kinds.
      dtype: dtype of the computation and of everything that is not packed, such as norms and biases.
      embed_bits: weight bits of the embedding and the output layer, whose input stays float; None
        leaves both float.
      embed_group_size: numbers of them that share a scale; None is one scale a row.
      implementation: backend of the packed layers, see `bipolar_jax.matmul`.
      place: of the model's shapes and dtypes, makes the shardings of its arrays by path, as for `load_model`; None
        leaves them on one device. No device has more than its parts and one layer's parameter.

    Raises:
      ValueError: bits outside 1..8, or a group size that does not fit a layer.
    """
    rules = [("^layers/", precision)]
    if embed_bits is not None:
        rules.append(("^(embed|lm_head)$", Precision(embed_bits, group_size=embed_group_size)))
    make_model = lambda: quantize_model(_float_model(config, dtype), rules, implementation=implementation)  # noqa: E731
    return _fill(make_model, config, key, place)


def random_float(config: TransformerConfig, dtype: Any, key: PRNGKeyArray) -> Transformer:
    """A float model in `dtype` with uniform weights of the same standard deviation as `random_packed`."""
    return _fill(lambda: _float_model(config, dtype), config, key)


def _float_model(config: TransformerConfig, dtype: Any) -> Transformer:
    return Transformer(config, param_dtype=dtype, rngs=nnx.Rngs(0))


def _fill(
    make_model: Callable[[], Transformer],
    config: TransformerConfig,
    key: PRNGKeyArray,
    place: Callable[[Transformer], Mapping[str, Any]] | None = None,
) -> Transformer:
    """The model that `make_model` describes, with random arrays; `make_model` itself is only traced."""
    abstract = nnx.eval_shape(make_model)
    graph, state = nnx.split(abstract)
    shardings = {} if place is None else place(abstract)
    flat = nnx.to_flat_state(state)
    generator_states = jax.random.bits(key, (len(flat), 4), jnp.uint32)
    drawn = []
    for (path, variable), generator in zip(flat, generator_states, strict=True):
        leaf, sharding = variable.get_value(), shardings.get("/".join(map(str, path)))
        if path[-1] in ("scale", "bias"):
            values = jnp.full(leaf.shape, path[-1] == "scale", leaf.dtype, device=sharding)
            drawn.append((path, variable.replace(values)))
            continue
        arrays, structure = jax.tree.flatten(leaf)
        stack_axes = 0 if path[0] != "layers" else 2 if "experts" in path else 1
        draw = _draw
        if sharding is not None:
            draw = _drawn_on(tuple(jax.tree.leaves(sharding)), structure)
            generator = np.asarray(generator)  # of the host, which every process has
        values = draw(tuple(arrays), structure, stack_axes, _deviation(config, path, leaf), generator)
        drawn.append((path, variable.replace(values)))
    return nnx.merge(graph, nnx.from_flat_state(drawn))


def _deviation(config: TransformerConfig, path: tuple[str, ...], leaf: Any) -> float:
    """The standard deviation of a parameter with which activations keep order one."""
    if path[-1] == "embedding":
        # Tied rows are also output weights; the first norm rescales the small residual stream.
        return config.hidden_size**-0.5 if config.tie_embeddings else 1.0
    summed = 2 * config.num_layers if path[-2] in _RESIDUAL else 1
    return (leaf.shape[-2] * summed) ** -0.5


def _drawn(
    arrays: tuple[jax.ShapeDtypeStruct, ...],
    structure: jax.tree_util.PyTreeDef,
    stack_axes: int,
    deviation: float,
    generator: Generator,
) -> Any:
    """Random numbers for one abstract parameter; for a stack one layer, or expert, after the other."""
    if not stack_axes:
        return _draw_one(structure.unflatten(arrays), deviation, generator)[1]
    one = structure.unflatten([jax.ShapeDtypeStruct(array.shape[stack_axes:], array.dtype) for array in arrays])
    stack = arrays[0].shape[:stack_axes]
    drawn = jax.lax.scan(lambda generator, _: _draw_one(one, deviation, generator), generator, length=math.prod(stack))
    return jax.tree.map(lambda array: array.reshape(*stack, *array.shape[1:]), drawn[1])


# One call per parameter: in one function XLA would start all arrays of one shape as copies of another array of zeros.
_draw = jax.jit(_drawn, static_argnums=(0, 1, 2))


@functools.cache
def _drawn_on(shardings: tuple[NamedSharding, ...], structure: jax.tree_util.PyTreeDef) -> Callable:
    """`_draw` with its result on a mesh: every device draws a layer and keeps its part, so the bits are the same."""
    return jax.jit(_drawn, static_argnums=(0, 1, 2), out_shardings=structure.unflatten(shardings))


def _draw_one(leaf: Any, deviation: float, generator: Generator) -> tuple[Generator, Any]:
    if isinstance(leaf, BipolarArray):
        return _packed(leaf, deviation, generator)

    def uniform(bits):  # a uniform variable on [-sqrt(3), sqrt(3)] has standard deviation 1
        return (math.sqrt(3) * deviation * (bits.astype(jnp.float32) * 2.0**-31 - 1)).astype(leaf.dtype)

    return _in_blocks(leaf.shape, generator, uniform)


def _packed(leaf: BipolarArray, deviation: float, generator: Generator) -> tuple[Generator, BipolarArray]:
    """Random codes with the given standard deviation. Independent bits +-p_i have the variance sum_i p_i^2."""
    number_format, k = leaf.format, leaf.contracted_size
    word_mask = np.full(num_words(k), 0xFFFFFFFF, np.uint32)
    word_mask[-1] >>= np.uint32(-k % WORD_BITS)

    def words_and_sums(bits):
        words = bits & jnp.asarray(word_mask)[None]
        return words, _group_popcounts(words, k, leaf.group_size)

    generator, (planes, popcounts) = _in_blocks(leaf.planes.shape, generator, words_and_sums)
    weights = np.asarray(number_format.plane_weights, np.int32)[:, None, None]
    if number_format.ternary:  # code 1 has its bit in the low plane
        planes = jnp.stack([planes[0] | planes[1], planes[0] & planes[1]])
    scale = deviation / math.sqrt(np.sum(weights**2))
    if leaf.groups is not None:
        return _integer_groups(leaf, planes, jnp.sum(weights * popcounts, axis=0, dtype=jnp.int32), scale, generator)
    offset = None
    if leaf.offset is not None:
        # Zero is one of the two middle values, as with "minmax" on symmetric data.
        zero_value = number_format.value_shift if number_format.bits > 1 else 0
        generator, bits = jax.lax.rng_bit_generator(generator, leaf.offset.shape, jnp.uint32)
        offset = scale * zero_value * (2.0 * (bits & 1).astype(jnp.float32) - 1)
    return generator, dataclasses.replace(
        leaf,
        planes=planes,
        scale=jnp.full(leaf.scale.shape, scale, jnp.float32),
        offset=offset,
        row_sums=jnp.sum(weights * popcounts, axis=0, dtype=jnp.int32),
    )


def _integer_groups(
    leaf: BipolarArray, planes: Array, code_sums: Array, half_step: float, generator: Generator
) -> tuple[Generator, BipolarArray]:
    """Every group has the same integer scale, and zero on one of the middle codes; one bit has no zero."""
    if leaf.bits == 1:
        s, offsets = 2 * LARGEST_VALUE, (-LARGEST_VALUE, -LARGEST_VALUE)
    else:
        zero_code = leaf.format.code_offset
        s = LARGEST_VALUE // zero_code
        offsets = (-s * zero_code, -s * (leaf.format.max_value - zero_code))
    generator, bits = jax.lax.rng_bit_generator(generator, leaf.groups.offset.shape, jnp.uint32)
    offset = jnp.where(bits & 1 == 0, *offsets).astype(jnp.int8)
    groups = IntegerGroups(jnp.full(leaf.groups.scale.shape, s, jnp.uint8), offset)
    return generator, dataclasses.replace(
        leaf,
        planes=planes,
        scale=jnp.full(leaf.scale.shape, 2 * half_step / s, jnp.float32),
        row_sums=groups.value_sums(code_sums, leaf.contracted_size, leaf.group_size),
        groups=groups,
    )


def _in_blocks(shape: tuple[int, ...], generator: Generator, make: Callable) -> tuple[Generator, Any]:
    """Applies `make` to random uint32 words in blocks of rows; `make` keeps the rows and may change the last axis."""
    rows = math.prod(shape[:-1])
    blocks = math.gcd(rows, _MOST_BLOCKS)

    def one_block(generator, _):
        generator, bits = jax.lax.rng_bit_generator(generator, (rows // blocks, shape[-1]), jnp.uint32)
        return generator, make(bits)

    generator, made = jax.lax.scan(one_block, generator, length=blocks)
    return generator, jax.tree.map(lambda array: array.reshape(*shape[:-1], array.shape[-1]), made)


def _group_popcounts(words: UInt32[Array, "rows words"], k: int, group_size: int | None) -> Int[Array, "rows groups"]:
    """Set bits per group, whose ends need not be word boundaries: bits before its end minus bits before its start."""
    ends = np.cumsum(group_lengths(k, group_size))
    word, bit = np.divmod(ends, WORD_BITS)
    before = jnp.cumsum(jax.lax.population_count(words), axis=-1, dtype=jnp.int32)
    before = jnp.pad(before, ((0, 0), (1, 0)))[:, word]
    partial_word = words[:, np.minimum(word, words.shape[-1] - 1)] & jnp.asarray((1 << bit) - 1, jnp.uint32)[None]
    return jnp.diff(before + jax.lax.population_count(partial_word).astype(jnp.int32), axis=-1, prepend=0)
