"""What comes from outside of docs/pages: the experiments' pictures, the changelog."""

from pathlib import Path

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent


def on_files(files: Files, config) -> Files:
    for picture in sorted((ROOT / "experiments" / "figures").glob("*.png")):
        uri = f"figures/{picture.name}"
        files.append(File.generated(config, uri, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, **_) -> str:
    if page.file.src_uri == "changelog.md":
        return (ROOT / "CHANGELOG.md").read_text()
    return markdown
