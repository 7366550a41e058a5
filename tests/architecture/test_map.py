import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def print_map(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools/print_map.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_map_in_the_readme_is_in_step() -> None:
    done = print_map("--check", ROOT / "README.md")
    assert done.returncode == 0, done.stderr


def test_every_file_says_what_it_is() -> None:
    silent = [row for row in print_map().stdout.splitlines() if len(row.split(maxsplit=1)) < 2]
    assert silent == []


def test_a_stale_map_is_found_and_mended(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("# Title\n<!-- map -->\nold\n<!-- /map -->\nend\n")
    assert print_map("--check", page).returncode == 1
    print_map("--write", page)
    assert print_map("--check", page).returncode == 0
    assert page.read_text().startswith("# Title\n<!-- map -->\n")
    assert page.read_text().endswith("\n<!-- /map -->\nend\n")
