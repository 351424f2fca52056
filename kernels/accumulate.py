"""Gradients into a float32 buffer, in place, without a copy in between: csrc/accumulate.h.

No operators: nothing here is differentiable, and torch does the same wherever these do not run, in more passes over
memory.
"""

import torch

from cramfast.kernels import extension
from cramfast.kernels.extension import DTYPE_CODES, check

_STORED = extension.storage_dtypes("cpu")


def compiled_for(tensor):
    """Whether the compiled loops take gradients of this device and dtype."""
    return extension.module is not None and tensor.device.type == "cpu" and tensor.dtype in _STORED


def accumulate(total, values):
    """total += values.

    Args:
        total: any shape, float32, contiguous.
        values: of the same shape, float32 or a half precision.

    Raises:
        ValueError: a total of another shape or dtype, not contiguous or not on 16 bytes.
    """
    check("total", total, tuple(values.shape), torch.float32, values)
    if not compiled_for(values) or not values.is_contiguous():
        total.add_(values)
        return
    extension.call("accumulate", total, total, values, values.numel(), DTYPE_CODES[values.dtype])


def accumulate_rows(total_VD, ids_N, rows_ND):
    """total[ids[n]] += rows[n], in the order of n; only where compiled_for(rows_ND).

    Args:
        total_VD: (V, D), float32.
        ids_N: (N,), int32, each 0 <= id < V; not looked at.
        rows_ND: (N, D), float32 or bfloat16.

    Raises:
        ValueError: a shape or dtype that does not fit, or a tensor that is not contiguous or not on 16 bytes.
    """
    (N, D), V = rows_ND.shape, len(total_VD)
    check("total", total_VD, (V, D), torch.float32, total_VD)
    check("ids", ids_N, (N,), torch.int32, total_VD)
    check("rows", rows_ND, (N, D), rows_ND.dtype, total_VD)
    extension.call("accumulate_rows", total_VD, total_VD, ids_N, rows_ND, N, D, DTYPE_CODES[rows_ND.dtype])
