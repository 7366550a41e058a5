"""Makes the site's navigation from the folders of docs, so that a new page needs no entry."""

from pathlib import Path
from typing import Any

SECTIONS = {
    "Tutorials": "tutorials",
    "Guides": "guides",
    "Reference": "reference",
    "Explanation": "explanation",
    "Decisions": "adr",
}


def on_config(config: Any) -> Any:
    """Called by mkdocs before it reads the pages; a section without pages is left out."""
    docs = Path(config["docs_dir"])
    config["nav"] = [{"Home": "index.md"}]
    for title, folder in SECTIONS.items():
        pages = sorted((docs / folder).glob("*.md"), key=lambda page: (page.stem != "index", page))
        if pages:
            config["nav"].append({title: [str(page.relative_to(docs)) for page in pages]})
    return config
