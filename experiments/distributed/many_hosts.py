"""Writes MANY_HOSTS.md: the bytes that each link of a GPU carries for a token, for large models on many GPUs.

    python -m experiments.distributed.many_hosts --config=configs/distributed/many_hosts.py \\
        --workdir=experiments/results

Nothing runs: bytes follow from the models' shapes and from the exchanges of a layer, which tests count in compiled
programs. Times are bytes by rates that the config gives with their source; a rate without one is called an assumption.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

import bipolar_jax as bj
from bipolar_jax.checkpoint.atomic_write import atomic_write
from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.kv_cache.cache import KVCache
from bipolar_jax.models.random_weights import random_packed
from bipolar_jax.models.sharding.plan import MODEL, ShardingPlan, plan_shards, reduction_size
from bipolar_jax.models.transformer import Transformer

from ..support import app
from ..support.progress import console

PAGE = "MANY_HOSTS.md"
# Reductions of [tokens, hidden] in a layer of a training step: o and down forward; q, k, v, gate and up backward.
_TRAINING_REDUCTIONS = 7
# A float32 parameter and its gradient; two moments of AdamW, which are divided over data.
_PARAMETER_BYTES, _MOMENT_BYTES = 8, 8
_HEAD = """# Large models on many GPUs: what the links carry

Written by `python -m experiments.distributed.many_hosts --config=configs/distributed/many_hosts.py
--workdir=experiments/results`. **Nothing here was run on so many GPUs.** Bytes follow from the shapes and from the
exchanges of a layer, which `tests/models/sharding` counts in compiled programs. A mesh is data x model: texts are
divided over the first axis, weights over the second.

- A layer of a decode step reduces twice, after o and after down: int32 sums [tokens, hidden] and sums of columns
  [hidden]; and before each of the two, two float32 numbers a token. How logits become tokens is left out.
- A layer of a long prompt may reduce-scatter these sums over tokens instead, and gather the codes that q, k and v, and
  gate and up, then multiply (`ShardingPlan.scatters`): 4 bytes and the bits of a code, once each, and 12 bytes a token,
  where an all-reduce sends 8 bytes a sum. Extremes and sums of columns stay.
- A layer of a training step reduces [tokens, hidden] of four bytes seven times: after o and down forward, of q, k, v,
  gate and up backward. Gradients are reduced over data once a step, in float32; as moments are divided over data, the
  two halves are assumed to be a scatter of sums and a gather of updates, which XLA chooses.
- To reduce S bytes over P devices each sends 2 (P - 1) / P S. Over several hosts sums are first reduced within each.
"""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A model on a mesh.

    Attributes:
      data, model: sizes of the mesh.
      per_host: GPUs of a host.
    """

    data: int
    model: int
    per_host: int

    def over_model(self, size: float) -> tuple[float, float]:
        """Bytes that a GPU sends over NVLink, and over the network, to reduce `size` bytes over the model axis."""
        return _reduced(size, self.model, self.per_host)

    def over_data(self, size: float) -> tuple[float, float]:
        """Likewise over the data axis, of which a host has as many devices as model axes fit into it."""
        return _reduced(size, self.data, max(1, self.per_host // self.model))

    def __str__(self) -> str:
        return f"{self.data}x{self.model}"


def _reduced(size: float, parts: int, per_host: int) -> tuple[float, float]:
    within, hosts = min(parts, per_host), -(-parts // per_host)
    return 2 * (within - 1) / within * size, 2 * (hosts - 1) / hosts * size / within


def main(config: ConfigDict, workdir: Path) -> None:
    """Runs the program; see the module docstring."""
    precision = bj.Precision.parse(config.precision)
    layouts = [_layout(text, config.gpus_per_host) for text in app.split_names(config.meshes)]
    lines = [_HEAD, *_rates(config)]
    for name, fields in config.models.items():
        model = packed_shapes(TransformerConfig(**fields.to_dict()), precision)
        lines += [f"## {name} at {config.precision}, decoding {config.texts} texts a row of the mesh\n"]
        steps = [decoding(model, layout, config) for layout in layouts]
        lines += [*_table(_DECODING, (row.cells for row in steps)), *_where_it_stops("A step", steps)]
        lines += [f"## {name} at {config.precision}, prompts of {config.cached_tokens:,} tokens\n"]
        prompts = [prompt(model, layout, config) for layout in layouts]
        lines += [*_table(_PROMPTS, (row.cells for row in prompts)), *_where_it_stops("A prompt", prompts)]
        lines += [f"## {name}, a training step of {config.step_tokens:,} tokens\n"]
        lines += [*_table(_TRAINING, (training(model, layout, config) for layout in layouts))]
    with atomic_write(workdir / PAGE) as partial:
        partial.write_text("\n".join(lines).rstrip("\n") + "\n")
    console.print(f"{workdir / PAGE}")


def packed_shapes(config: TransformerConfig, precision: bj.Precision) -> Transformer:
    """The packed model without numbers; embedding and output layer are bfloat16."""
    draw = lambda: random_packed(config, precision, key=jax.random.key(0), embed_bits=None)  # noqa: E731
    return nnx.eval_shape(draw)


def _plan_of(model: Transformer, layout: Layout) -> ShardingPlan | str:
    """How the model is cut; or why it is not, in words."""
    try:
        return plan_shards(model, {"data": layout.data, MODEL: layout.model})
    except ValueError as error:
        return f"refused: {error}"


def _names(layout: Layout) -> tuple[str, str]:
    """The first two columns of a row."""
    return str(layout.data * layout.model), str(layout)


_DECODING = (
    "GPUs",
    "mesh",
    "weights a GPU, GB",
    "cache a GPU, GB",
    "fits",
    "NVLink, KB a token",
    "network, KB a token",
    "step, ms at least: memory",
    "NVLink",
    "network",
)


class Row(NamedTuple):
    """A row of a table.

    Attributes:
      cells: its texts.
      parts: devices that weights are divided over.
      milliseconds: at least, all that the row names one after the other; None where the mesh is refused.
    """

    cells: list[str]
    parts: int
    milliseconds: float | None


def decoding(model: Transformer, layout: Layout, config: ConfigDict) -> Row:
    """A row of the table: what a step, one token of each text, reads and exchanges."""
    shapes, texts = model.config, config.texts
    if isinstance(plan := _plan_of(model, layout), str):
        return Row([*_names(layout), plan, *[""] * (len(_DECODING) - 3)], layout.model, None)
    weights = sum(plan.device_bytes(path, value, shapes) for path, value in _parameters(model))
    of_device = plan.config_of_device(shapes)
    lengths = jax.ShapeDtypeStruct((texts,), jnp.int32)
    cache_shape = (shapes.num_layers, texts, of_device.num_kv_heads, config.cached_tokens, shapes.head_dim)
    bits = None if config.cache_bits == 16 else config.cache_bits
    cache = jax.eval_shape(lambda lengths: KVCache.empty(cache_shape, jnp.bfloat16, bits, lengths), lengths).nbytes
    reductions = (plan.attention + plan.ffn) * shapes.num_layers
    sums = 4 * (texts + 1) * shapes.hidden_size + 8 * texts
    nvlink, network = (reductions * size for size in layout.over_model(sums))
    # The embedding is a table of which a step reads a few rows.
    read = weights - 2 * shapes.vocab_size * shapes.hidden_size + cache
    amounts_of = {"memory": (read, 0), "NVLink": (nvlink, 2 * reductions), "network": (network, 2 * reductions)}
    times = [1e3 * _time(config, link, *amounts) for link, amounts in amounts_of.items()]
    cells = [
        *_names(layout),
        f"{weights / 1e9:.1f}",
        f"{cache / 1e9:.1f}",
        "yes" if weights + cache < config.memory_bytes else "no",
        f"{nvlink / texts / 1e3:,.0f}",
        f"{network / texts / 1e3:,.0f}",
        *map(_shown, times),
    ]
    return Row(cells, layout.model, sum(times))


_PROMPTS = (
    "GPUs",
    "mesh",
    "all-reduced, NVLink, KB a token",
    "network",
    "scattered and gathered, NVLink",
    "network",
    "prompt, ms at least: products",
    "all-reduced, NVLink",
    "network",
    "scattered and gathered, NVLink",
    "network",
)


def prompt(model: Transformer, layout: Layout, config: ConfigDict) -> Row:
    """A row of the table: what reading one prompt exchanges, with both ways of reducing its sums."""
    shapes, tokens = model.config, config.cached_tokens
    if isinstance(plan := _plan_of(model, layout), str):
        return Row([*_names(layout), plan, *[""] * (len(_PROMPTS) - 3)], layout.model, None)
    a_bits = bj.Precision.parse(config.precision).a_bits or 16
    reductions = (plan.attention + plan.ffn) * shapes.num_layers
    operations = 2 * _linear_parameters(shapes) * tokens
    sizes, times = [], [1e3 * operations / layout.model / config.products.operations_per_second]
    for scatters, exchanges in ((False, 2), (True, 3)):
        # Extremes of tokens before the product, and what follows it.
        size = 8 * tokens + reduction_size(tokens, shapes.hidden_size, a_bits, scatters=scatters)
        sent = [reductions * each for each in layout.over_model(size)]
        sizes += [f"{each / tokens / 1e3:,.0f}" for each in sent]
        pairs = zip(("NVLink", "network"), sent, strict=True)
        times += [1e3 * _time(config, link, each, exchanges * reductions) for link, each in pairs]
    products, *_, nvlink, network = times
    return Row([*_names(layout), *sizes, *map(_shown, times)], layout.model, products + nvlink + network)


def _where_it_stops(what: str, rows: list[Row]) -> Iterator[str]:
    """How the time goes with the devices that weights are divided over."""
    by_parts = {row.parts: row.milliseconds for row in rows if row.milliseconds is not None}
    if len(by_parts) < 2:
        return
    best = min(by_parts, key=by_parts.get)
    ordered = [f"{by_parts[parts]:,.1f} ms over {parts} GPUs" for parts in sorted(by_parts)]
    line = f"{what} takes at least {', '.join(ordered)}, one thing after the other; the fewer exchanged bytes count."
    if best < max(by_parts):
        yield f"{line} It stops getting faster at {best} GPUs: more of them serve other texts.\n"
        return
    least = min(by_parts)
    gain, more = by_parts[least] / by_parts[best], best / least
    yield f"{line} {more:g} times the GPUs of {least} make it {gain:.2f} times as fast.\n"


_TRAINING = (
    "GPUs",
    "mesh",
    "state a GPU, GB",
    "fits",
    "sums, NVLink, KB a token",
    "network",
    "gradients, NVLink, GB a step",
    "network",
    "step, s at least: NVLink",
    "network",
)


def training(model: Transformer, layout: Layout, config: ConfigDict) -> list[str]:
    """A row of the table: what a step exchanges; parameters are cut as layers are, moments over data too."""
    shapes = model.config
    whole = 2 * shapes.vocab_size * shapes.hidden_size / (1 if shapes.vocab_size % layout.model else 2)
    cut = _linear_parameters(shapes) + 2 * shapes.vocab_size * shapes.hidden_size - whole
    parameters = whole + cut / layout.model
    tokens = config.step_tokens / layout.data
    reductions = _TRAINING_REDUCTIONS * shapes.num_layers
    sums = [reductions * size for size in layout.over_model(4 * tokens * shapes.hidden_size)]
    gradients = layout.over_data(4 * parameters)
    nvlink, network = (both[0] + both[1] for both in zip(sums, gradients, strict=True))
    state = (_PARAMETER_BYTES + _MOMENT_BYTES / layout.data) * parameters
    return [
        *_names(layout),
        f"{state / 1e9:,.0f}",
        "yes, activations apart" if state < config.memory_bytes else "no",
        *(f"{size / tokens / 1e3:,.0f}" for size in sums),
        *(f"{size / 1e9:,.1f}" for size in gradients),
        _shown(_time(config, "NVLink", nvlink, reductions)),
        _shown(_time(config, "network", network, reductions)),
    ]


def _linear_parameters(config: TransformerConfig) -> float:
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    return float(config.num_layers * config.hidden_size * (heads * config.head_dim + 3 * config.ffn_size))


def _parameters(model: Transformer) -> Iterator[tuple[tuple[Any, ...], Any]]:
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        yield path, variable.get_value()


def _time(config: ConfigDict, link: str, size: float, exchanges: int) -> float:
    """Bytes by the link's rate, and the time of so many exchanges, in seconds; 0 if it carries nothing."""
    rate = config.links[link]
    return size / rate.bytes_per_second + exchanges * rate.seconds if size else 0.0


def _shown(time: float) -> str:
    return f"{time:,.2f}" if time else "-"


def _layout(text: str, per_host: int) -> Layout:
    sizes = text.split("x")
    if len(sizes) != 2 or not all(size.isdecimal() and int(size) for size in sizes):
        raise ValueError(f"config.meshes has {text!r}: write data x model, such as 8x8")
    data, model = map(int, sizes)
    if model % per_host and per_host % model:
        raise ValueError(f"mesh {text}: {model} devices of a model and hosts of {per_host} do not divide each other")
    return Layout(data, model, per_host)


def _rates(config: ConfigDict) -> Iterator[str]:
    yield "| link | GB/s a GPU, one direction | us an exchange | source |\n| --- | ---: | ---: | --- |"
    for link, rate in config.links.items():
        source = rate.source or "**assumed**, not measured"
        yield f"| {link} | {rate.bytes_per_second / 1e9:,.0f} | {1e6 * rate.seconds:.0f} | {source} |"
    operations = f"{config.products.operations_per_second / 1e12:,.0f}e12 operations a second"
    yield f"\nProducts of prompts: {operations}; {config.products.source}."
    yield (
        f"\nHosts of {config.gpus_per_host} GPUs of {config.memory_bytes / 1e9:.0f} GB; {config.cached_tokens:,} "
        f"cached tokens a text at {config.cache_bits} bits. Times are bytes by rate plus exchanges, without overlap.\n"
    )


def _table(heads: tuple[str, ...], rows: Iterator[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |\n|{' ---: |' * len(heads)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def command() -> None:
    """The command line."""
    app.run(main)


if __name__ == "__main__":
    command()
