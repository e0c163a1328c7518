"""The configuration of a decoder-only Transformer: Llama, Mixtral, Qwen, Gemma, Phi, BitNet, OPT, BLOOM."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

from bipolar_jax.models.expert_config import Experts
from bipolar_jax.nn.compressible import Rotation
from bipolar_jax.ops import Hadamard

# Largest size in a file: positions and token ids are int32.
MOST_SIZE = 2**31 - 1
# Bounds within which float32 cosines and sines are finite and not all zero.
_MOST_THETA, _MOST_FACTOR, _MOST_ATTENTION_FACTOR = 1e30, 1e6, 1e3

_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "ffn_size",
    "context_length",
)
_OPTIONAL_NUMBERS = ("attention_scale", "attention_softcap", "logit_softcap")
# Fields that `to_dict` leaves out where they have their defaults.
_NEWER = {
    "rotation",
    "qk_norm",
    "post_norms",
    "sub_norms",
    "embed_scale",
    *_OPTIONAL_NUMBERS,
    "window",
    "window_layers",
    "window_rope_theta",
    "rotary_dim",
    "experts",
}
# Allowed values of `norm`, `positions` and `ffn`; the first is Llama's.
NORMS = ("rms", "layer")
POSITIONS = ("rope", "learned", "alibi")
FFNS = ("swiglu", "relu", "gelu", "geglu", "relu2glu")
GATED_FFNS = ("swiglu", "geglu", "relu2glu")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are rescaled for contexts longer than the trained one.

    Attributes:
      kind: "linear" (Chen et al. 2023, arXiv 2306.15595), "llama3" (Llama 3.1's
        interpolation by bands), "yarn" (Peng et al. 2023, arXiv 2309.00071),
        "factors" (one divisor per frequency, as in GGUF's `rope_freqs`) or "longrope" (Ding et al. 2024, arXiv
        2402.13753: `short_factors` where cache or text have at most original_context_length positions, else `factors`).
      factor: ratio of the new to the trained context length, at least 1; unused by "factors".
      original_context_length: trained context length (llama3, yarn, longrope).
      low_freq_factor, high_freq_factor: band limits of llama3.
      beta_fast, beta_slow: band limits of yarn, in rotations.
      attention_factor: factor on cos and sin (yarn, longrope); None is 0.1 ln(factor) + 1, and of longrope
        sqrt(1 + ln(factor) / ln(original_context_length)).
      factors, short_factors: divisors of the rotary frequencies (factors, longrope).
    """

    kind: str
    factor: float = 1.0
    original_context_length: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    factors: tuple[float, ...] = ()
    short_factors: tuple[float, ...] = ()

    KINDS = ("linear", "llama3", "yarn", "factors", "longrope")

    def __post_init__(self):
        for name in ("factors", "short_factors"):
            object.__setattr__(self, name, _floats(getattr(self, name)))
        if self.kind not in self.KINDS:
            raise ValueError(f"RoPE scaling kind {self.kind!r} is unknown: use one of {', '.join(self.KINDS)}, or None")
        for factors in (self.factors, self.short_factors):
            if not all(1 / _MOST_FACTOR <= factor <= _MOST_FACTOR for factor in factors):
                raise ValueError(f"RoPE factors must be positive, finite and at most {_MOST_FACTOR:g}, got {factors}")
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor <= _MOST_FACTOR:
            raise ValueError(
                f"llama3 RoPE scaling needs 0 < low_freq_factor < high_freq_factor, got {self.low_freq_factor} "
                f"and {self.high_freq_factor}"
            )
        if self.kind == "yarn" and not 1 / _MOST_FACTOR <= self.beta_slow < self.beta_fast <= _MOST_FACTOR:
            raise ValueError(
                f"yarn RoPE scaling needs 0 < beta_slow < beta_fast, from {1 / _MOST_FACTOR:g} to {_MOST_FACTOR:g}, "
                f"got {self.beta_slow:g} and {self.beta_fast:g}"
            )
        if self.kind != "factors" and not 1 <= self.factor <= _MOST_FACTOR:
            limit = "at least 1" if self.factor < 1 else f"at most {_MOST_FACTOR:g}"
            raise ValueError(f"RoPE scaling factor must be {limit}, got {self.factor}")
        if self.attention_factor is not None and not 0 < self.attention_factor <= _MOST_ATTENTION_FACTOR:
            raise ValueError(
                f"RoPE attention_factor must be above 0 and at most {_MOST_ATTENTION_FACTOR:g}, got "
                f"{self.attention_factor}"
            )
        if self.kind in ("llama3", "yarn", "longrope"):
            if not self.original_context_length:
                raise ValueError(
                    f"RoPE scaling {self.kind!r} needs original_context_length, the trained context length"
                )
            _check_size("original_context_length", self.original_context_length, MOST_SIZE)
        if self.kind == "longrope" and self.original_context_length == 1:
            raise ValueError("longrope RoPE scaling needs an original_context_length above 1")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The shapes and the choice of layers of a `Transformer`.

    Attributes:
      vocab_size: rows of the embedding.
      hidden_size: width of the residual stream.
      num_layers: decoder layers.
      num_heads, num_kv_heads: query heads, and key/value heads, each shared by num_heads / num_kv_heads query heads.
      head_dim: width of one head.
      ffn_size: inner width of the feed-forward block.
      context_length: largest number of positions; longer prompts are rejected.
      rope_theta: base of the rotary frequencies.
      rope_scaling: rescaling of those frequencies, or None.
      norm_eps: epsilon of every norm.
      tie_embeddings: whether the output projection is the transposed embedding.
      qkv_bias: whether query, key and value projections have biases (Qwen2, OPT, BLOOM).
      norm: "rms", or "layer" with biases (OPT, BLOOM).
      positions: "rope", "learned" (a table of context_length rows added to the embeddings;
        OPT) or "alibi" (a bias on the attention scores; BLOOM).
      ffn: "swiglu", "geglu" (its gate is the tanh-approximated gelu; Gemma) or "relu2glu" (relu squared; BitNet); or
        two projections around "relu" (OPT) or tanh-approximated "gelu" (BLOOM).
      linear_bias: whether all other projections of a layer have biases (OPT, BLOOM).
      embed_norm: whether a norm follows the embedding (BLOOM).
      rotation: the bases that weights are in, and rotations at run time, see `bipolar_jax.compress.rotate`; or None.
      qk_norm: whether an RMSNorm over head_dim, one for all heads, follows the projections of queries and keys, before
        they are rotated (Qwen3, Gemma 3).
      post_norms: whether norms follow attention and feed-forward block, before the sum with the residual stream (Gemma
        2 and 3).
      sub_norms: whether norms precede the last projection of attention and of the feed-forward block (BitNet).
      embed_scale: factor on the embeddings, rounded to their dtype (Gemma).
      attention_scale: factor on the scores of attention; None is head_dim^-0.5.
      attention_softcap: cap c of scores, c tanh(score / c), before softmax (Gemma 2); or None.
      logit_softcap: the same of logits; or None.
      window: positions that a layer with a window attends to, its own included; None has no windows.
      window_layers: layers with a window, in order; None is all of them.
      window_rope_theta: rope_theta of layers with a window, whose frequencies are then not rescaled (Gemma 3); None is
        that of all other layers, and their scaling.
      rotary_dim: first numbers of each head that are rotated; None is all of head_dim.
      experts: of layers whose feed-forward block has experts (Mixtral, Qwen3-MoE); None where all blocks are dense.
      bos_id: id of the token that starts a text, or None.
      eos_ids: ids of the tokens that end a text.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    context_length: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False
    norm: str = "rms"
    positions: str = "rope"
    ffn: str = "swiglu"
    linear_bias: bool = False
    embed_norm: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    rotation: Rotation | None = None
    qk_norm: bool = False
    post_norms: bool = False
    sub_norms: bool = False
    embed_scale: float = 1.0
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    window: int | None = None
    window_layers: tuple[int, ...] | None = None
    window_rope_theta: float | None = None
    rotary_dim: int | None = None
    experts: Experts | None = None

    def __post_init__(self):
        object.__setattr__(self, "eos_ids", tuple(_token_id(token) for token in self.eos_ids))
        for name in _SIZES:
            _check_size(name, getattr(self, name))
        for name in ("tie_embeddings", "qkv_bias", "linear_bias", "embed_norm", "qk_norm", "post_norms", "sub_norms"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r:.40}")
        optional = [name for name in _OPTIONAL_NUMBERS if getattr(self, name) is not None]
        for name in ("rope_theta", "norm_eps", "embed_scale", *optional):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if self.bos_id is not None:
            object.__setattr__(self, "bos_id", _token_id(self.bos_id))
        for token in self.eos_ids if self.bos_id is None else (self.bos_id, *self.eos_ids):
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"BOS or EOS id {token} is outside the vocabulary 0..{self.vocab_size - 1}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        for name, known in (("norm", NORMS), ("positions", POSITIONS), ("ffn", FFNS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown: use one of {', '.join(known)}")
        if self.rope_scaling is not None and self.positions != "rope":
            raise ValueError(f"rope_scaling has no meaning for positions {self.positions!r}: leave it None")
        self._check_attention()
        if self.positions == "rope":
            self._check_rope()
        if self.experts is not None:
            self._check_experts(self.experts)
        if self.rotation is not None:
            self._check_rotation(self.rotation)

    @property
    def runs(self) -> tuple[range, ...]:
        """Runs of consecutive layers that have the same parameters: with experts, or dense."""
        return (range(self.num_layers),) if self.experts is None else self.experts.runs(self.num_layers)

    def experts_of(self, layer: int) -> Experts | None:
        """The experts of a layer; None if its feed-forward block is dense."""
        return None if self.experts is None or layer in self.experts.dense_layers else self.experts

    @property
    def num_rotary(self) -> int:
        """Numbers of each head that are rotated."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    def outputs(self, projection: str) -> int:
        """Outputs of "q_proj", "k_proj", "v_proj", "gate_proj" or "up_proj"."""
        heads = {"q_proj": self.num_heads, "k_proj": self.num_kv_heads, "v_proj": self.num_kv_heads}
        return heads[projection] * self.head_dim if projection in heads else self.ffn_size

    def has_window(self, layer: int) -> bool:
        """Whether a layer attends to its last `window` positions alone."""
        return self.window is not None and (self.window_layers is None or layer in self.window_layers)

    @property
    def block_norm(self) -> str:
        """The norm within layers, "rms" or "layer"; before the first and after the last it is always `norm`."""
        return "rms" if self.rotation is not None and self.rotation.stream is not None else self.norm

    def key_rotation(self, cache_bits: int | None) -> Hadamard | None:
        """The basis in which a cache of so many bits keeps keys; None for the model's own."""
        return None if self.rotation is None or cache_bits != 4 else self.rotation.keys

    def _check_experts(self, experts: Experts) -> None:
        """Raises ValueError for layers that do not exist, and for what blocks with experts do not compute."""
        experts.check_layers(self.num_layers)
        if self.ffn not in GATED_FFNS:
            raise ValueError(f"experts have gates, one of {', '.join(GATED_FFNS)}, not ffn={self.ffn!r}")
        named = {"sub_norms": self.sub_norms, "linear_bias": self.linear_bias}
        named["rotation"] = self.rotation is not None
        if found := [name for name, is_set in named.items() if is_set]:
            raise ValueError(f"{', '.join(found)} is not computed in layers with experts: leave it out")

    def _check_rotation(self, rotation: Rotation) -> None:
        sizes = {"stream": self.hidden_size, "ffn": self.ffn_size, "keys": self.head_dim}
        for name, size in sizes.items():
            part = getattr(rotation, name)
            if part is not None and part.size != size:
                raise ValueError(f"rotation.{name} is of {part.size} numbers, the model has {size}")
        if self.sub_norms and rotation.ffn is not None:
            raise ValueError("rotation.ffn has no place where a norm precedes the last layer: sub_norms")
        if self.post_norms and rotation.stream is not None:
            raise ValueError("rotation.stream has no place where norms follow the blocks: post_norms")
        if rotation.stream is not None:
            if not rotation.enters and (self.tie_embeddings or self.embed_norm):
                raise ValueError("a tied embedding, or one before a norm, is rotated at run time: rotation.enters")
            if not rotation.leaves and (self.tie_embeddings or self.norm == "layer"):
                raise ValueError("a tied output layer, or a last LayerNorm, needs rotation.leaves")

    def _check_attention(self) -> None:
        """Raises ValueError for windows and norms that contradict other fields."""
        if self.sub_norms and self.ffn not in GATED_FFNS:
            raise ValueError(f"sub_norms belong to a feed-forward block with gates, not to {self.ffn!r}")
        if self.window is not None:
            _check_size("window", self.window, MOST_SIZE)
        if self.window_layers is not None:
            layers = tuple(_layer(layer) for layer in self.window_layers)
            object.__setattr__(self, "window_layers", layers)
            if (
                self.window is None
                or sorted({*layers}) != [*layers]
                or not all(0 <= i < self.num_layers for i in layers)
            ):
                raise ValueError(
                    f"window_layers must be ascending indices of the {self.num_layers} layers, beside a window, got "
                    f"{layers!s:.60} and window={self.window}"
                )
        for name in ("rotary_dim", "window_rope_theta"):
            if getattr(self, name) is not None and self.positions != "rope":
                raise ValueError(f"{name} has no meaning for positions {self.positions!r}: leave it None")
        if self.window_rope_theta is not None and self.window is None:
            raise ValueError("window_rope_theta has no meaning without a window: leave it None")
        scores = ("attention_scale", "attention_softcap", "window")
        changed = [name for name in scores if getattr(self, name) is not None]
        if changed and self.positions == "alibi":
            raise ValueError(f"{', '.join(changed)} is not computed beside ALiBi: leave it None")

    def _check_rope(self) -> None:
        if self.rotary_dim is not None:
            _check_size("rotary_dim", self.rotary_dim, self.head_dim)
        if self.num_rotary % 2:
            name = "head_dim" if self.rotary_dim is None else "rotary_dim"
            raise ValueError(f"{name} must be even for rotary embeddings, got {self.num_rotary}")
        for name in ("rope_theta", "window_rope_theta"):
            theta = getattr(self, name)
            if theta is not None and not 1 <= theta <= _MOST_THETA:
                raise ValueError(f"{name} must be from 1 to {_MOST_THETA:g}, got {theta}")
        scaling = self.rope_scaling
        if scaling is None:
            return
        if scaling.kind == "yarn" and self.rope_theta == 1:
            raise ValueError("yarn RoPE scaling needs a rope_theta above 1, got 1")
        counts = {"factors": (scaling.factors,), "longrope": (scaling.factors, scaling.short_factors)}
        for factors in counts.get(scaling.kind, ()):
            if len(factors) != self.num_rotary // 2:
                raise ValueError(
                    f"RoPE has {len(factors)} explicit factors; {self.num_rotary} rotated numbers of a head need "
                    f"{self.num_rotary // 2}"
                )

    def to_dict(self) -> dict[str, Any]:
        """A dict of JSON values, which `from_dict` reads."""
        fields = dataclasses.asdict(self)
        # As files of older versions, which do not know these fields.
        newer = {f.name: f.default for f in dataclasses.fields(self) if f.name in _NEWER}
        if self.rope_scaling is not None and not self.rope_scaling.short_factors:
            del fields["rope_scaling"]["short_factors"]
        return {name: value for name, value in fields.items() if name not in newer or value != newer[name]}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> TransformerConfig:
        """Inverse of `to_dict`. Raises ValueError on unknown, missing or impossible fields."""
        if not isinstance(fields, dict):
            raise ValueError(f"model config is a {type(fields).__name__}, expected an object")
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ValueError(f"model config has unknown fields {unknown!s:.200}: it was written by another version")
        for name in set(_SIZES) & set(fields):
            _check_size(name, fields[name], MOST_SIZE)
        scaling, rotation, experts = (fields.get(name) for name in ("rope_scaling", "rotation", "experts"))
        try:
            parts = {
                "rope_scaling": RopeScaling(**scaling) if scaling else None,
                "rotation": Rotation.from_dict(rotation) if rotation else None,
                "experts": Experts.from_dict(experts) if experts else None,
            }
            return cls(**{**fields, **parts})
        except (TypeError, OverflowError) as error:
            raise ValueError(f"model config has missing or unknown fields: {error}") from error


def _check_size(name: str, value: Any, most: int | None = None) -> None:
    try:
        size = operator.index(value)
    except TypeError as error:
        raise ValueError(f"{name} must be an integer, got {value!r:.40}") from error
    if isinstance(value, bool) or size < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r:.40}")
    if most is not None and size > most:
        raise ValueError(f"{name} must be at most {most}, got {value!r:.40}")


def _token_id(value: Any) -> int:
    if isinstance(value, bool):
        raise ValueError(f"BOS and EOS ids must be integers, got {value}")
    try:
        return operator.index(value)
    except TypeError as error:
        raise ValueError(f"BOS and EOS ids must be integers, got {value!r:.40}") from error


def _layer(value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError as error:
        raise ValueError(f"window_layers must be integers, got {value!r:.40}") from error


def _floats(values: Any) -> tuple[float, ...]:
    try:
        return tuple(float(value) for value in values)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"RoPE factors must be numbers, got {values!r:.60}") from error
