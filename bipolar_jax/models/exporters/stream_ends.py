"""The embedding, the last norm and the output layer of a model as other programs compute them: rotations are folded."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx

from bipolar_jax.compress.rotations.fold import Affine, fold_gain, rotate_inputs
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.transformer import Transformer
from bipolar_jax.nn import Embed
from bipolar_jax.nn.compressible import Rotation

_NAMES = ("embed", "final_norm", "lm_head")


def folded_ends(model: Transformer, *, states_ffn: bool = False) -> tuple[TransformerConfig, dict[str, nnx.Module]]:
    """The config without rotations of the stream and of keys, and the modules at the stream's ends, by their names.

    Where the stream is rotated after the lookup and back before the last norm, as in models with tied embeddings, the
    table is rotated instead, and the output layer becomes one of its own that takes the norm's gain and the rotation.
    Rotations of cached keys are left out: they change no product.

    Args:
      model: before `prepare_for_inference`.
      states_ffn: whether the format can state the rotation of the inputs of feed-forward blocks' last layers, which
        then stays in the config.

    Raises:
      ValueError: such inputs are rotated at run time and `states_ffn` is False, or a packed embedding is.
    """
    config, rotation = model.config, model.config.rotation
    ends = {name: getattr(model, name) for name in _NAMES if hasattr(model, name)}
    if rotation is None:
        return config, ends
    if rotation.ffn is not None and not states_ffn:
        raise ValueError(
            "the model rotates the input of its feed-forward blocks' last layers at run time, which other programs do "
            'not: rotate or calibrate it with rotation="foldable"'
        )
    if (rotation.enters or rotation.leaves) and isinstance(model.embed, Embed):
        raise ValueError("the embedding is packed, and rotated at run time: leave it float, so that it can be folded")
    if rotation.enters:
        table = model.embed.embedding[...]
        ends["embed"] = nnx.clone(model.embed)
        ends["embed"].embedding = nnx.Param(rotation.stream.rotate(table.astype(jnp.float32)).astype(table.dtype))
    if rotation.leaves:
        kernel = model.embed.embedding[...].T if config.tie_embeddings else model.lm_head.kernel[...]
        gain = model.final_norm.scale[...]
        folded = fold_gain(Affine(kernel.astype(jnp.float32), None), gain.astype(jnp.float32))
        kernel = rotate_inputs(folded, rotation.stream).kernel.astype(kernel.dtype)
        ends["final_norm"] = nnx.clone(model.final_norm)
        ends["final_norm"].scale = nnx.Param(jnp.ones_like(gain))
        ends["lm_head"] = nnx.Linear(
            config.hidden_size, config.vocab_size, use_bias=False, kernel_init=lambda *_: kernel, rngs=nnx.Rngs(0)
        )
    tied = config.tie_embeddings and not rotation.leaves
    kept = None if rotation.ffn is None else Rotation(ffn=rotation.ffn)
    return dataclasses.replace(config, rotation=kept, tie_embeddings=tied), ends
