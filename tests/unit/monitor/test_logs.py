import json

import pytest
import structlog
import torch

from splitlearn.monitor.logs import LONGEST_VALUE, log_to_stderr


@pytest.fixture(autouse=True)
def _as_before():
    yield
    structlog.reset_defaults()


def test_json_lines_go_to_stderr(capsys):
    log_to_stderr(as_json=True)
    structlog.get_logger("any").info("serving", sessions=3)
    shown = capsys.readouterr()
    assert shown.out == ""
    told = json.loads(shown.err)
    assert (told["event"], told["level"], told["sessions"]) == ("serving", "info", 3)


def test_lines_for_people_go_to_stderr(capsys):
    log_to_stderr()
    structlog.get_logger("any").info("serving", sessions=3)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "serving" in shown.err
    assert "sessions=3" in shown.err


@pytest.mark.parametrize("as_json", [True, False])
def test_nothing_that_a_client_sent_is_logged(capsys, as_json):
    log_to_stderr(as_json=as_json)
    activation = torch.full((1, 2), 0.123456)
    structlog.get_logger("any").info(
        "step", activation=activation, text="secret " * LONGEST_VALUE, raw=b"secret"
    )
    shown = capsys.readouterr().err
    assert "0.1234" not in shown
    assert "secret" not in shown
    assert "<Tensor>" in shown


@pytest.mark.parametrize("as_json", [True, False])
def test_a_traceback_shows_no_local_variable(capsys, as_json):
    log_to_stderr(as_json=as_json)

    def fail():
        activation = [0.123456] * 3
        raise ValueError(f"{len(activation)} numbers")

    try:
        fail()
    except ValueError as error:
        structlog.get_logger("any").exception("step failed", exc_info=error)
    shown = capsys.readouterr().err
    assert "ValueError: 3 numbers" in shown
    assert "0.123456, " not in shown
    assert "locals" not in shown
