"""Generates text from a prompt and streams it to the terminal.

    python -m experiments.generate --config=configs/generate.py --config.model=PATH --config.prompt=TEXT

The model is a packed checkpoint, a GGUF file or a Hugging Face directory. With `chat` the prompt is a user's message
for the model's chat template. With --workdir the text and the speed are also written to result.json. With
--config.mesh.model=2 a packed model is cut over two devices.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

import bipolar_jax as bj
from bipolar_jax.models.inference.generation import stream
from bipolar_jax.models.inference.sampling import Sampling
from bipolar_jax.models.inference.text_stream import TextStream
from bipolar_jax.models.inference.xla_flags import enable_command_buffers
from bipolar_jax.models.pretrained import PretrainedModel

from .distributed.mesh import cuts_of, mesh_of, on_mesh
from .distributed.processes import is_first
from .support import app
from .support.progress import console, progress_bar
from .support.sources import load_model_source
from .support.workdir import RESULT_NAME, environment, write_json


def main(config: ConfigDict, workdir: Path | None) -> None:
    """Runs the experiment; see the module docstring."""
    enable_command_buffers()
    mesh = mesh_of(config)
    sampling = Sampling(config.temperature, config.top_k or None, config.top_p, config.repetition_penalty)
    precision = bj.Precision.parse(config.precision, config.calibration) if config.precision else None
    pretrained = load_model_source(config.model, config.bits or None, config.activations or None)
    prompt = _encode(pretrained, config)
    if precision is not None:
        with progress_bar(f"quantizing to {precision}"):
            model = jax.block_until_ready(bj.quantize_model(pretrained.model, [("^layers/", precision)]))
        pretrained = pretrained.with_model(model)
    if config.integer_groups:
        with progress_bar("making integers of the scales of groups"):
            model, report = bj.nn.with_integer_groups(pretrained.model)
        console.print(str(report), style="dim", soft_wrap=True, highlight=False)
        pretrained = pretrained.with_model(model)
    pretrained = on_mesh(pretrained, mesh, cuts_of(config), config.dtype or None)
    stop = [config.stop] if config.stop else []
    end_ids = pretrained.model.config.eos_ids
    tokens, text, seconds = [], "", []
    decoder = TextStream(pretrained.tokenizer, prompt, stop)
    key = jax.random.key(config.seed)
    steps = stream(pretrained, [prompt], config.max_new_tokens, sampling, key, config.cache_bits or None, stop=stop)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # the model may write what the terminal's encoding lacks
    if not config.chat:
        _show(config.prompt)
    started = time.perf_counter()
    for step in steps:
        seconds.append(time.perf_counter() - started)
        tokens.append(int(step[0]))
        if tokens[-1] not in end_ids:
            text += _show(decoder.push(tokens[-1]))
    text += _show(decoder.flush())
    console.print()
    rate = (len(tokens) - 2) / (seconds[-1] - seconds[1]) if len(tokens) > 2 else None
    if rate is not None:
        console.print(f"{len(tokens)} tokens, {rate:.1f} tokens/s after compilation", style="dim")
    if workdir is not None:
        result = {
            "settings": config.to_dict(),
            "environment": environment(),
            "prompt_tokens": len(prompt),
            "tokens": tokens,
            "text": text,
            "tokens_per_second": rate,
        }
        write_json(workdir / RESULT_NAME, result)


def _encode(pretrained: PretrainedModel, config: ConfigDict) -> list[int]:
    """Token ids of the prompt, or of the conversation that it begins."""
    if not config.chat:
        return pretrained.encode(config.prompt)
    system = [{"role": "system", "content": config.system}] if config.system else []
    return pretrained.encode_chat([*system, {"role": "user", "content": config.prompt}])


def _show(text: str) -> str:
    if not is_first():
        return text
    sys.stdout.write(text)
    sys.stdout.flush()
    return text


def command() -> None:
    """The command line."""
    app.run(main, workdir_required=False, example="generate", several_processes=True)


if __name__ == "__main__":
    command()
