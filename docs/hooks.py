"""What comes from outside of docs/pages: pictures, tables of results, the changelog."""

import re
import sys
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "docs"), str(ROOT)]

import tables  # noqa: E402

# <!-- table: mnist -->  or, what the newest run of it ran on,  <!-- run: mnist -->
PLACE = re.compile(r"^<!-- (table|run): (\w+) -->$", re.MULTILINE)


def on_files(files: Files, config) -> Files:
    for picture in sorted((ROOT / "experiments" / "figures").glob("*.png")):
        uri = f"figures/{picture.name}"
        files.append(File.generated(config, uri, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    if page.file.src_uri == "changelog.md":
        return (ROOT / "CHANGELOG.md").read_text()

    def filled(place: re.Match) -> str:
        kind, name = place.groups()
        return tables.TABLES[name]() if kind == "table" else tables.versions(name)

    return PLACE.sub(filled, markdown)
