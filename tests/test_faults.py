"""The list of faults fits the library; `python tests/faults.py` runs it."""

import shutil

import faults
import pytest


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.name)
def test_can_be_applied(fault, tmp_path):
    path = tmp_path / fault.file
    path.parent.mkdir(exist_ok=True)
    shutil.copy(faults.ROOT / "bnjax" / fault.file, path)
    faults.apply(fault, tmp_path)
    compile(path.read_text(), path, "exec")
    assert (faults.ROOT / fault.first.split()[0]).exists()


def test_there_are_enough_faults():
    names = [fault.name for fault in faults.FAULTS]
    assert len(names) == len({*names}) >= 60
