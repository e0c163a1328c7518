"""Texts and conversations as prompts: the text of the tokens that their ids give, streamed or whole."""

from __future__ import annotations

import numpy as np
import pytest

from bipolar_jax.models.chat import ChatTemplate
from bipolar_jax.models.inference.generation import Completion, generate, stream
from bipolar_jax.models.inference.sampling import Sampling
from bipolar_jax.models.loaders import load_pretrained
from bipolar_jax.models.pretrained import PretrainedModel
from tests.support.tiny_checkpoints import make, write_huggingface

TEXTS = ["the quick \ufffd", "In 1984 there"]
TEMPLATE = ChatTemplate("{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}<|turn|>")
CHAT = [{"role": "user", "content": "the time?"}]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> PretrainedModel:
    """Texts of these random weights go on to the limit."""
    loaded = load_pretrained(write_huggingface(make(config={"eos_token_id": []}), tmp_path_factory.mktemp("model")))
    return PretrainedModel(loaded.model, loaded.tokenizer, TEMPLATE)


@pytest.fixture(scope="module")
def written(pretrained) -> list[Completion]:
    return generate(pretrained, TEXTS, 20, logprobs=True)


def test_texts_are_encoded_and_decoded(pretrained, written):
    ids = [pretrained.encode(text) for text in TEXTS]
    assert [text.tokens for text in written] == generate(pretrained.model, ids, 20)
    assert generate(pretrained, ids, 20) == [text.tokens for text in written]
    for text, prompt, prompt_ids in zip(written, TEXTS, ids, strict=True):
        assert prompt + text.text == pretrained.tokenizer.decode(prompt_ids + text.tokens)
    assert generate(pretrained, TEXTS, 20) == [text.text for text in written]
    assert generate(pretrained, TEXTS[1], 20) == written[1].text
    assert generate(pretrained, TEXTS[1], 20, logprobs=True) == generate(pretrained, TEXTS[1:], 20, logprobs=True)[0]


def test_streamed_texts_are_the_whole_ones(pretrained, written):
    steps = list(stream(pretrained, TEXTS, 20))
    assert ["".join(column) for column in zip(*steps, strict=True)] == [text.text for text in written]
    assert "".join(stream(pretrained, TEXTS[1], 20)) == written[1].text
    assert len(steps) == 20


def test_a_conversation_is_a_prompt(pretrained):
    ids = pretrained.encode_chat(CHAT)
    (expected,) = generate(pretrained, [ids], 8, logprobs=True)
    text = generate(pretrained, CHAT, 8)
    assert generate(pretrained, [CHAT], 8) == [text] == generate(pretrained, [CHAT, "a"], 8)[:1]
    assert text == "".join(stream(pretrained, CHAT, 8))
    assert pretrained.tokenizer.decode(expected.tokens).strip("\ufffd") in text


def test_a_stop_string_ends_a_text_before_it(pretrained, written):
    stop = written[0].text[6:8]
    expected = written[0].text[: written[0].text.index(stop)]
    found = generate(pretrained, TEXTS, 20, stop=[stop, "never"], logprobs=True)
    assert (found[0].text, found[0].finish) == (expected, "stop")
    assert len(found[0].tokens) == len(found[0].logprobs) < 20
    assert found[0].tokens == written[0].tokens[: len(found[0].tokens)]
    if stop not in written[1].text:
        assert found[1].tokens == written[1].tokens
    assert "".join(stream(pretrained, TEXTS[0], 20, stop=stop)) == expected
    ids = [pretrained.encode(text) for text in TEXTS]
    assert generate(pretrained, ids, 20, stop=stop)[0] == found[0].tokens
    rows = np.stack(list(stream(pretrained, ids, 20, stop=stop)))[:, 0]
    assert [token for token in rows.tolist() if token >= 0] == found[0].tokens


def test_an_end_token_is_no_part_of_the_text(pretrained, written):
    end = written[0].tokens[5]
    (found,) = generate(pretrained, TEXTS[:1], 20, end_ids=[end], logprobs=True)
    assert found.finish == "end"
    assert found.tokens == written[0].tokens[: written[0].tokens.index(end) + 1]
    assert written[0].text.startswith(found.text)
    texts, logprobs = zip(*stream(pretrained, TEXTS[0], 20, end_ids=[end], logprobs=True), strict=True)
    assert "".join(texts) == found.text
    assert list(logprobs) == found.logprobs
    *_, (new, logprobs) = stream(pretrained, TEXTS, 20, end_ids=[end], logprobs=True)
    assert (new[0], np.isnan(logprobs).tolist()) == ("", [True, False])
    assert "".join(stream(pretrained, TEXTS[0], 20, end_ids=[end])) == found.text


def test_a_temperature_alone_samples(pretrained):
    texts = {generate(pretrained, TEXTS[1], 10, temperature=1.5) for _ in range(3)}
    assert len(texts) > 1
    replaced = Sampling(0.5, top_k=7)
    with pytest.raises(ValueError, match="temperature must be"):
        generate(pretrained, TEXTS[1], 10, replaced, temperature=-1)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["a", [1, 2]], {}, "prompts must be a list of lists of token ids, or texts"),
        ([], {}, "no prompts"),
        ("", {}, "prompt 0 is empty"),
        (["a"], {"stop": [""]}, "stop must be strings that are not empty, which every text contains, got"),
        (["a"], {"stop": [7]}, r"stop must be strings that are not empty.* got \(7,\)"),
        ({"role": "user", "content": "a"}, {}, "prompts must be a text, a conversation .a list of messages. or a list"),
        ([3, 4], {}, "prompts must be a list of lists of token ids"),
        (["a" * 600], {}, "exceed the model's context"),
    ],
)
def test_impossible_requests_are_refused(pretrained, prompts, options, message):
    for write in (generate, stream):
        with pytest.raises(ValueError, match=message):
            write(pretrained, prompts, 4, **options)


def test_a_model_by_itself_takes_ids(pretrained):
    with pytest.raises(ValueError, match="a Transformer has no tokenizer: pass the PretrainedModel"):
        generate(pretrained.model, "a", 4)
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        generate(pretrained.model, [[1]], 4, stop="a")
