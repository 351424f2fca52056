"""Profiles of a few steps: the bracket that nsys and ncu wait for, a torch.profiler trace, ranges around layers."""

import os
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from cramfast.config import TrainConfig, profiled_steps
from cramfast.errors import UserError
from cramfast.kernels.places import Places
from cramfast.model.encoder import Encoder
from cramfast.runtime import ranges
from cramfast.runtime.ranges import Range
from cramfast.session.metrics import synchronize

# Set in programs that nsys and ncu start. CUPTI serves one tool at a time; torch.profiler would take it from them.
NVIDIA_TOOLS = ("NSYS_PROFILING_SESSION_ID", "NV_NSIGHT_INJECTION_TRANSPORT_TYPE")


class Profile:
    """Profiles the steps that config.profile_steps names, and marks ranges as config.nvtx says, in its context; of
    several processes, profiles the first."""

    def __init__(self, config: TrainConfig, model: Encoder, run_dir: Path, rank: int = 0):
        self.steps = profiled_steps(config.profile_steps) if config.profile_steps and rank == 0 else range(0)
        self.device, self.run_dir = torch.device(config.device), run_dir
        self.nvtx = [] if config.nvtx == "off" else [ranges.Nvtx()]
        if config.nvtx == "layers":
            mark_layers(model)
        self.running = False
        self.trace: torch.profiler.profile | None = None

    def __enter__(self) -> "Profile":
        ranges.markers += self.nvtx
        return self

    def __exit__(self, *exception) -> None:
        if self.running:
            self.stop()
        ranges.markers.clear()

    def before(self, step: int) -> None:
        """Start or stop as the step about to begin demands."""
        if (step in self.steps) != self.running:
            self.stop() if self.running else self.start()

    def start(self) -> None:
        self.running = True
        synchronize(self.device)
        on_gpu = self.device.type == "cuda"
        if not any(name in os.environ for name in NVIDIA_TOOLS):
            activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
            self.trace = torch.profiler.profile(activities=activities)
            self.trace.start()
            ranges.markers.append(ranges.Trace())
        if on_gpu:
            torch.cuda.profiler.start()

    def stop(self) -> None:
        self.running = False
        synchronize(self.device)
        if self.device.type == "cuda":
            torch.cuda.profiler.stop()
        if self.trace is not None:
            ranges.markers.pop()
            self.trace.stop()
            path = self.run_dir / f"trace-{self.steps[0]}-{self.steps[-1]}.json.gz"
            trace, self.trace = self.trace, None
            try:
                trace.export_chrome_trace(str(path))
            except OSError as error:
                raise UserError(
                    f"{path}: the trace cannot be written ({error.strerror or error}) — free disk space, in the "
                    "temporary folder as well, then --resume, with --profile-steps or without"
                ) from None
            print(f"profile: {path} (open it in ui.perfetto.dev)", flush=True)


class _Enter(torch.autograd.Function):
    """The identity in front of a layer; its backward pass ends the layer's range there."""

    @staticmethod
    def forward(ctx, range_, *tensors):
        ctx.range = range_
        ctx.set_materialize_grads(False)
        return tuple(None if x is None else x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx, *grads):
        ctx.range.__exit__()
        return None, *grads


class _Leave(torch.autograd.Function):
    """The identity behind a layer; its backward pass begins the layer's range there."""

    @staticmethod
    def forward(ctx, range_, *tensors):
        ctx.range = range_
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx, *grads):
        ctx.range.__enter__()
        return None, *grads


def mark_layers(model: Encoder) -> None:
    """Put a range around every layer of the model, forward and backward."""
    plain, names = model.block, {id(layer): f"layer {index}" for index, layer in enumerate(model.layers)}

    def block(layer, delta_ND: Tensor | None, stream_ND: Tensor, places: Places, kept_M: Tensor | None = None):
        name = names[id(layer)]
        backward = Range(f"{name} backward")
        delta_ND, stream_ND = _Enter.apply(backward, delta_ND, stream_ND)
        with Range(name):
            delta_ND, stream_ND = plain(layer, delta_ND, stream_ND, places, kept_M)
        return _Leave.apply(backward, delta_ND, stream_ND)

    model.block = block
