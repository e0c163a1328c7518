"""Times the same model in other libraries, if they are installed.

- transformers: `LlamaForCausalLM` with random bf16 weights. Its `generate` with a static cache compiles the decode step
  into CUDA graphs by torch.compile.

Times are wall times of `generate`. Prefill is the time for one new token; a decode step is the time that each further
token adds.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

from bipolar_jax.models.config import TransformerConfig
from bipolar_jax.models.exporters.huggingface_config import model_type
from experiments.bench.language_models.report import line
from experiments.bench.language_models.workload import Workload
from experiments.support.progress import console
from experiments.support.timing import Timing, one_line

_WARM_UPS = 3  # torch.compile: one eager run, one that compiles, one that records the graph


def measure_peers(
    peers: list[str],
    model_config: TransformerConfig,
    workloads: list[Workload],
    results: dict[str, Any],
    iterations: int,
) -> None:
    """Sets results[peer]["workloads"][workload.name] to figures, or to {"error": reason}; skips those with figures."""
    for peer in peers:
        rows = results.setdefault(peer, {"workloads": {}})["workloads"]
        todo = [workload for workload in workloads if "decode" not in rows.get(workload.name, {})]
        missing = [name for name in ("torch", peer) if importlib.util.find_spec(name) is None]
        generate = None
        for workload in todo:
            try:
                if missing:
                    raise ModuleNotFoundError(f"{missing[0]} is not installed")
                generate = generate or PEERS[peer](model_config)
                rows[workload.name] = _measure(generate, workload, iterations)
            except Exception as error:
                rows[workload.name] = {"error": one_line(error)}
            console.print(f"{peer} {workload.name}: {line(rows[workload.name])}")


def _measure(generate: Callable[[Workload, int], None], workload: Workload, iterations: int) -> dict[str, Any]:
    import torch

    torch.cuda.reset_peak_memory_stats()
    first = _wall_microseconds(lambda: generate(workload, 1), iterations)
    whole = _wall_microseconds(lambda: generate(workload, workload.new_tokens + 1), iterations)
    steps = [(microseconds - statistics.median(first)) / workload.new_tokens for microseconds in whole]
    prefill, decode = Timing.of(first, "wall"), Timing.of(steps, "wall")
    return {
        "prefill": prefill.to_json() | {"tokens_per_second": 1e6 * workload.batch * workload.prompt / prefill.median},
        "decode": decode.to_json() | {"tokens_per_second": 1e6 * workload.batch / decode.median},
        "memory": {"peak_bytes": torch.cuda.max_memory_allocated()},
    }


def _wall_microseconds(call: Callable[[], None], iterations: int) -> list[float]:
    import torch

    microseconds = []
    for _ in range(_WARM_UPS + iterations):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        microseconds.append(1e6 * (time.perf_counter() - started))
    return microseconds[_WARM_UPS:]


def _transformers(config: TransformerConfig) -> Callable[[Workload, int], None]:
    """A function (workload, new_tokens) that generates from arbitrary prompts.

    Raises:
      ValueError: the model is not a Llama.
      RuntimeError: torch sees no GPU.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if (kind := model_type(config)) != "llama":
        raise ValueError(f"transformers is only built as a Llama, this model is of the kind {kind}")
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU")
    llama = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.context_length,
        tie_word_embeddings=config.tie_embeddings,
        rms_norm_eps=config.norm_eps,
        # Without EOS, so that all tokens are generated.
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = LlamaForCausalLM(llama).eval()
    finally:
        torch.set_default_dtype(before)

    @torch.inference_mode()
    def generate(workload: Workload, new_tokens: int) -> None:
        ids = torch.arange(workload.batch * workload.prompt, device="cuda").reshape(workload.batch, workload.prompt)
        model.generate(
            ids % config.vocab_size,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            cache_implementation="static",
        )

    return generate


PEERS: dict[str, Callable[[TransformerConfig], Callable[[Workload, int], None]]] = {"transformers": _transformers}
