"""What each operator is compared with. A peer is forward plus backward (or one update) on the inputs of a Case."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

import cramfast.kernels
from cramfast.kernels import reference
from cramfast.kernels.cases import Case

Work = Callable[[], object]


def forward_backward(case: Case, operators, inputs, compiled=False) -> Work:
    """Forward and backward of the case with the operators of a module, optionally compiled."""
    leaves = {n: inputs[n].detach().clone().requires_grad_() for n in case.gradients if inputs.get(n) is not None}
    arguments = {**inputs, **leaves}

    def forward():
        return case.run(operators, arguments)

    run = torch.compile(forward, dynamic=False) if compiled else forward
    cotangents = [torch.randn_like(o) if o.dim() else torch.ones_like(o) for o in forward()]

    def work():
        return torch.autograd.grad(run(), list(leaves.values()), cotangents)

    return work


def adamw_ours(inputs) -> Work:
    """One update in place; the gradient stays the same, which changes no timing."""
    buffers = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    return lambda: cramfast.kernels.adamw(**buffers, beta1=0.9, beta2=0.98, eps=1e-8)


def adamw_torch(inputs) -> Work:
    """clip_grad_norm_ and torch's fused AdamW; without the half-precision copy of the weights that ours writes too."""
    parameter = torch.nn.Parameter(inputs["master"].clone())
    parameter.grad = inputs["grad"].clone()
    optimizer = torch.optim.AdamW([parameter], lr=1e-2, betas=(0.9, 0.98), weight_decay=0.01, fused=True)

    def work():
        torch.nn.utils.clip_grad_norm_([parameter], 0.5)
        optimizer.step()

    return work


def attention_padded(inputs) -> Work:
    """torch's scaled_dot_product_attention, padded to the longest sequence, with a key mask where lengths differ."""
    lengths = inputs["cu_seqlens"].diff()
    _, _, H, K = inputs["qkv"].shape
    B, L = len(lengths), inputs["max_seqlen"]
    qkv = torch.randn(B, L, 3, H, K).to(inputs["qkv"].dtype).requires_grad_()
    full = bool((lengths == L).all())
    mask = None if full else (torch.arange(L) < lengths[:, None])[:, None, None, :]
    cotangent = torch.randn(B, H, L, K).to(qkv.dtype)

    def work():
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if inputs["rotary"] is not None:
            cos, sin = (torch.cat([t, t], dim=-1)[:L].to(q.dtype) for t in inputs["rotary"])
            q, k = (t * cos + torch.cat([-t[..., K // 2 :], t[..., : K // 2]], dim=-1) * sin for t in (q, k))
        return torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), qkv, cotangent)

    return work


def cross_entropy_all_positions(inputs, mask_fraction=0.3) -> Work:
    """The decoder over every token, labels -100 where nothing is masked: what a stock masked language model does."""
    M, D = inputs["hidden"].shape
    N = round(M / mask_fraction)
    hidden = torch.randn(N, D).to(inputs["hidden"].dtype).requires_grad_()
    weight = inputs["weight"].detach().clone().requires_grad_()
    target = torch.full((N,), -100)
    target[torch.randperm(N)[:M]] = inputs["target"]

    def work():
        loss = F.cross_entropy(F.linear(hidden, weight).float(), target)
        return torch.autograd.grad(loss, (hidden, weight))

    return work


def peers(case: Case, inputs) -> dict[str, Work]:
    """Name -> work, ours first; each does the job of one training step."""
    if case.op == "adamw":
        return {"ours": adamw_ours(inputs), "torch fused + clip": adamw_torch(inputs)}
    found = {"ours": forward_backward(case, cramfast.kernels, inputs)}
    if case.op == "attention":
        return found | {"padded SDPA": attention_padded(inputs)}
    found["eager"] = forward_backward(case, reference, inputs)
    found["torch.compile"] = forward_backward(case, reference, inputs, compiled=True)
    if case.op == "cross_entropy":
        found["logits of all tokens"] = cross_entropy_all_positions(inputs)
    return found
