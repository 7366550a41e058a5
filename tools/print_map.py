"""Prints the source tree with each file's first docstring line, and keeps the README's copy."""

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent / "src" / "splitlearn"
OPENS, CLOSES = "<!-- map -->", "<!-- /map -->"
WRITTEN_BY_TOOLS = {"generated"}


def source_map() -> str:
    rows = [("src/splitlearn/", first_line(ROOT / "__init__.py")), *rows_below(ROOT, depth=1)]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {line}".rstrip() for name, line in rows)


def rows_below(folder: Path, depth: int) -> Iterator[tuple[str, str]]:
    """Files first, then the folders, each with what lies in it."""
    indent = "  " * depth
    for file in sorted(folder.glob("*.py")):
        if file.name != "__init__.py":
            yield indent + file.name, first_line(file)
    for child in sorted(path for path in folder.iterdir() if (path / "__init__.py").exists()):
        yield f"{indent}{child.name}/", first_line(child / "__init__.py")
        if child.name not in WRITTEN_BY_TOOLS:
            yield from rows_below(child, depth + 1)


def first_line(file: Path) -> str:
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    return docstring.splitlines()[0] if docstring else ""


def parts(page: Path) -> tuple[str, str, str]:
    """What stands before, in and after the page's map."""
    text = page.read_text(encoding="utf-8")
    before, opens, rest = text.partition(OPENS)
    inside, closes, after = rest.partition(CLOSES)
    if not opens or not closes:
        sys.exit(f"{page} has no {OPENS} … {CLOSES}; put both lines where the map belongs")
    return before + opens, inside, closes + after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", type=Path, metavar="PAGE", help="fail if its map is another")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the map into it")
    arguments = parser.parse_args()
    block = f"\n```\n{source_map()}\n```\n"

    if arguments.check and parts(arguments.check)[1] != block:
        page = arguments.check
        sys.exit(f"the map in {page} is out of step; run tools/print_map.py --write {page}")
    if arguments.write:
        before, _, after = parts(arguments.write)
        arguments.write.write_text(before + block + after, encoding="utf-8")
    if not arguments.check and not arguments.write:
        print(source_map())


if __name__ == "__main__":
    main()
