"""What each operator is compared with. A peer is forward plus backward (or one update) on the inputs of a Case."""

import functools

import torch
import torch.nn.functional as F
from test_ops import assert_reproduces_reference

import cramfast.kernels
from bench.attention_peers import attention_peers
from bench.liger_peers import liger_peers
from cramfast.kernels import dispatch, reference
from cramfast.kernels.cases import Case, training_pass
from cramfast.kernels.layernorm_glu import FUSED
from cramfast.runtime.stopwatch import Work


def adamw_torch(inputs) -> Work:
    """clip_grad_norm_ and torch's fused AdamW; without the half-precision copy of the weights that ours writes too."""
    parameter = torch.nn.Parameter(inputs["master"].clone())
    parameter.grad = inputs["grad"].clone()
    optimizer = torch.optim.AdamW([parameter], lr=1e-2, betas=(0.9, 0.98), weight_decay=0.01, fused=True)

    def work():
        torch.nn.utils.clip_grad_norm_([parameter], 0.5)
        optimizer.step()

    return work


def adamw_compiled(inputs) -> Work:
    """Clip, update and half-precision copy in plain PyTorch without a wait for the device, compiled; same traffic."""
    master, grad, exp_avg, exp_avg_sq, half = (
        inputs[name].clone() for name in ("master", "grad", "exp_avg", "exp_avg_sq", "half")
    )
    step, beta1, beta2 = torch.zeros((), device=master.device), 0.9, 0.98

    def update():
        norm = torch.linalg.vector_norm(grad)
        g = grad * torch.clamp(0.5 / (norm + 1e-6), max=1.0)
        step.add_(1)
        exp_avg.lerp_(g, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        denominator = (exp_avg_sq / (1 - beta2**step)).sqrt() + 1e-8
        master.mul_(1 - 1e-2 * 0.01).sub_(1e-2 / (1 - beta1**step) * exp_avg / denominator)
        half.copy_(master[: half.numel()])

    return torch.compile(update, dynamic=False)


def cross_entropy_all_positions(inputs, mask_fraction=0.3) -> Work:
    """The decoder over every token, labels -100 where nothing is masked: what a stock masked language model does."""
    M, D = inputs["hidden"].shape
    N = round(M / mask_fraction)
    device = inputs["hidden"].device
    hidden = torch.randn(N, D, device=device).to(inputs["hidden"].dtype).requires_grad_()
    weight = inputs["weight"].detach().clone().requires_grad_()
    target = torch.full((N,), -100, device=device)
    target[torch.randperm(N, device=device)[:M]] = inputs["target"]

    def work():
        loss = F.cross_entropy(F.linear(hidden, weight).float(), target)
        return torch.autograd.grad(loss, (hidden, weight))

    return work


def ours_by(implementation: str, case: Case, inputs) -> Work:
    """The operator by another implementation than the one under test. Its value tests come first, as everywhere: red
    ones raise RuntimeError."""
    device, dtype = inputs["x"].device.type, inputs["x"].dtype

    @functools.cache
    def tested() -> Work:
        for shape in case.test_shapes:
            try:
                assert_reproduces_reference(device, case, shape, dtype)
            except AssertionError as error:
                raise RuntimeError(f"no number for an operator that is wrong: {dict(shape)}: {error}") from error
        return training_pass(case, cramfast.kernels, inputs)

    def work():
        with dispatch.using(case.op, implementation, device=device):
            return tested()()

    return work


def fused_forms(case: Case, inputs) -> dict[str, Work]:
    """layernorm_glu by each kernel that makes its forward pass alone and can run here. Their rows beside "ours", which
    runs the parts, are the verdict on them (docs/decisions/0012)."""
    place = (inputs["x"].device.type, inputs["x"].dtype)
    under_test = dispatch.choose(case.op, *place).implementation
    names = [n for n in FUSED if n != under_test and not dispatch.obstacle(case.op, n, *place)]
    return {f"ours, {name}": ours_by(name, case, inputs) for name in names}


def peers(case: Case, inputs) -> dict[str, Work]:
    """Name -> work, ours first; each does the job of one training step."""
    on_gpu = next(v for v in inputs.values() if isinstance(v, torch.Tensor)).device.type == "cuda"
    if case.op == "adamw":
        found = {"ours": training_pass(case, cramfast.kernels, inputs), "torch fused + clip": adamw_torch(inputs)}
        return found | ({"torch.compile": adamw_compiled(inputs)} if on_gpu else {})
    found = {"ours": training_pass(case, cramfast.kernels, inputs)}
    if case.op == "attention":
        return found | attention_peers(inputs)
    found["eager"] = training_pass(case, reference, inputs)
    found["torch.compile"] = training_pass(case, reference, inputs, compiled=True)
    if case.op == "layernorm_glu" and on_gpu:
        found |= fused_forms(case, inputs)
    if case.op == "cross_entropy":
        found["logits of all tokens"] = cross_entropy_all_positions(inputs)
    return found | (liger_peers(case.op, inputs) if on_gpu else {})
