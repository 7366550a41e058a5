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
for line in sys.argv[1:]:
    sys.argv = ["splitlearn", *line.split()]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
    print("loaded after:", line, *sys.modules, file=sys.stderr)
"""
ASKED = [
    "--help",
    *(f"{verb} --help" for verb in VERBS),
    *(f"bench {question} --help" for question in bench.VERBS),
]


@pytest.fixture(scope="module")
def heavy_after() -> dict[str, set[str]]:
    """One process shows one help after the other: what the first too many loads, all later ones have."""
    done = subprocess.run(
        [sys.executable, "-c", SHOW_HELP, *ASKED], capture_output=True, text=True, timeout=60, check=True
    )
    told = [line.removeprefix("loaded after: ") for line in done.stderr.splitlines()]
    return {
        line: HEAVY & set(loaded.removeprefix(line).split())
        for line, loaded in zip(ASKED, told, strict=True)
        if loaded.startswith(line)
    }


@pytest.mark.parametrize("line", ASKED)
def test_help_loads_nothing_heavy(heavy_after, line):
    assert heavy_after[line] == set()


def test_help_is_there_at_once():
    """Processor time, which other processes do not change much."""
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "splitlearn.cli", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < ENOUGH_S


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
