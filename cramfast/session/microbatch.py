"""One microbatch forward and backward: op by op, or captured once in a CUDA graph and replayed."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from cramfast.batches.feed import tensors_of
from cramfast.batches.loader import Batch
from cramfast.config import TrainConfig
from cramfast.errors import UserError
from cramfast.model.encoder import Encoder
from cramfast.optim.adamw import AdamW
from cramfast.runtime.ranges import Range
from cramfast.session import kernelchoice
from cramfast.session.ledger import Clock

Work = Callable[[], None]
WARM_UPS = 2  # before a capture: compilers, autotuners and cuBLAS do their first work, which cannot be captured


class Microbatch:
    """Adds a batch's loss to `loss_sum` and its scaled gradient to the flat buffer (hooks in optim/flat.py gather it).

    Both are times the share of the batch's rows that have a target: divided by `weight` they are means over the targets
    of an update, each of which counts alike, also those of an epoch's last microbatch, which is short.

    Args:
        model, optimizer: what is trained.
        clock: stands still while a graph is captured.
        capture: turns work on fixed buffers into its replay: capture_graph, or None to run op by op.

    Attributes:
        loss_sum: 0-d float32, of the mean losses times their weights.
        weight: 0-d float32, of the microbatches since clear(): 1 for one whose every row has a target.
    """

    def __init__(self, model: Encoder, optimizer: AdamW, clock: Clock, capture: Callable[[Work], Work] | None = None):
        self.model, self.optimizer, self.clock, self.capture = model, optimizer, clock, capture
        self.loss_sum, self.weight = torch.zeros(2, device=optimizer.flat.grad.device)
        self.inputs: Batch | None = None  # the graph's own: a replay reads where the capture read
        self.replay: Work | None = None

    def run(self, batch: Batch, last: bool = False) -> None:
        """Enqueue one forward and backward pass; the host reads nothing.

        In the `last` one of an update run op by op, each part of the gradient leaves for its owner (sharding.py) as
        soon as it is complete; a replay runs no hooks, so after it all of them leave together.

        Raises:
            torch.OutOfMemoryError: the batch is too large.
            UserError: the pass cannot be captured.
        """
        if self.capture is None:
            if last:
                self.optimizer.sharding.expect()
            self.forward_backward(batch)
            return
        if self.inputs is None or shapes(batch) != shapes(self.inputs):
            with self.clock.stopped():
                self.record(batch)
        for name, tensor in tensors_of(batch).items():
            getattr(self.inputs, name).copy_(tensor)
        with Range("microbatch"):
            self.replay()

    def clear(self) -> None:
        """Begin an update."""
        self.loss_sum.zero_()
        self.weight.zero_()

    def forward_backward(self, batch: Batch) -> None:
        with Range("forward"):
            loss = self.model.loss(batch)
            weight = (batch.target_M >= 0).float().mean()  # M is the same in every microbatch of an update
            self.loss_sum += weight * loss.detach()
            self.weight += weight
        with Range("backward"):
            loss.backward(weight * self.optimizer.loss_scale.value)

    def record(self, batch: Batch) -> None:
        """Capture for these shapes. They change between two updates only, with the share of masked tokens, so the
        gradient and the loss that the warm-up adds can be dropped."""
        self.inputs = self.replay = None  # gives the old graph's memory back before the new one takes its own
        self.inputs = replace(batch, **{name: tensor.clone() for name, tensor in tensors_of(batch).items()})
        self.replay = self.capture(partial(self.forward_backward, self.inputs))
        self.clear()
        self.optimizer.flat.grad.zero_()


def shapes(batch: Batch) -> tuple:
    """All that a capture takes from a batch besides the contents of its tensors."""
    return batch.max_seqlen, *(tensor.shape for tensor in tensors_of(batch).values())


def capture_graph(work: Work) -> Work:
    """Run the work on a side stream to warm up, capture it, and return the graph's replay.

    A capture that runs out of memory leaves torch's allocator in the capture, and no smaller one can be tried in this
    process. So the warm-up shows what the work takes, and a capture without room for that again is not begun.

    Raises:
        torch.OutOfMemoryError: in the warm-up, or there is no room for a capture; a smaller batch can be tried.
        UserError: some operation cannot be captured, or memory ran out in the capture all the same.
    """
    side = torch.cuda.Stream()
    taken = warmed_up(work, side)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < taken:
        raise torch.OutOfMemoryError(f"a CUDA graph of the microbatch takes {taken:,} bytes, and {free:,} are free")
    graph = torch.cuda.CUDAGraph()
    try:
        # torch.cuda.graph leaves its stream current when ending a broken capture raises; the outer block does not.
        with torch.cuda.stream(side), torch.cuda.graph(graph, stream=side):
            work()
    except RuntimeError as error:
        if any(isinstance(e, torch.OutOfMemoryError) for e in (error, error.__context__)):
            raise UserError(
                "out of memory while the CUDA graph was captured, after which this process cannot go on — free the GPU "
                "of other work and --resume, or use --graph off or a smaller --microbatch-tokens"
            ) from error
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the CUDA graph cannot be captured ({reason}) — use --graph off") from error
    return graph.replay


def warmed_up(work: Work, side: torch.cuda.Stream) -> int:
    """Run the work op by op on the side stream; the bytes that it took there at most, as a capture will again."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_reserved() - before


def graph_choice(config: TrainConfig) -> tuple[bool, str]:
    """Whether microbatches are captured, and why or why not.

    Raises:
        UserError: graph=on where it cannot be.
    """
    if config.graph == "off":
        return False, "switched off"
    problem = ""
    if config.device != "cuda":
        problem = "only a GPU has them"
    elif kernelchoice.attention(config).implementation == "reference":
        problem = "attention in plain PyTorch reads the sequences' lengths on the host"
    elif config.nvtx == "layers":
        problem = "a replay shows no ranges around layers"
    if problem and config.graph == "on":
        raise UserError(f"graph=on is not possible: {problem} — use --graph auto")
    return not problem, problem or "static shapes: captured once, replayed for every microbatch"
