import pytest
import typer
from typer.testing import CliRunner

from splitlearn.cli.ending import one_line_errors
from splitlearn.cli.main import app
from splitlearn.errors import TrunkUnreachable


def invoke(*words: str):
    return CliRunner().invoke(app, list(words))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["frobnicate"], "No such command 'frobnicate'; see splitlearn --help"),
        (["--frobnicate"], "No such option: --frobnicate; see splitlearn --help"),
        (["generate"], "splitlearn generate --help"),
        (["generate", "x", "--prompt", "y", "--trunk", "nowhere"], "'nowhere' is not HOST:PORT"),
        (
            ["generate", "x", "--prompt", "y", "--trunk", "here:1", "--max-new-tokens", "0"],
            "--max-new-tokens",
        ),
        (["serve", "x", "--kv-budget", "much"], "'much' is not a size"),
        (["serve", "x", "--port", "65536"], "--port"),
        (["serve", "x", "--host", "0.0.0.0"], "no TLS yet"),
        (["slice", "x", "--part", "middle", "--output", "y"], "'middle'"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(words, said):
    ended = invoke(*words)
    assert ended.exit_code == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_no_verb_at_all_shows_the_help():
    ended = invoke()
    assert ended.exit_code == 2
    assert "Commands:" in ended.output


def end(error: BaseException, *, debug: bool = False) -> int:
    with pytest.raises(typer.Exit) as ended, one_line_errors(debug=debug):
        raise error
    return ended.value.exit_code


def test_our_errors_are_one_line_and_exit_code_1(capsys):
    assert end(TrunkUnreachable("nobody answers:\n  start a server")) == 1
    assert capsys.readouterr().err == "error: nobody answers: start a server\n"


def test_an_unexpected_error_is_one_line_with_a_hint(capsys):
    assert end(KeyError("hidden")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: KeyError: 'hidden'; `splitlearn --debug VERB ...` shows where"


def test_debug_shows_where(capsys):
    assert end(KeyError("hidden"), debug=True) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("way_out", [typer.Exit(3), KeyboardInterrupt(), BrokenPipeError(), SystemExit(143)])
def test_other_ways_out_pass(way_out):
    with pytest.raises(type(way_out)), one_line_errors(debug=False):
        raise way_out


def test_a_missing_folder_ends_a_command_with_one_line(tmp_path):
    ended = invoke("plan", str(tmp_path / "none"))
    assert ended.exit_code == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: there is no folder")
