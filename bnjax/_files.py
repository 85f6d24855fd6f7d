"""Files and folders that are written whole, or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new path beside `path`, which takes its place when the block ends.

    What is there is replaced then, a folder too. If the block raises, also by an
    interruption, what was written is removed and `path` stays as it was.

    Args:
        path: the file or folder that is to be written.
    """
    with tempfile.TemporaryDirectory(prefix=".bnjax-", dir=path.parent) as folder:
        new, old = Path(folder) / path.name, Path(folder) / "old"
        yield new
        is_folder = new.is_dir() or (path.is_dir() and not path.is_symlink())
        if not is_folder or not os.path.lexists(path):
            os.replace(new, path)
            return
        os.replace(path, old)  # no folder replaces a file, or one that is not empty
        try:
            os.replace(new, path)
        except BaseException:
            os.replace(old, path)
            raise
