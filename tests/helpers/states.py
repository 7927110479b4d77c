"""Training states compared."""

from typing import Any

import torch


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit, for nested dicts and lists of tensors and numbers."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
