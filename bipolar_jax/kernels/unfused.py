"""The fused operations of a backend that has none: each raises `Unsupported`, and its caller composes other operations.

Fusing changes where numbers are stored, not what is computed: products and attention, called one after the other, serve
every device.
"""

from __future__ import annotations

from typing import Any, NoReturn

from bipolar_jax.kernels.unsupported import Unsupported


def _unfused(*operands: Any, **options: Any) -> NoReturn:
    raise Unsupported("it has no kernel that fuses these steps")


prompt_heads = decode_attention = decode_layers = feed_forward = _unfused
plan_prompt_heads = plan_decode_attention = plan_decode_layers = plan_feed_forward = _unfused
