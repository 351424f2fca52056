"""Where an evaluation runs and in which precision."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from cramfast.model.encoder import Encoder
from cramfast.recipes import choose_device, choose_dtype
from cramfast.runtime.allocator import keep_freed_memory


@dataclass(frozen=True)
class Machine:
    """Device, precision and threads of an evaluation."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Storage of matrices and activations; auto: bfloat16 where this machine multiplies it, float32 elsewhere."""
    threads: int = 0
    """CPU threads; 0 leaves the choice to torch."""

    def start(self) -> None:
        """Settings of the process."""
        if self.threads:
            torch.set_num_threads(self.threads)
        keep_freed_memory()

    def resolve(self) -> tuple[torch.device, torch.dtype]:
        """The device and the storage type.

        Raises:
            UserError: a GPU was asked for and there is none.
        """
        device = choose_device(self.device)
        dtype = choose_dtype(device) if self.dtype == "auto" else self.dtype
        # Without bfloat16 the trainer takes float16 and scales its loss; fine-tuning has no loss scale.
        return torch.device(device), torch.float32 if dtype == "float16" else getattr(torch, dtype)

    def place(self, module: nn.Module) -> nn.Module:
        """Move to the device and store the weights in the precision asked for, in place.

        Norms and biases of our encoder stay float32, as its operators have them; others take one type throughout.
        """
        device, dtype = self.resolve()
        if not isinstance(module, Encoder):
            return module.to(device, dtype)
        module.to(device)
        for parameter in module.parameters():
            if parameter.dim() >= 2:
                parameter.data = parameter.data.to(dtype)
        return module
