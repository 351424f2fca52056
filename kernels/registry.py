"""The operator library torch.ops.cramfast: define, implementation and fake kernel of one operator in one call.

torch.library.Library.define/impl with a torch.autograd.Function outside costs about 40 us a forward and backward call
where custom_op with register_autograd costs about 70.
"""

from collections.abc import Callable

import torch

_library = torch.library.Library("cramfast", "DEF")
_DEVICES = ("CPU", "CUDA")


def register(schema: str, implementation: Callable, fake: Callable) -> Callable:
    """Define torch.ops.cramfast.NAME from its schema and return the overload to call."""
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in _DEVICES:
        _library.impl(name, implementation, device)
    torch.library.register_fake(f"cramfast::{name}", fake, lib=_library)
    return getattr(torch.ops.cramfast, name).default
