"""Chat templates and end tokens of models, from every kind of file that can have them."""

from __future__ import annotations

import dataclasses
import json

import pytest

from bipolar_jax.models.chat import END_TOKENS, ChatTemplate
from bipolar_jax.models.checkpoint import load_model, save_model
from bipolar_jax.models.loaders import load_pretrained
from tests.support import tiny_checkpoints
from tests.support.tiny_checkpoints import make, write_gguf, write_huggingface

# Of the form of SmolLM2's and Llama 3's: turns between special tokens, a system message of the model's own.
TEMPLATE = """{{ bos_token }}{% for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}<|turn|>system
Be brief.{{ eos_token }}{% endif %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('no role ' + message['role']) }}
    {%- endif %}<|turn|>{{ message['role'] + '\\n' + message['content'] | trim }}{{ eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}<|turn|>assistant
{% endif %}"""
MESSAGES = [{"role": "user", "content": " Hi there "}]
TEXT = "<|begin|><|turn|>system\nBe brief.<|end|><|turn|>user\nHi there<|end|><|turn|>assistant\n"


def huggingface(folder, **settings):
    write_huggingface(make(), folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def load(form, folder):
    if form == "GGUF":
        return load_pretrained(write_gguf(make(metadata={"tokenizer.chat_template": TEMPLATE}), folder / "m.gguf"))
    if form == "jinja":
        huggingface(folder, chat_template="not this", bos_token="<|begin|>", eos_token={"content": "<|end|>"})
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        return load_pretrained(folder)
    template = [{"name": "tools", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    template = template if form == "named" else TEMPLATE
    loaded = load_pretrained(
        huggingface(folder, chat_template=template, bos_token="<|begin|>", eos_token={"content": "<|end|>"})
    )
    if form == "packed":
        save_model(folder / "m.safetensors", loaded)
        return load_model(folder / "m.safetensors")
    return loaded


@pytest.mark.parametrize("form", ["config", "named", "jinja", "GGUF", "packed"])
def test_conversations_are_written_as_the_model_was_trained(form, tmp_path):
    pretrained = load(form, tmp_path)
    assert pretrained.chat_template.render(MESSAGES) == TEXT
    ids = pretrained.encode_chat(MESSAGES)
    assert ids == pretrained.tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert ids[:2] == [0, 2]  # special tokens, not their letters
    assert ids.count(0) == 1


def test_the_models_own_roles_are_kept_and_others_refused():
    template = ChatTemplate(TEMPLATE, {"bos_token": "", "eos_token": ""})
    roles = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    text = template.render(roles, add_generation_prompt=False)
    assert text == "".join(f"<|turn|>{role['role']}\n{role['role']}" for role in roles)
    with pytest.raises(ValueError, match="chat template refuses the messages: no role narrator"):
        template.render([{"role": "narrator", "content": ""}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__base__ }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% for",
        "{{ messages[0].content.x.y }}",
    ],
)
def test_templates_run_in_a_sandbox_and_fail_in_one_way(source):
    with pytest.raises(ValueError, match="chat template refuses the messages"):
        ChatTemplate(source).render(MESSAGES)


def test_json_is_written_as_transformers_writes_it():
    assert ChatTemplate("{{ tools | tojson }}").render([], tools=[{"a": "<é>"}]) == '[{"a": "<é>"}]'


def test_a_template_may_leave_loops_and_ask_for_the_date():
    source = "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}"
    assert ChatTemplate(source).render([*MESSAGES, *MESSAGES]) == " Hi there "
    assert len(ChatTemplate("{{ strftime_now('%Y') }}").render([])) == 4


def test_without_a_template_conversations_are_refused(tmp_path):
    pretrained = load_pretrained(write_huggingface(make(), tmp_path))
    assert pretrained.chat_template is None
    with pytest.raises(ValueError, match="the model has no chat template"):
        pretrained.encode_chat(MESSAGES)


@pytest.mark.parametrize("value", [3, {"a": 1}])
def test_templates_of_another_kind_are_refused(tmp_path, value):
    with pytest.raises(ValueError, match="tokenizer_config.json: chat_template is"):
        load_pretrained(huggingface(tmp_path, chat_template=value))


@pytest.mark.parametrize("fields", [None, "x", {"source": 3}, {"source": "", "special_tokens": {"bos_token": 1}}])
def test_a_packed_template_of_another_form_is_refused(fields):
    with pytest.raises(ValueError, match="a chat template"):
        ChatTemplate.from_dict(fields)
    assert ChatTemplate.from_dict(dataclasses.asdict(ChatTemplate("x", {"a": "b"}))) == ChatTemplate("x", {"a": "b"})


@pytest.mark.parametrize("add_bos", [False, True])
def test_a_text_has_one_bos_token_at_most(tmp_path, add_bos):
    tiny = make(metadata={"tokenizer.ggml.add_bos_token": add_bos})
    pretrained = load_pretrained(write_gguf(tiny, tmp_path / "m.gguf"))
    plain = pretrained.tokenizer.encode("the fox", add_special_tokens=False).ids
    assert pretrained.encode("the fox") == [0] * add_bos + plain
    assert pretrained.encode("<|begin|>the fox") == [0, *plain]
    assert pretrained.encode("<|begin|><|begin|>the fox") == [0, *plain]


def test_text_that_is_no_unicode_is_refused(tmp_path):
    pretrained = load_pretrained(write_huggingface(make(), tmp_path))
    with pytest.raises(ValueError, match="not valid Unicode"):
        pretrained.encode(b"caf\xe9".decode("utf-8", "surrogateescape"))


@pytest.mark.parametrize("form", ["Hugging Face", "GGUF"])
@pytest.mark.parametrize(("names", "expected"), [(("<|im_end|>",), [0]), (("<|eot_id|>", "</s>"), [0, 1]), ((), [])])
def test_end_tokens_are_known_by_name_where_the_file_names_none(tmp_path, monkeypatch, form, names, expected):
    renamed = (*names, "<|a|>", "<|b|>", "<|c|>")[:3]
    monkeypatch.setattr(tiny_checkpoints, "SPECIAL_TOKENS", renamed)
    tiny_checkpoints.make_tokenizer.cache_clear()
    try:
        keys = {f"tokenizer.ggml.{name}_token_id": None for name in ("eos", "eot")}
        tiny = make(config={"eos_token_id": None}, metadata=keys)
        if form == "GGUF":
            pretrained = load_pretrained(write_gguf(tiny, tmp_path / "m.gguf"))
        else:
            pretrained = load_pretrained(write_huggingface(tiny, tmp_path / "m"))
    finally:
        tiny_checkpoints.make_tokenizer.cache_clear()
    assert sorted(pretrained.model.config.eos_ids) == expected
    assert set(names) <= set(END_TOKENS)


def test_end_tokens_that_the_file_names_are_the_only_ones(tmp_path):
    assert load_pretrained(write_huggingface(make(), tmp_path)).model.config.eos_ids == (1, 2)
