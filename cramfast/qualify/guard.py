"""Memory that shows what a kernel must not do: NaN wherever nothing was written, and a band around every tensor."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

BAND = 4096  # bytes on either side; a multiple of every alignment that a kernel may ask for
MARK = 0xFF  # all ones are NaN in every float, so that reading beyond an end shows too


class Guard:
    """Hands out tensors between two bands, filled with NaN, in place of torch.empty and its kin.

    Memory that operators of ATen take for themselves is not seen here.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.taken: list[tuple[Tensor, Tensor]] = []  # (all bytes, the tensor inside)

    def like(self, plain: Tensor) -> Tensor:
        """A guarded tensor of this shape and dtype, NaN or, of integers, -1 everywhere."""
        raw = torch.ones(1, dtype=torch.uint8, device=plain.device).mul_(MARK).repeat(plain.nbytes + 2 * BAND)
        inside = raw[BAND : BAND + plain.nbytes].view(plain.dtype).view(plain.shape)
        self.taken.append((raw, inside))
        return inside

    def copy(self, value):
        """A guarded copy of a tensor or of a tuple of them; anything else as it is."""
        if isinstance(value, tuple):
            return tuple(map(self.copy, value))
        if not isinstance(value, Tensor) or value.numel() == 0:
            return value
        return self.like(value).copy_(value)

    def touched(self) -> Tensor | None:
        """The first tensor beside which something was written, or None; waits for the device."""
        if not self.taken:
            return None
        marks = [((raw[:BAND] != MARK).any() | (raw[-BAND:] != MARK).any()) for raw, _ in self.taken]
        found = torch.stack(marks).tolist()
        return next((inside for (_, inside), hit in zip(self.taken, found, strict=True) if hit), None)

    @contextlib.contextmanager
    def around_new_tensors(self) -> Iterator[None]:
        """Inside, torch.empty, torch.empty_like and Tensor.new_empty hand out guarded memory."""
        plain = torch.empty, torch.empty_like, torch.Tensor.new_empty

        def guarded(allocate):
            def call(*arguments, **options):
                tensor = allocate(*arguments, **options)
                ours = type(tensor) is Tensor and tensor.device.type == self.device.type and tensor.is_contiguous()
                if not ours or tensor.numel() == 0 or tensor.dtype == torch.bool or options.get("pin_memory"):
                    return tensor
                return self.like(tensor)

            return call

        torch.empty, torch.empty_like, torch.Tensor.new_empty = map(guarded, plain)
        try:
            yield
        finally:
            torch.empty, torch.empty_like, torch.Tensor.new_empty = plain
