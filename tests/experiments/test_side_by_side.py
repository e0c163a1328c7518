import json
import shlex
import sys
import time
from pathlib import Path

import pytest

from configs.side_by_side import llama3_groups
from experiments import side_by_side
from experiments.side_by_side import run_chains
from experiments.support.config_files import load_config

WRITES = (
    "import json, pathlib, sys; pathlib.Path(sys.argv[1], 'result.json').write_text(json.dumps({'of': sys.argv[2]}))"
)
SLEEPS = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).wait()"


def python(code, *arguments):
    return [sys.executable, "-S", "-c", code, *arguments]


def test_every_program_has_a_folder_of_its_own_and_its_result_is_kept(tmp_path):
    chains = {
        "one": [python(WRITES, "{folder}", "{workdir}")],
        "two": [python("print('first')"), python(WRITES, "{folder}", "second")],
    }
    rows = run_chains(chains, tmp_path, at_once=2, seconds=None)
    assert {name: (row["ended"], row["result"]) for name, row in rows.items()} == {
        "one": ("ended", {"of": str(tmp_path)}),
        "two_1": ("ended", None),
        "two_2": ("ended", {"of": "second"}),
    }
    assert (tmp_path / "two_1" / "log.txt").read_text() == "first\n"
    assert rows["two_1"]["command"] == """-S -c 'print('"'"'first'"'"')'"""


def test_a_chain_ends_with_its_first_failure_and_others_go_on(tmp_path):
    chains = {
        "broken": [python("raise SystemExit('no such model')"), python("print()")],
        "whole": [python("print()")],
        "killed": [python("import os; os.kill(os.getpid(), 9)")],
    }
    rows = run_chains(chains, tmp_path, at_once=1, seconds=None)
    assert {name: row["ended"] for name, row in rows.items()} == {
        "broken_1": "failed with status 1: no such model",
        "broken_2": "not started",
        "whole": "ended",
        "killed": "failed with status -9: it printed nothing",
    }


def test_at_the_time_limit_a_program_ends_with_what_it_started(tmp_path):
    started = time.monotonic()
    rows = run_chains({"late": [python(SLEEPS)], "next": [python("print()")]}, tmp_path, at_once=1, seconds=0.5)
    assert {name: row["ended"] for name, row in rows.items()} == {
        "late": "killed at the time limit",
        "next": "not started",
    }
    assert time.monotonic() - started < 20


def test_at_most_so_many_run_at_a_time(tmp_path):
    """Alone each finds a folder free that it holds; two at a time meet: each waits for what the other writes."""
    holds = "import os, sys, time; os.mkdir(sys.argv[1]); time.sleep(0.1); os.rmdir(sys.argv[1])"
    taken = str(tmp_path / "taken")
    rows = run_chains({str(index): [python(holds, taken)] for index in range(3)}, tmp_path, at_once=1, seconds=None)
    assert {row["ended"] for row in rows.values()} == {"ended"}
    meets = (
        "import os, sys, time; open(sys.argv[1], 'w').close()\nwhile not os.path.exists(sys.argv[2]): time.sleep(0.01)"
    )
    places = [str(tmp_path / name) for name in ("one", "other")]
    chains = {"one": [python(meets, *places)], "other": [python(meets, *places[::-1])]}
    rows = run_chains(chains, tmp_path / "met", at_once=2, seconds=60)
    assert {row["ended"] for row in rows.values()} == {"ended"}


def test_the_program_runs_commands_of_experiments(tmp_path):
    config = llama3_groups.get_config()
    config.chains = {"refused": "quantize --config.x=1"}
    with pytest.raises(SystemExit) as ended:
        side_by_side.main(config, tmp_path)
    assert ended.value.code == 1
    programs = json.loads((tmp_path / "result.json").read_text())["programs"]
    assert programs["refused"]["command"] == "-m experiments.quantize --config.x=1 '--workdir={folder}'"
    assert "--config is missing" in programs["refused"]["ended"]


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("only", "W9", "config.only names W9: choose from bf16"),
        ("at_once", 0, "config.at_once is 0: at least one"),
        ("chains", {"empty": ()}, "config.chains.empty has no commands"),
    ],
)
def test_wrong_fields_are_refused(tmp_path, field, value, error):
    config = llama3_groups.get_config()
    config[field] = value
    with pytest.raises(ValueError, match=error):
        side_by_side.main(config, tmp_path)


def test_commands_of_shipped_configs_have_fields_of_their_configs():
    """A misspelt field would be found on the GPU, after minutes."""
    checked = 0
    for path in Path(llama3_groups.__file__).parent.glob("*.py"):
        for chain in load_config(str(path)).config.chains.values():
            for command in [chain] if isinstance(chain, str) else chain:
                words = shlex.split(command)
                configs = [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
                for word in (word for word in words if configs and word.startswith("--config.")):
                    load_config(configs[0]).check_field(word.removeprefix("--config.").partition("=")[0])
                    checked += 1
    assert checked > 50
