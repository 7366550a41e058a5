"""What README and docs show is true: their Python runs, and their commands exist.

Every ```python block runs, those of one page in one namespace, in an empty folder. Two names are
there from the start: `model_dir`, the folder of a tiny model, and `trunk_address`, a trunk server
that holds its trunk. `<!-- not run: reason -->` on the line before a block leaves it out.
"""

import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELLS = {"bash", "sh", "shell", "console"}


def blocks(text: str) -> Iterator[tuple[str, int, list[str], bool]]:
    """Each fenced block: its language, its first line's number, its lines, and if it may run."""
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        fence = re.match(r"```\s*(\w*)", lines[number])
        number += 1
        if not fence:
            continue
        end = next(i for i in range(number, len(lines)) if lines[i].startswith("```"))
        may_run = number < 2 or not lines[number - 2].startswith("<!-- not run: ")
        yield fence[1], number, lines[number:end], may_run
        number = end + 1


def python_of(page: Path) -> str:
    """The page's Python, each line at its own number, so that a traceback names the page's line."""
    text = page.read_text(encoding="utf-8")
    script = [""] * (text.count("\n") + 1)
    for language, start, lines, may_run in blocks(text):
        if language == "python" and may_run:
            script[start : start + len(lines)] = lines
    return "\n".join(script)


def shell_of(page: Path) -> list[str]:
    """Each `splitlearn` command of the page: lines of shell blocks, and code within a sentence."""
    text = page.read_text(encoding="utf-8")
    shell = [
        line
        for language, _, lines, _ in blocks(text)
        if language in SHELLS
        for line in "\n".join(lines).replace("\\\n", " ").splitlines()
    ]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    spans = re.findall(r"`([^`\n]+)`", prose)
    found = [re.search(r"(?:^|[\s/])splitlearn\s+([^#&|;]*)", command) for command in shell + spans]
    return [command[1].strip() for command in found if command]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


pages_with_python = [page for page in PAGES if page.exists() and python_of(page).strip()]
commands = sorted({(name_of(p), c) for p in PAGES if p.exists() for c in shell_of(p)})


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from splitlearn.testing import tiny_model

    folder = tmp_path_factory.mktemp("docs") / "model"
    tiny_model("llama", folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def state_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No run of an earlier test run, whose names and members are the same, is found on the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="module")
def trunk_address(model_dir: Path) -> Iterator[str]:
    from splitlearn import TrunkServer

    with TrunkServer(model_dir, bottom_layers=2, top_layers=2, port=0) as server:
        yield server.address


@pytest.mark.parametrize("page", pages_with_python, ids=name_of)
def test_the_python_of_a_page_runs(
    page: Path, model_dir: Path, trunk_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, as torch is loaded here: names are the page's own all the same."""
    script = tmp_path / page.name
    script.write_text(python_of(page), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script), {"model_dir": str(model_dir), "trunk_address": trunk_address}, "__main__")


@pytest.mark.parametrize(("page", "command"), commands)
def test_a_command_of_a_page_exists(page: str, command: str) -> None:
    import typer

    from splitlearn.cli.main import app

    group = typer.main.get_command(app)
    context = group.make_context("splitlearn", [], resilient_parsing=True)
    named = re.match(r"[a-z]+", command)
    verb = group.get_command(context, named[0]) if named else group
    assert verb is not None, f"{page}: there is no `splitlearn {command}`"
    if below := getattr(verb, "commands", {}):
        words = command.split()[1:]
        assert not words or words[0] in below, f"{page}: there is no `splitlearn {command}`"
        verb = below[words[0]] if words else verb
    known = {option for parameter in verb.params for option in parameter.opts}
    known |= {option for parameter in verb.params for option in parameter.secondary_opts}
    used = set(re.findall(r"--[a-z][a-z-]*", command))
    assert used <= known | {"--help"}, f"{page}: `splitlearn {command}`"
