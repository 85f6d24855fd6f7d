"""Layers with statistics for each domain: rows in Flax, modules of their own in timm.

    Flax   norm/mean (domain, feature)
    timm   norm.running_mean of domain 0, norm.aux_bn.0.running_mean of domain 1, ...

References: huggingface/pytorch-image-models: timm/layers/split_batchnorm.py.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from bnjax.convert import _tree
from bnjax.convert._conventions import CONVENTIONS, KINDS, plain

_TORCH = CONVENTIONS["torch"]
_NAMES = (_TORCH.scale, _TORCH.bias, _TORCH.mean, _TORCH.var)


def is_split(kind: str | None) -> bool:
    """Whether modules of this class keep statistics for each domain."""
    return kind is not None and KINDS.get(plain(kind)) == "split"


def stacked(weights: Mapping[str, Any], kinds: Mapping[str, str]) -> dict[str, Any]:
    """The entries of a state_dict, those of each split layer as one with rows."""
    found = dict(weights)
    for module in filter(lambda module: is_split(kinds[module]), kinds):
        for name in _NAMES:
            if (entry := _entry(module, 0, name)) in found:
                entries = (_entry(module, row, name) for row in itertools.count())
                rows = [*itertools.takewhile(found.__contains__, entries)]
                values = [_tree.to_numpy(found.pop(entry)) for entry in rows]
                found[entry] = np.stack(values)
    return found


def unstacked(module: str, name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """The entries of a state_dict that an array with rows comes from."""
    return {_entry(module, row, name): value for row, value in enumerate(array)}


def _entry(module: str, row: int, name: str) -> str:
    parts = (module, f"aux_bn.{row - 1}" if row else "", name)
    return ".".join(filter(None, parts))
