import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "src" / "splitlearn"
HEAVY = {"torch", "transformers", "grpc"}

SHOW_HELP = """
import sys
from splitlearn.cli.main import main
sys.argv = ["splitlearn", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""


def heavy_packages_after(code: str) -> set[str]:
    """Those of HEAVY that a fresh interpreter holds once it has run the code."""
    report = "\nimport sys; print('loaded:', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.rpartition("loaded:")[2].split()
    return HEAVY & set(loaded)


def test_packages_import_downwards_only() -> None:
    lint_imports = Path(sys.executable).with_name("lint-imports")
    if not lint_imports.exists():
        pytest.skip("import-linter is not installed here")
    done = subprocess.run([lint_imports, "--no-logo"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_below_testing_uses_the_lazy_names() -> None:
    """The contracts do not follow them: they would be a hidden way from client to server."""
    uses = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in sorted(SOURCES.rglob("*.py"))
        if file.relative_to(SOURCES).parts[0] not in {"cli", "testing"}
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if uses_a_lazy_name(node)
    ]
    assert uses == []


def uses_a_lazy_name(node: ast.AST) -> bool:
    import splitlearn

    if isinstance(node, ast.ImportFrom) and node.module == "splitlearn" and not node.level:
        lazy = set(splitlearn.__all__) - {"__version__"}
        return any(alias.name in lazy for alias in node.names)
    return isinstance(node, ast.Import) and any(n.name == "splitlearn" for n in node.names)


def test_the_package_loads_nothing_heavy() -> None:
    assert heavy_packages_after("import splitlearn") == set()


def test_help_loads_no_torch() -> None:
    assert "torch" not in heavy_packages_after(SHOW_HELP)


def test_public_names_are_listed_before_they_are_loaded() -> None:
    import splitlearn

    assert set(splitlearn.__all__) <= set(dir(splitlearn))


@pytest.mark.parametrize("name", ["AutoSplitModelForCausalLM", "TrunkServer", "held_out_loss"])
def test_public_names_load(name: str) -> None:
    import splitlearn

    assert getattr(splitlearn, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    import splitlearn

    with pytest.raises(AttributeError, match="has no attribute 'Trunk'"):
        splitlearn.Trunk  # noqa: B018
