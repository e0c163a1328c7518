"""Hadamard rotations of the last axis, as products of small matrices of known orders.

A Hadamard matrix of order n has entries of 1 and -1 and orthogonal rows; divided by sqrt(n) it is a rotation that
spreads every number evenly over n. Orders come from Sylvester (powers of two) and from Paley's two constructions
(Paley 1933, "On orthogonal matrices", J. Math. Phys. 12), their products from Kronecker: the rotation of 1536 numbers
is one of 12 and one of 128, 12 multiplications and 7 additions a number where the dense matrix needs 1536.

A power of two is computed by butterflies in float32: stage s = 0, 1, 2 ... replaces the numbers a and b of the places
p and p + 2^s, where bit s of p is 0, by a + b and a - b; one multiplication by size^-0.5 comes last. This order is part
of the definition: kernels with the same stages give the same bits. Sums of other orders are left to XLA's products.

Use in quantization: QuaRot (arXiv 2404.00456), SpinQuant (arXiv 2405.16406).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import Precision
from jaxtyping import Array, Float, Int, Int8

# Of one matrix: products with larger ones cost more than the rotation gains. It leaves out 344, an order that would
# serve 11008 = 344 * 32 numbers in one block for 344 multiplications each; 43 blocks of 256 take 8 additions.
LARGEST_ORDER = 256
_LARGEST_POWER_OF_TWO = 128
_LARGEST_SIZE = 2**24
# Of blocks that kernels rotate: eight numbers each of 32 lanes.
LARGEST_WARP_BLOCK = 256


_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hadamard:
    """The rotation x -> (x * s) @ M: x times random signs, then a block-diagonal Hadamard matrix.

    A block of M is the Kronecker product of Hadamard matrices of `orders`, divided by the root of its size. As a
    prologue (`semantics.prologue`) it rotates the numbers of a row before they are quantized.

    Attributes:
      orders: of the matrices, the outermost first; each is known (`is_known_order`).
      blocks: equal blocks on the diagonal of M.
      signs: seed of s, from 0 to 2^32 - 1; None for signs that are all 1. Within a compiled program an array of s, so
        that rotations of all seeds share the program; such a rotation is no static argument.
      parts: numbers of x for each number of the result.

    Raises:
      ValueError: an unknown order, or other blocks and signs than these.
    """

    orders: tuple[int, ...] = dataclasses.field(metadata=_STATIC)
    blocks: int = dataclasses.field(default=1, metadata=_STATIC)
    signs: int | Int8[Array, " k"] | None = dataclasses.field(default=None, metadata=_STATIC)
    parts: ClassVar[int] = 1

    def __post_init__(self):
        object.__setattr__(self, "orders", tuple(self.orders))
        if unknown := [order for order in self.orders if not (_is_count(order) and is_known_order(order))]:
            raise ValueError(f"no Hadamard matrix of order {unknown[0]!r:.40} is known here: use `hadamard(size)`")
        if not _is_count(self.blocks) or math.prod(self.orders) * self.blocks > _LARGEST_SIZE:
            raise ValueError(f"a rotation needs at least 1 block and at most 2^24 numbers, got {self!r:.100}")
        is_seed = type(self.signs) is int and 0 <= self.signs < 2**32
        if not (is_seed or self.signs is None or isinstance(self.signs, jax.Array)):
            raise ValueError(f"signs must be a seed from 0 to 2^32 - 1, or None, got {self.signs!r:.40}")

    @property
    def size(self) -> int:
        """Numbers that it rotates."""
        return self.blocks * self.block

    @property
    def block(self) -> int:
        """Numbers of a block."""
        return math.prod(self.orders)

    @property
    def within_warp(self) -> bool:
        """Whether kernels can rotate as a part of what they compute: small powers of two, without signs."""
        return self.signs is None and self.block <= LARGEST_WARP_BLOCK and _is_power_of_two(self.block)

    def __call__(self, x: Float[Array, "*rows k"]) -> Float[Array, "*rows k"]:
        """`rotate`, in float32."""
        return self.rotate(x.astype(jnp.float32))

    def rotate(self, x: Float[Array, "*rows k"]) -> Float[Array, "*rows k"]:
        """The rotation of the last axis, computed in float32, in x's dtype. Raises ValueError for another size."""
        numbers = self._checked(x)
        return self._multiply(numbers if self.signs is None else numbers * self._signs(x.ndim)).astype(x.dtype)

    def undo(self, x: Float[Array, "*rows k"]) -> Float[Array, "*rows k"]:
        """The inverse of `rotate`."""
        numbers = self._multiply(self._checked(x), transposed=True)
        return (numbers if self.signs is None else numbers * self._signs(x.ndim)).astype(x.dtype)

    def _checked(self, x: Float[Array, "*rows k"]) -> Float[Array, "*rows k"]:
        if x.shape[-1] != self.size:
            raise ValueError(f"a rotation of {self.size} numbers was given {x.shape[-1]}")
        return x.astype(jnp.float32)

    def drawn_signs(self) -> Int8[np.ndarray, " k"] | None:
        """s of the seed."""
        return None if self.signs is None else random_signs(self.signs, self.size)

    def _signs(self, ndim: int) -> Float[Array, "... k"]:
        signs = self.signs if isinstance(self.signs, jax.Array) else self.drawn_signs()
        return jnp.asarray(signs, jnp.float32).reshape(*(1,) * (ndim - 1), -1)

    def _multiply(self, x: Float[Array, "*rows k"], *, transposed: bool = False) -> Float[Array, "*rows k"]:
        """x @ M, or x @ M.T: along each axis of x as [rows, blocks, *orders], the innermost first."""
        numbers, inner = x, 1
        for order in reversed(self.orders):
            numbers = numbers.reshape(*x.shape[:-1], -1, order, inner)
            if _is_power_of_two(order):
                numbers = butterflies(numbers)
            else:
                matrix = jnp.asarray(hadamard_matrix(order), jnp.float32)
                equation = "...oi,po->...pi" if transposed else "...oi,op->...pi"
                numbers = jnp.einsum(equation, numbers, matrix, precision=Precision.HIGHEST)
            inner *= order
        return numbers.reshape(x.shape) * self.block**-0.5


def butterflies(x: Float[Array, "*rows order inner"]) -> Float[Array, "*rows order inner"]:
    """The product with Sylvester's matrix, which is symmetric, along the last but one axis.

    Of numbers in a row, x as [blocks, order, inner], these are the stages of distances inner, 2 inner, 4 inner ...
    """
    *rows, order, inner = x.shape
    for stage in range(order.bit_length() - 1):
        pairs = x.reshape(*rows, -1, 2, 2**stage, inner)
        a, b = pairs[..., 0, :, :], pairs[..., 1, :, :]
        x = jnp.stack([a + b, a - b], axis=-3)
    return x.reshape(*rows, order, inner)


@functools.lru_cache(maxsize=64)
def hadamard(size: int, shards: int = 1, signs: int | None = None, block: int | None = None) -> Hadamard:
    """The rotation of `size` numbers with the largest blocks whose size is known, or blocks of one size.

    Orders with an odd factor come first, those with the least sum; then powers of two up to 128.

    Args:
      size: numbers.
      shards: equal parts that the numbers are divided into, with no block in two of them.
      signs: seed of random signs, or None.
      block: numbers of a block; None takes the largest.

    Raises:
      ValueError: a size that is not divisible by `shards`, or a part of it not by `block`; a block of unknown size.
    """
    if not (_is_count(size) and _is_count(shards)) or size % shards:
        raise ValueError(f"{size} numbers cannot be divided into {shards} equal shards")
    part = size // shards
    if block is None:
        block = next(block for block in range(part, 0, -1) if part % block == 0 and _orders(block) is not None)
    if not _is_count(block) or part % block or _orders(block) is None:
        raise ValueError(
            f"{part} numbers cannot be rotated in blocks of {block}: choose a divisor that is a product of known "
            "orders, such as a power of two"
        )
    return Hadamard(_orders(block), size // block, signs)


def is_known_order(order: int) -> bool:
    """Whether `hadamard_matrix` has this order, of at most `LARGEST_ORDER`."""
    if order > LARGEST_ORDER:
        return False
    return _is_power_of_two(order) or (order % 4 == 0 and _paley_field(order) is not None)


@functools.cache
def hadamard_matrix(order: int) -> Int8[np.ndarray, "n n"]:
    """The matrix of a known order, not normalized: by Sylvester, else by Paley's first or second construction."""
    if _is_power_of_two(order):
        matrix = np.ones((1, 1), np.int8)
        while len(matrix) < order:
            matrix = np.kron(np.array([[1, 1], [1, -1]], np.int8), matrix)
    else:
        matrix = _paley(order)
    matrix.setflags(write=False)
    return matrix


def random_signs(seed: int, count: int) -> Int8[np.ndarray, " count"]:
    """1 or -1, from the top bits of PCG64, whose stream numpy keeps from version to version (NEP 19)."""
    top_bits = (np.random.PCG64(seed).random_raw(count) >> np.uint64(63)).astype(np.int8)
    return 1 - 2 * top_bits


def _orders(block: int) -> tuple[int, ...] | None:
    """Known orders whose product is `block`, or None."""
    odd = _odd_orders(block)
    if odd is None:
        return None
    exponent = (block // math.prod(odd)).bit_length() - 1
    factors = -(-exponent // (_LARGEST_POWER_OF_TWO.bit_length() - 1))
    return (*odd, *(2 ** ((exponent + factors - 1 - i) // factors) for i in range(factors)))


@functools.cache
def _odd_orders(size: int) -> tuple[int, ...] | None:
    """Known orders, no powers of two, that leave a power of two of the size, with the least sum; None if none do."""
    if _is_power_of_two(size):
        return ()
    found = []
    for order in range(12, min(size, LARGEST_ORDER) + 1, 4):
        if size % order == 0 and not _is_power_of_two(order) and is_known_order(order):
            others = _odd_orders(size // order)
            found += [] if others is None else [tuple(sorted((order, *others)))]
    return min(found, key=sum, default=None)


def _is_count(number: int) -> bool:
    return type(number) is int and number >= 1


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


def _paley_field(order: int) -> tuple[int, int] | None:
    """p and k <= 3 of a field of p^k elements: order - 1, or order / 2 - 1 if that is 1 modulo 4."""
    for size in (order - 1, order // 2 - 1):
        field = _prime_power(size)
        if field is not None and (size == order - 1 or size % 4 == 1):
            return field
    return None


def _prime_power(number: int) -> tuple[int, int] | None:
    prime = next((p for p in range(2, number + 1) if number % p == 0), None)
    return next(((prime, k) for k in (1, 2, 3) if prime is not None and prime**k == number), None)


def _paley(order: int) -> Int8[np.ndarray, "n n"]:
    """The first construction for fields of order - 1 elements, the second for those of order / 2 - 1."""
    prime, power = _paley_field(order)
    size = prime**power
    border = np.zeros((size + 1, size + 1), np.int8)
    border[1:, 1:] = _jacobsthal(prime, power)
    border[0, 1:] = 1
    identity = np.eye(size + 1, dtype=np.int8)
    if size == order - 1:
        border[1:, 0] = -1
        return identity + border
    border[1:, 0] = 1
    pair, diagonal = np.array([[1, 1], [1, -1]], np.int8), np.array([[1, -1], [-1, -1]], np.int8)
    return np.kron(border, pair) + np.kron(identity, diagonal)


def _jacobsthal(prime: int, power: int) -> Int8[np.ndarray, "q q"]:
    """chi(a - b) for all elements a and b of a field: 0 for 0, 1 for squares, -1 for others.

    Elements are polynomials in z, digits to the base p of their index, modulo z^k - sum of `remainder` * z^i.
    """
    size = prime**power
    digits = np.arange(size)[:, None] // prime ** np.arange(power) % prime
    products = np.zeros((size, 2 * power - 1), int)
    for i in range(power):
        products[:, i : i + power] += digits[:, i : i + 1] * digits
    remainder = _irreducible(prime, power)
    for i in range(2 * power - 2, power - 1, -1):
        products[:, i - power : i] += products[:, i : i + 1] * remainder
    weights = prime ** np.arange(power)
    chi = np.full(size, -1, np.int8)
    chi[(products[:, :power] % prime) @ weights] = 1
    chi[0] = 0
    return chi[((digits[:, None] - digits[None]) % prime) @ weights]


def _irreducible(prime: int, power: int) -> Int[np.ndarray, " power"]:
    """The remainder of z^k by a polynomial of degree k <= 3 that has no root, and so no factor."""
    z = np.arange(prime)[:, None] ** np.arange(power + 1)
    for index in range(prime**power):
        remainder = index // prime ** np.arange(power) % prime
        if power == 1 or np.all((z[:, power] - z[:, :power] @ remainder) % prime):
            return remainder
    raise AssertionError("every finite field has irreducible polynomials of every degree")
