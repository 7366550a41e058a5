import inspect
import resource
import subprocess
import sys
from importlib import import_module

import pytest
from typer.testing import CliRunner

from splitlearn.cli import bench
from splitlearn.cli.main import app
from splitlearn.cli.verbs import VERBS

HEAVY = {"torch", "transformers", "grpc"}
ENOUGH_S = 0.5

SHOW_HELP = """
import sys
from splitlearn.cli.main import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("loaded:", *sys.modules)
"""


def loaded_after(*words: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", SHOW_HELP, *words], capture_output=True, text=True, timeout=60, check=True
    )
    return set(done.stdout.rpartition("loaded:")[2].split())


def test_help_loads_nothing_heavy():
    assert not HEAVY & loaded_after("--help")


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_loads_nothing_heavy(verb):
    assert not HEAVY & loaded_after(verb, "--help")


def test_help_is_there_at_once():
    """Processor time, which other processes do not change much."""
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "splitlearn.cli", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < ENOUGH_S


@pytest.mark.parametrize("question", bench.VERBS)
def test_help_of_a_measurement_loads_nothing_heavy(question):
    assert not HEAVY & loaded_after("bench", question, "--help")


@pytest.mark.parametrize("verb", VERBS)
def test_the_list_says_of_a_verb_what_its_own_help_says(verb):
    told = inspect.getdoc(getattr(import_module(f"splitlearn.cli.{verb}"), verb))
    assert told.splitlines()[0] == VERBS[verb]


def test_help_lists_every_verb():
    shown = CliRunner().invoke(app, ["--help"])
    assert shown.exit_code == 0
    assert [verb for verb in VERBS if f"  {verb} " in shown.output] == list(VERBS)


def test_a_setting_is_explained_in_its_own_words():
    from splitlearn.config import SessionConfig

    told = SessionConfig.model_fields["lease_s"].description
    shown = CliRunner().invoke(app, ["serve", "--help"])
    assert told in " ".join(shown.output.split())


def test_version():
    import splitlearn

    assert CliRunner().invoke(app, ["--version"]).output.strip() == splitlearn.__version__
