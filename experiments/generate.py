"""Generates text from a prompt and streams it to the terminal.

    python -m experiments.generate --config=configs/generate.py --config.model=PATH --config.prompt=TEXT

The model is a packed checkpoint, a GGUF file or a Hugging Face directory. With --workdir the
text and the speed are also written to result.json.
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

from .support import app
from .support.progress import console, progress_bar
from .support.sources import load_model_source
from .support.workdir import RESULT_NAME, environment, write_json


def main(config: ConfigDict, workdir: Path | None) -> None:
    """Runs the experiment; see the module docstring."""
    sampling = Sampling(config.temperature, config.top_k or None, config.top_p)
    precision = bj.Precision.parse(config.precision, config.calibration) if config.precision else None
    pretrained = load_model_source(config.model, config.bits or None)
    model, tokenizer = pretrained.model, pretrained.tokenizer
    if precision is not None:
        with progress_bar(f"quantizing to {precision}"):
            model = jax.block_until_ready(bj.quantize_model(model, [("^layers/", precision)]))
    prompt = tokenizer.encode(config.prompt).ids
    tokens, text, seconds = [], "", []
    decoder = _text_stream(prompt)
    sys.stdout.write(config.prompt)
    started = time.perf_counter()
    for step in stream(model, [prompt], config.max_new_tokens, sampling, jax.random.key(config.seed)):
        seconds.append(time.perf_counter() - started)
        tokens.append(int(step[0]))
        new_text = decoder.step(tokenizer, tokens[-1]) or ""
        text += new_text
        sys.stdout.write(new_text)
        sys.stdout.flush()
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


def _text_stream(prompt: list[int]):
    """Decodes ids one by one, and holds back bytes until they complete a character."""
    from tokenizers.decoders import DecodeStream

    return DecodeStream(ids=prompt, skip_special_tokens=True)


def command() -> None:
    """The command line."""
    app.run(main, workdir_required=False, example="generate")


if __name__ == "__main__":
    command()
