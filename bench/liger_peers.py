"""The operators of Liger Kernel (Hsu et al., arXiv:2410.10989), where it is installed: Triton, GPUs only.

Its LayerNorm adds no residual, so torch adds it; its gate is GELU's tanh form and takes two tensors, which it gets, and
writes their gradients over them, so that from the second round on it works on other numbers in the same time.
"""

import importlib.util

import torch

from cramfast.runtime.stopwatch import Work


def _leaf(tensor):
    return tensor.detach().clone().requires_grad_()


def layernorm(inputs) -> Work:
    """Residual add by torch, then Liger's LayerNorm."""
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    x, residual, weight = (_leaf(inputs[name]) for name in ("x", "residual", "weight"))
    bias = torch.zeros_like(weight)  # it insists on one
    cotangents = [torch.randn_like(x), torch.randn_like(x)]

    def work():
        stream = x + residual
        y = LigerLayerNormFunction.apply(stream, weight, bias, 1e-5)
        return torch.autograd.grad((y, stream), (x, residual, weight), cotangents)

    return work


def glu(inputs) -> Work:
    """The gate on the two halves as tensors of their own."""
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    halves = [_leaf(half.contiguous()) for half in inputs["x"].chunk(2, dim=1)]
    cotangent = torch.randn_like(halves[0])
    return lambda: torch.autograd.grad(LigerGELUMulFunction.apply(*halves), halves, cotangent)


def cross_entropy(inputs) -> Work:
    """Fused linear cross-entropy over the masked tokens."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    leaves = [_leaf(inputs["hidden"]), _leaf(inputs["weight"])]
    return lambda: torch.autograd.grad(loss(leaves[1], leaves[0], inputs["target"]), leaves)


def liger_peers(op: str, inputs) -> dict[str, Work]:
    """Name -> work, or nothing where Liger has no such operator or is not installed."""
    peers = {"layernorm": layernorm, "glu": glu, "cross_entropy": cross_entropy}
    if op not in peers or importlib.util.find_spec("liger_kernel") is None:
        return {}
    return {"Liger": peers[op](inputs)}
