"""The real SmolLM2-135M-Instruct: what other implementations compute from the same file, we compute."""

from __future__ import annotations

import hashlib

import jax
import numpy as np
import pytest

import bipolar_jax as bj
from bipolar_jax.models.inference.perplexity import perplexity
from bipolar_jax.models.loaders import load_gguf
from experiments.support.fetch import fetch_smollm2
from experiments.support.sources import load_text_source

PROMPT = "The quick brown fox jumps over the lazy dog. In 1984,"
PROMPT_IDS = [504, 2365, 6354, 16438, 27003, 690, 260, 23790, 2767, 30, 533, 216, 33, 41, 40, 36, 28]

# Logits of every position of the prompt, from Hugging Face transformers 5.23.0 on torch 2.13.0 (CPU, float32), with
# the file dequantized to float32. llama.cpp on the same file agrees with them to 1e-4. Rows are positions.
SPREAD_IDS = [17, 4930, 9843, 14757, 19670, 24584, 29497, 34410, 39324, 44237, 49151]
TOP_IDS = """
   29    28   198    79   506
  970   284    29   381  3564
16438  5670 48355 25870  8455
  351   284    28   365  3365
  690   614   767 24769  1130
  253   260  6354 23790 13549
 4411 18906 23790 14553  4463
 2767 16438  4626  8180 23790
  198    30    28   365    18
  198   378   669   216   533
  451   550   260   253   338
   33    34    35    37    36
   41    40    39    32    37
   41    40    39   373    34
   32    36    37    41    39
   28   260   253   665   357
  260   253   645   357   339
"""
# For each position two lines: the logits at TOP_IDS, then those at SPREAD_IDS.
LOGITS = """
27.3534 25.5656 25.0673 24.9147 24.6982
    16.7040 18.3963 12.6897 16.6091 11.9039 9.6654 14.4050 13.4709 8.2898 11.8049 5.8709
26.1422 26.0813 25.9206 25.0176 24.9474
    19.4549 18.2681 11.1193 19.0027 13.1754 9.3240 11.5929 5.7169 8.8378 10.2558 5.4139
11.1534 10.2388 9.8389 9.4594 8.8344
    1.5500 -0.1520 -4.3145 -11.8453 0.1696 -6.2798 -7.0721 -5.5471 -11.0177 -11.8820 -11.1866
18.1553 15.7146 15.4877 15.1683 15.0078
    13.4570 9.9169 -1.1416 -0.8246 -1.1504 -1.7159 -2.6794 -3.8900 -3.4065 -3.4132 -7.7888
23.0743 15.3127 15.0725 15.0519 15.0336
    4.7432 1.9434 -6.9861 -9.5319 -2.6222 -6.0664 3.9786 1.7507 -3.2982 -3.7794 -6.0015
20.3720 17.7880 16.8258 15.1431 13.0286
    3.9677 -0.2688 0.5175 -3.5881 -0.8223 -5.3350 -4.5446 2.9232 -6.4415 -8.3616 -12.5573
9.3128 8.6648 8.5142 8.2201 7.5958
    -1.9422 -5.6019 -5.5663 -11.4733 -8.8817 -0.7576 -7.9730 -9.6276 -4.1805 -10.6850 -17.5463
14.6800 10.5024 10.2230 10.1430 9.7310
    -0.3448 -4.5522 -8.6024 -10.4400 -10.2339 -5.0903 -8.2664 -9.0555 -10.3093 -7.4812 -10.8766
26.3829 25.9409 24.9800 24.3221 24.3023
    24.1785 14.4123 11.9291 12.1662 9.9959 11.4379 8.1881 7.2952 7.3674 9.9350 5.3911
21.3155 19.1675 19.1561 18.8850 18.4121
    10.0992 4.1923 5.7946 6.0395 2.3094 3.0010 2.3422 5.3796 5.1822 5.0067 4.8860
17.9453 17.7716 17.6228 16.8743 16.7784
    8.4575 3.5109 8.4526 4.6296 1.1884 1.8855 0.5196 6.1835 1.9059 2.7779 2.6715
29.2976 28.8394 26.3646 25.9603 25.5390
    15.7386 12.7922 12.2241 13.2869 8.4235 6.6740 5.9237 9.5470 7.2311 8.2626 7.3732
31.0426 29.4258 28.3303 28.2261 27.9878
    17.8248 15.6799 13.3107 11.5486 10.4308 11.1781 8.9906 12.8223 6.3189 11.4122 8.8459
32.7357 32.3503 32.0378 31.8697 31.5869
    23.5453 14.6747 18.7921 15.3908 14.9643 12.9747 13.4700 17.4396 13.9534 14.1904 10.3931
33.1791 32.7276 32.4456 32.2379 31.9993
    19.2672 13.9206 18.0376 14.6839 14.3275 14.9484 11.8876 16.6440 13.5902 12.1356 11.3699
11.2232 8.8166 8.2074 7.3221 7.3057
    1.7822 -6.8104 -0.8145 -7.5081 -8.2760 -10.4336 -10.1755 -2.4422 -9.8082 -4.1858 -11.2579
7.9601 7.0595 6.8260 6.6905 6.2230
    -4.6871 -7.4746 -2.5442 -8.4390 -9.3154 -9.5437 -10.3828 -3.0758 -11.0883 -5.2477 -11.4778
"""
# Euclidean norm of the hidden state after the final norm, by position, from the same source.
HIDDEN_NORMS = """
46.9444 50.9040 47.9449 46.2758 44.0030 43.4921 46.3263 45.8621 48.7575
49.1874 41.2599 47.5971 47.3336 48.7593 49.0427 42.6748 42.5783
"""
LOGITS_TOLERANCE = 1e-3

# pydoc's help topics of CPython 3.12.1, joined by blank lines in the order of their names; token ids without BOS.
TOPICS_SHA256 = "3ae592730a57a4148564a54edefaf307b12237819089b0517c79c68c4cb9b123"
TOPICS_TOKENS = 118466
TOPICS_WINDOWS = 20 * 512  # the ids that the digest covers: 20 windows of 512
# Of the first two windows, each token but the first; from transformers 5.24.0 on torch 2.13.0 in float32.
TOPICS_PERPLEXITY = 14.243460224499369
FIRST_WINDOWS_PERPLEXITY = 17.539693999369035
TOPICS_IDS_SHA256 = "69853918533eda82d660f368b2925668a087dea5bdb10cb5e5547ca1001ba775"


def table(text: str, dtype=float) -> np.ndarray:
    """One row for each position of the prompt."""
    return np.array(text.split(), dtype).reshape(len(PROMPT_IDS), -1)


@pytest.fixture(scope="module")
def smollm2():
    return load_gguf(fetch_smollm2(progress=False))


@pytest.fixture(scope="module")
def hidden(smollm2):
    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda model, ids: model.hidden_states(ids))(smollm2.model, np.array([PROMPT_IDS]))


def test_config(smollm2):
    config = smollm2.model.config
    assert (config.num_layers, config.hidden_size, config.ffn_size) == (30, 576, 1536)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert (config.vocab_size, config.context_length, config.rope_theta) == (49152, 8192, 100000.0)
    assert config.norm_eps == pytest.approx(1e-5)
    assert config.tie_embeddings
    assert (config.bos_id, config.eos_ids) == (1, (2,))


def test_prompt_ids(smollm2):
    assert smollm2.tokenizer.encode(PROMPT).ids == PROMPT_IDS
    assert smollm2.tokenizer.decode(PROMPT_IDS) == PROMPT


def test_chat_tokens_are_single_ids(smollm2):
    ids = smollm2.tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n").ids
    assert (ids[0], ids.count(1), ids.count(2)) == (1, 1, 1)


def test_hidden_states(hidden):
    norms = np.linalg.norm(np.asarray(hidden[0]), axis=-1)
    np.testing.assert_allclose(norms, table(HIDDEN_NORMS)[:, 0], atol=1e-3)


def test_logits(smollm2, hidden):
    """A wrong row order of q and k alone moves these by 6.4."""
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(smollm2.model.logits(hidden)[0])
    top, expected = table(TOP_IDS, int), table(LOGITS)
    found = np.concatenate([np.take_along_axis(logits, top, axis=1), logits[:, SPREAD_IDS]], axis=1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=LOGITS_TOLERANCE)
    np.testing.assert_array_equal(logits.argmax(axis=1), top[:, 0])


@pytest.fixture(scope="module")
def topics_ids(smollm2):
    text = load_text_source("pydoc_topics")
    digest = hashlib.sha256(text.encode()).hexdigest()
    if digest != TOPICS_SHA256:
        pytest.skip(f"this Python's help topics are not those of 3.12.1: sha256 {digest}")
    return smollm2.tokenizer.encode(text).ids


def test_token_ids_of_the_help_topics(topics_ids):
    used = np.array(topics_ids[:TOPICS_WINDOWS], "<i4")
    assert len(topics_ids) == TOPICS_TOKENS
    assert hashlib.sha256(used.tobytes()).hexdigest() == TOPICS_IDS_SHA256


@pytest.fixture(scope="module")
def baseline(smollm2, topics_ids):
    return perplexity(smollm2.model, topics_ids, windows=2).perplexity


def test_perplexity(baseline):
    assert baseline == pytest.approx(TOPICS_PERPLEXITY, rel=1e-3)


@pytest.mark.covered("`make demo`, which prints it")
def test_w8a8_costs_less_than_3_percent(smollm2, topics_ids):
    precision = bj.Precision.parse("W8A8", "minmax")
    quantized = bj.quantize_model(smollm2.model, [("^layers/", precision)])
    found = perplexity(quantized, topics_ids, windows=1).perplexity
    assert found == pytest.approx(FIRST_WINDOWS_PERPLEXITY, rel=0.03)
    assert found != pytest.approx(FIRST_WINDOWS_PERPLEXITY, rel=1e-4)  # it was really quantized
