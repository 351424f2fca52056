"""All parameters of a model in one flat float32 buffer, their gradients in another."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from cramfast.kernels.accumulate import accumulate, compiled_for

ALIGNMENT = 16  # entries; 64 bytes of float32 and 32 of bfloat16, so that no vector load straddles a segment's start


class FlatParameters:
    """Owns the numbers of a model: float32 master, hidden matrices first, then embedding tables, then vectors; a
    half-precision copy of the matrices.

    The module's Parameters become views: of `half` for matrices when `dtype` is a half precision (kept, never recast),
    of `master` otherwise. Norm weights and biases always stay float32. Gradients gather in `grad`, float32, over any
    number of backward passes; an embedding table's `row_sums`, where it has them, are its place there, for the rows
    that were looked up (model.encoder.TokenLookup).

    Attributes:
        master, grad: (P,) float32, P the padded size.
        gathered: called with a parameter's name whenever its gradient has been added to `grad`, or None.
        half: (matrices_end,) in `dtype`, or None in float32.
        hidden_end: where the embedding tables begin; Muon's part ends there.
        matrices_end: where the vectors begin; weight decay ends there.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32):
        named = list(model.named_parameters())
        tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        ordered = sorted(named, key=lambda item: (item[1].dim() < 2, id(item[1]) in tables))
        self.places: dict[str, tuple[int, torch.Size]] = {}
        self.gathered: Callable[[str], None] | None = None
        end = self.hidden_end = self.matrices_end = 0
        for name, parameter in ordered:
            self.places[name] = (end, parameter.shape)
            end += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
            if parameter.dim() >= 2:
                self.matrices_end = end
                self.hidden_end = self.hidden_end if id(parameter) in tables else end
        device = ordered[0][1].device
        self.master = torch.zeros(end, device=device)
        self.grad = torch.zeros(end, device=device)
        for (_, parameter), (_, view) in zip(ordered, self.views(self.master), strict=True):
            view.copy_(parameter.detach())
        self.half = None if dtype == torch.float32 else self.master[: self.matrices_end].to(dtype)
        for (name, parameter), (_, view) in zip(ordered, self.views(self.master), strict=True):
            begin, shape = self.places[name]
            if self.half is not None and parameter.dim() >= 2:
                view = self.half[begin : begin + parameter.numel()].view(shape)
            parameter.data = view
        for (name, parameter), (_, view) in zip(ordered, self.views(self.grad), strict=True):
            parameter.register_post_accumulate_grad_hook(self.gather_into(name, view))
            if id(parameter) in tables and compiled_for(parameter):
                parameter.row_sums = view

    def views(self, flat: Tensor, offset: int = 0) -> Iterator[tuple[str, Tensor]]:
        """(name, view shaped like the parameter) of a buffer laid out like `master` from `offset` on."""
        for name, (place, shape) in self.places.items():
            begin = place - offset
            if 0 <= begin < len(flat):
                yield name, flat[begin : begin + shape.numel()].view(shape)

    @torch.no_grad()
    def refresh_half(self) -> None:
        """Make the half-precision copy follow a master that was written from outside."""
        if self.half is not None:
            self.half.copy_(self.master[: self.matrices_end])

    def gather_into(self, name: str, view: Tensor) -> Callable[[Tensor], None]:
        """Hook that adds a finished gradient to its float32 place and frees it at once.

        Autograd would accumulate in the parameter's own dtype, where bfloat16 loses small microbatch gradients beside a
        large sum; and it insists that .grad has that dtype, so the float32 buffer cannot be .grad itself.
        """

        def hook(parameter: Tensor) -> None:
            if parameter.grad is not None:  # there is none where looked-up rows were all
                accumulate(view, parameter.grad)
                parameter.grad = None
            if self.gathered is not None:
                self.gathered(name)

        return hook
