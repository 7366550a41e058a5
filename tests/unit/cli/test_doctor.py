from typer.testing import CliRunner

from splitlearn.cli.main import app
from splitlearn.testing import tiny_model


def test_it_looks_at_the_machine_where_nothing_is_named():
    ended = CliRunner().invoke(app, ["doctor"])
    assert ended.exit_code == 0, ended.output
    outcomes = {line.split()[1]: line.split()[0] for line in ended.output.splitlines()}
    assert outcomes["transformers"] == outcomes["memory"] == "ok"
    assert outcomes["model"] == outcomes["trunk"] == "skipped"


def test_a_model_that_cannot_be_opened_fails(tmp_path):
    ended = CliRunner().invoke(app, ["doctor", str(tmp_path)])
    assert ended.exit_code == 1
    (line,) = [line for line in ended.output.splitlines() if line.startswith("failed")]
    assert "config.json" in line


def test_it_says_what_a_trunk_served_from_here_would_attend_with_and_why(tmp_path):
    ended = CliRunner().invoke(app, ["doctor", str(tiny_model("llama", tmp_path))])
    assert ended.exit_code == 0, ended.output
    (line,) = [line for line in ended.output.splitlines() if " attention " in line]
    assert "takes sdpa (flash-attention: " in line
