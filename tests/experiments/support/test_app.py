"""The command line: faults are said in one line before work starts; help lists the config's fields."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from experiments.support import app, config_files

CONFIG = """
from ml_collections import ConfigDict

def get_config(name="plain"):
    config = ConfigDict()
    # What to call it,
    # in one word.
    config.name = name
    config.rules = (("a", "W4A8"),)
    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 1e-3
    config.model = ConfigDict()
    return config
"""


def main(config, workdir):
    """Stands for a program."""
    print(config.name, workdir)


def run(capsys, *arguments, workdir_required=False):
    """Exit status, stdout, stderr."""
    code = 0
    try:
        app.run(main, workdir_required, argv=["program", *map(str, arguments)])
    except SystemExit as stopped:
        code = stopped.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "own-config.py"
    path.write_text(CONFIG)
    return path


def test_fields_are_set_on_the_command_line(config, tmp_path, capsys):
    workdir = tmp_path / "new" / "folder"
    assert run(capsys, f"--config={config}", "--config.name=x", f"--workdir={workdir}") == (0, f"x {workdir}\n", "")
    assert run(capsys, "--config.name", "y", "--config", config) == (0, "y None\n", "")
    assert run(capsys, f"--config={config}:other") == (0, "other None\n", "")
    rules = "--config.rules=(('^b', 'W2A8'), ('c', 'W1A1'))"
    assert run(capsys, f"--config={config}", rules, "--config.optimizer.learning_rate=1")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.nam=x"], "own-config.py has no field 'nam': did you mean name?"),
        (["--config.learning_rate=1"], "has no field 'learning_rate': did you mean optimizer.learning_rate?"),
        (["--config.optimiser.learning_rat=1"], "did you mean optimizer.learning_rate?"),
        (["--config.name.first=1"], "has no field 'name.first': it has model, name, optimizer.learning_rate, rules"),
        (["--config.rules[0][1]=W2A8"], "own-config.py and the command line do not agree: 1 is not a valid index"),
        (["--config.model.width=1"], "has no field 'model.width'"),
        (["--config.optimizer.learning_rate=fast"], "flag --config.optimizer.learning_rate=fast: could not convert"),
        (["--wrkdir=x"], "Unknown command line flag 'wrkdir'. Did you mean: workdir ?"),
        (["hello"], "unexpected arguments: hello"),
        (["--processes=2"], "this program runs in one process: leave out --coordinator, --processes and --process"),
        (["--config=/nowhere/smolm2.py"], "no config at /nowhere/smolm2.py: did you mean smollm2?"),
        (["--config=/nowhere/x.py"], "no config at /nowhere/x.py: give a Python file with get_config(), or one of"),
        (["--config=/"], "the config / is a folder"),
        (["--config="], "--config is missing: give a Python file with get_config(), or one of compare_training"),
        (["--config=tiny_base"], "tiny_base.py has no get_config()"),
        (["--config=smollm2:1"], "smollm2.py failed: TypeError"),
        (["--config={tmp}/text"], "text is not a Python file"),
        (["--config={tmp}/syntax.py"], "syntax.py is not a config: SyntaxError"),
        (["--config={tmp}/none.py"], "none.py returned NoneType, not an ml_collections.ConfigDict"),
        (["--workdir={tmp}/text"], "text is a file, give a folder"),
        (["--workdir={tmp}/text/below"], "text is a file, give a folder"),
    ],
)
def test_bad_arguments_are_one_line(config, tmp_path, capsys, arguments, message):
    (tmp_path / "text").write_text("text")
    (tmp_path / "syntax.py").write_text("def get_config(:")
    (tmp_path / "none.py").write_text("def get_config():\n    pass\n")
    code, out, _ = run(capsys, f"--config={config}", *(argument.format(tmp=tmp_path) for argument in arguments))
    assert str(code).startswith("error: ")
    assert message.replace("compare_training", config_files.shipped_names()[0]) in code
    assert "\n" not in code
    assert out == ""


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_workdir_without_permission_is_refused(config, tmp_path, capsys):
    (tmp_path / "locked").mkdir(mode=0o500)
    code, _, _ = run(capsys, f"--config={config}", f"--workdir={tmp_path / 'locked' / 'below'}")
    assert "locked cannot be written to" in code


def test_a_required_workdir_is_asked_for(config, capsys):
    assert "--workdir is missing" in run(capsys, f"--config={config}", workdir_required=True)[0]


def test_errors_of_the_program_are_one_line(monkeypatch, capsys):
    for error, text in (
        (OSError(28, "No space left", "x"), "[Errno 28] No space left: 'x'"),
        (ValueError("a\nb"), "a b"),
    ):

        def fail(config, workdir, error=error):
            raise error

        with pytest.raises(SystemExit, match="error: ") as stopped:
            app.run(fail, False, argv=["program", "--config=smollm2"])
        assert stopped.value.code == f"error: {text}"


def test_an_interrupted_program_ends_as_shells_expect(capsys):
    def stop(config, workdir):
        raise KeyboardInterrupt("stopped at step 3")

    with pytest.raises(SystemExit) as stopped:
        app.run(stop, False, argv=["program", "--config=smollm2"])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "stopped at step 3\n"


def test_help_lists_fields_defaults_and_comments(config, capsys):
    code, out, _ = run(capsys, f"--config={config}", "--help")
    assert code == 0
    assert out.startswith(__doc__)
    assert "--config.name='plain'\n        What to call it, in one word.\n" in out
    assert "--config.optimizer.learning_rate=0.001\n" in out
    assert "--config=CONFIG --help lists its fields" in run(capsys, "-h")[1]


def test_shipped_configs_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in config_files.shipped_names():
        assert config_files.load_config(name).path == config_files.SHIPPED / f"{name}.py"
    assert "tiny_base" not in config_files.shipped_names()
    assert "Temperature" in config_files.load_config("generate").comments["temperature"]
    assert config_files.load_config("tiny_w2a2").comments["quantization.weight_norm"].startswith("Normalization")


def test_a_copied_config_finds_what_it_imports(tmp_path):
    copy = Path(tmp_path / "mine.py")
    copy.write_text((config_files.SHIPPED / "tiny_w1a1.py").read_text().replace("8e-3", "5e-3"))
    assert config_files.load_config(str(copy)).config.optimizer.learning_rate == 5e-3
