"""Adds files from outside of docs/pages to the site: the experiments' pictures."""

from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent


def on_files(files: Files, config) -> Files:
    for picture in sorted((ROOT / "experiments" / "figures").glob("*.png")):
        uri = f"figures/{picture.name}"
        files.append(File.generated(config, uri, abs_src_path=str(picture)))
    return files
