"""The Triton kernels under the names of the compiled ones, called as extension.call calls those: tensors stay tensors;
and the rotation before stock attention.

Importing this module imports Triton, which an installation for the CPU may lack; dispatch.launcher does it on demand.
"""

import contextlib

import torch

from cramfast.kernels.triton_adamw import adamw, adamw_partials
from cramfast.kernels.triton_arrange import arrange
from cramfast.kernels.triton_cross_entropy import cross_entropy
from cramfast.kernels.triton_glu import glu_bwd, glu_fwd
from cramfast.kernels.triton_layernorm import layernorm_bwd, layernorm_fwd, layernorm_partials
from cramfast.kernels.triton_layernorm_glu import layernorm_glu_fwd

_FUNCTIONS = (layernorm_fwd, layernorm_bwd, glu_fwd, glu_bwd, layernorm_glu_fwd, cross_entropy, adamw, arrange)
_KERNELS = {function.__name__: function for function in _FUNCTIONS}
_SIZES = {function.__name__: function for function in (layernorm_partials, adamw_partials)}


def call(name: str, on: torch.Tensor, *arguments):
    """Launch a kernel where the tensor `on` lives, on its current stream, or return the size of its scratch memory."""
    if name in _SIZES:
        return _SIZES[name](on, *arguments)
    several = on.is_cuda and torch.cuda.device_count() > 1
    with torch.cuda.device(on.device.index) if several else contextlib.nullcontext():
        return _KERNELS[name](*arguments)
