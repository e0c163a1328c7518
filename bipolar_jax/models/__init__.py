"""Transformers: loading, preparing, generating. What users need of the package's rooms, in one place.

Names are imported when they are first used: none of them slows `import bipolar_jax` down.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# The module of each public name.
_MODULES = {
    "ChatTemplate": "chat",
    "Completion": "inference.generation",
    "PretrainedModel": "pretrained",
    "Sampling": "inference.sampling",
    "Transformer": "transformer",
    "TransformerConfig": "config",
    "enable_command_buffers": "inference.xla_flags",
    "explain_model": "inference.explain",
    "export_compressed_tensors": "exporters",
    "export_gguf": "exporters",
    "generate": "inference.generation",
    "join_projections": "inference.join",
    "load_gguf": "loaders",
    "load_huggingface": "loaders",
    "load_model": "checkpoint",
    "load_pretrained": "loaders",
    "load_sharded": "sharding.load",
    "perplexity": "inference.perplexity",
    "pin_float_products": "inference.xla_flags",
    "prepare_for_inference": "inference.prepare",
    "preset": "presets",
    "random_float": "random_weights",
    "random_packed": "random_weights",
    "save_model": "checkpoint",
    "score_continuations": "inference.continuations",
    "shard_model": "sharding.sharded_transformer",
    "stream": "inference.generation",
    "write_windows": "inference.written_text",
}

__all__ = [
    "ChatTemplate",
    "Completion",
    "PretrainedModel",
    "Sampling",
    "Transformer",
    "TransformerConfig",
    "enable_command_buffers",
    "explain_model",
    "export_compressed_tensors",
    "export_gguf",
    "generate",
    "join_projections",
    "load_gguf",
    "load_huggingface",
    "load_model",
    "load_pretrained",
    "load_sharded",
    "perplexity",
    "pin_float_products",
    "prepare_for_inference",
    "preset",
    "random_float",
    "random_packed",
    "save_model",
    "score_continuations",
    "shard_model",
    "stream",
    "write_windows",
]

if TYPE_CHECKING:  # the same names, for type checkers and editors
    from bipolar_jax.models.chat import ChatTemplate
    from bipolar_jax.models.checkpoint import load_model, save_model
    from bipolar_jax.models.config import TransformerConfig
    from bipolar_jax.models.exporters import export_compressed_tensors, export_gguf
    from bipolar_jax.models.inference.continuations import score_continuations
    from bipolar_jax.models.inference.explain import explain_model
    from bipolar_jax.models.inference.generation import Completion, generate, stream
    from bipolar_jax.models.inference.join import join_projections
    from bipolar_jax.models.inference.perplexity import perplexity
    from bipolar_jax.models.inference.prepare import prepare_for_inference
    from bipolar_jax.models.inference.sampling import Sampling
    from bipolar_jax.models.inference.written_text import write_windows
    from bipolar_jax.models.inference.xla_flags import enable_command_buffers, pin_float_products
    from bipolar_jax.models.loaders import load_gguf, load_huggingface, load_pretrained
    from bipolar_jax.models.presets import preset
    from bipolar_jax.models.pretrained import PretrainedModel
    from bipolar_jax.models.random_weights import random_float, random_packed
    from bipolar_jax.models.sharding.load import load_sharded
    from bipolar_jax.models.sharding.sharded_transformer import shard_model
    from bipolar_jax.models.transformer import Transformer


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}: it has {', '.join(_MODULES)}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
