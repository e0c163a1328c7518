"""lm-evaluation-harness asks our model: its own code runs a task that is made here, without a network."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed (50 packages): pip install -e '.[eval]'")
from bipolar_jax.models.inference.continuations import score_continuations
from bipolar_jax.models.inference.generation import generate
from bipolar_jax.models.loaders import load_pretrained
from experiments.evaluation.harness import HarnessModel, check_tasks, run_tasks
from tests.support import tiny_checkpoints

# The harness and what it imports warn of their own affairs.
pytestmark = pytest.mark.filterwarnings("ignore")

DOCUMENTS = [
    {"question": "the quick brown", "choices": [" fox", " dog and the lazy dog"], "answer": 0},
    {"question": "it's not the first", "choices": [" time", " jump"], "answer": 1},
    {"question": "In 1984 there were", "choices": [" 365 days", " hello"], "answer": 0},
]


class Request:
    def __init__(self, *args):
        self.args = args


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return load_pretrained(
        tiny_checkpoints.write_huggingface(tiny_checkpoints.make(), tmp_path_factory.mktemp("model"))
    )


def test_a_task_has_the_accuracy_of_our_own_likelihoods(pretrained, tmp_path):
    from lm_eval.tasks import TaskManager

    path = tmp_path / "documents.jsonl"
    path.write_text("\n".join(map(json.dumps, DOCUMENTS)))
    (tmp_path / "ours.yaml").write_text(
        "task: ours\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {path}\n  cache_dir: {tmp_path / 'cache'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\n"
        "doc_to_choice: choices\ndoc_to_target: answer\ntarget_delimiter: ''\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    check_tasks(["ours"], manager)
    with pytest.raises(ValueError, match="config.tasks names theirs"):
        check_tasks(["theirs"], manager)
    found = run_tasks(pretrained, ["ours"], manager=manager)["ours"]
    right = []
    for document in DOCUMENTS:
        question = pretrained.encode(document["question"])
        pairs = [(question, pretrained.encode(document["question"] + c)[len(question) :]) for c in document["choices"]]
        logprobs = [each.logprob for each in score_continuations(pretrained.model, pairs)]
        right.append(int(np.argmax(logprobs)) == document["answer"])
    assert found["acc,none"] == pytest.approx(np.mean(right))


def test_likelihoods_of_whole_texts_go_on_beyond_the_context(pretrained):
    model = HarnessModel(pretrained)
    text = "the quick brown fox jumps over the lazy dog " * 12
    ids = [model.prefix_token_id, *model.tok_encode(text, add_special_tokens=False)]
    assert len(ids) > model.max_length + 1, "more than one window"
    (found,) = model.loglikelihood_rolling([Request(text)])
    cuts = range(0, len(ids) - 1, model.max_length)
    pairs = [(ids[i : i + 1], ids[i + 1 : i + 1 + model.max_length]) for i in cuts]
    assert sum(len(continuation) for _, continuation in pairs) == len(ids) - 1
    assert found == pytest.approx(sum(each.logprob for each in score_continuations(pretrained.model, pairs)))


def test_long_contexts_lose_their_beginning(pretrained):
    model = HarnessModel(pretrained)
    long = [5] * 50 + list(range(10, 10 + model.max_length))
    ((logprob, _),) = model._loglikelihood_tokens([(None, long, [7])])
    (kept,) = score_continuations(pretrained.model, [(long[-model.max_length :], [7])])
    assert logprob == pytest.approx(kept.logprob)


def test_texts_are_generated_up_to_a_stop_string(pretrained):
    model = HarnessModel(pretrained)
    greedy = generate(pretrained, "the quick", 12)
    requests = [Request("the quick", {"until": [], "max_gen_toks": 12})]
    assert model.generate_until(requests)[0].strip() == greedy.strip()
    stop = greedy[len(greedy) // 2]
    (stopped,) = model.generate_until([Request("the quick", {"until": [stop], "max_gen_toks": 12})])
    assert stopped == greedy[: greedy.index(stop)]
