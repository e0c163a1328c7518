"""experiments/generate.py and sample_text.py on tiny models: what they write, and what stops them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from bipolar_jax.models.loaders import load_pretrained
from configs import generate as generate_config
from configs import sample_text as sample_text_config
from experiments import generate, sample_text
from experiments.support import workdir
from tests.support.tiny_checkpoints import hf_config, make, make_tokenizer, write_huggingface

pytestmark = pytest.mark.usefixtures("compiled_programs")
TEMPLATE = "{% for m in messages %}<|turn|>{{ m.role }}: {{ m.content }}<|end|>{% endfor %}<|turn|>"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_huggingface(make(), tmp_path_factory.mktemp("model"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """One token's embedding overflows in the first norm, and its logits are NaN."""
    tiny = make(tied=False)
    tiny.weights["model.norm.weight"][:] = 3e38
    return write_huggingface(tiny, tmp_path_factory.mktemp("damaged"))


def written(model, folder, **settings) -> dict:
    config = generate_config.get_config()
    config.update({"model": str(model), "max_new_tokens": 8, **settings})
    generate.main(config, folder)
    return json.loads((folder / workdir.RESULT_NAME).read_text())


@pytest.mark.parametrize("prompt", ["the quick \ufffd", "the quick ", "東京"])
def test_the_prompt_is_printed_once(model, tmp_path, capsys, prompt):
    result = written(model, tmp_path, prompt=prompt)
    printed = capsys.readouterr().out
    assert prompt + result["text"] in printed
    assert printed.count(prompt) == 1
    assert result["text"][: len(prompt)] != prompt


def test_integer_groups_are_made_of_packed_layers_only(model, tmp_path):
    with pytest.raises(ValueError, match="the model has no packed layers: quantize it first"):
        written(model, tmp_path, prompt="the", integer_groups=True)


def test_a_user_message_and_a_system_message_go_through_the_template(model, tmp_path, capsys):
    result = written(model, tmp_path, prompt="the time?", chat=True, system="Be brief.")
    text = "<|turn|>system: Be brief.<|end|><|turn|>user: the time?<|end|><|turn|>"
    ids = load_pretrained(model).tokenizer.encode(text, add_special_tokens=False).ids
    assert result["prompt_tokens"] == len(ids)
    assert "the time?" not in capsys.readouterr().out


def test_settings_of_sampling_reach_the_model(model, tmp_path):
    free = written(model, tmp_path, temperature=1.0, repetition_penalty=1.2, top_k=50, cache_bits=8)
    stop = free["text"][2:4]
    ended = written(model, tmp_path, temperature=1.0, repetition_penalty=1.2, top_k=50, cache_bits=8, stop=stop)
    assert ended["text"] == free["text"][: free["text"].index(stop)]
    assert ended["tokens"] == free["tokens"][: len(ended["tokens"])]


def test_logits_that_are_not_finite_stop_the_programs(damaged, tmp_path):
    with pytest.raises(ValueError, match="the logits at step 0 of prompt 0 are NaN or infinite"):
        written(damaged, tmp_path)
    config = sample_text_config.get_config()
    config.update({"model": str(damaged), "texts": 2, "batch_size": 2, "length": 8, "prefix": ""})
    with pytest.raises(ValueError, match="the logits at step 0 of prompt 0 are NaN or infinite"):
        sample_text.main(config, tmp_path)
    assert not (tmp_path / sample_text.TEXT_NAME).exists()


def test_texts_are_sampled(model, tmp_path):
    config = sample_text_config.get_config()
    config.update({"model": str(model), "texts": 3, "batch_size": 2, "length": 8, "prefix": "<|begin|>"})
    sample_text.main(config, tmp_path)
    assert json.loads((tmp_path / workdir.RESULT_NAME).read_text())["texts"] == 4
    assert (tmp_path / sample_text.TEXT_NAME).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("prompt", "encoding", "status", "message"),
    [(b"caf\xe9", "utf-8", 1, "error: the text is not valid Unicode"), ("東京".encode(), "ascii", 0, "")],
)
def test_bytes_and_terminals_of_other_encodings_end_in_a_line_or_a_text(model, prompt, encoding, status, message):
    flags = [b"--config=configs/generate.py", b"--config.max_new_tokens=4", b"--config.prompt=" + prompt]
    done = subprocess.run(
        [os.fsencode(sys.executable), b"-m", b"experiments.generate", *flags, b"--config.model=" + os.fsencode(model)],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    lines = done.stderr.decode().strip().splitlines()
    assert done.returncode == status, lines
    if message:
        assert lines[-1].startswith(message)


def test_ids_of_byte_fallback_tokenizers_are_written(tmp_path):
    """Random bytes of a Llama-2-like tokenizer, of which most are invalid."""
    from tests.models.inference.test_text_stream import byte_fallback_tokenizer

    tokenizer = byte_fallback_tokenizer()
    size = tokenizer.get_vocab_size()
    assert size < make_tokenizer("smollm").get_vocab_size()
    tiny = make()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tiny.weights[name] = np.ascontiguousarray(tiny.weights[name][:size])
    folder = write_huggingface(tiny, tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(hf_config(tiny) | {"vocab_size": size, "eos_token_id": 2}))
    tokenizer.save(str(folder / "tokenizer.json"))
    for seed in range(3):
        result = written(folder, tmp_path, prompt="a b", temperature=1.0, seed=seed, max_new_tokens=100)
        assert result["tokens"]
