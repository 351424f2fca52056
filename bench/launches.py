"""How many operator calls a microbatch makes on a GPU by the unasked choice: python -m bench.launches [--write]

Counted on a CPU: tensors are torch's "meta" ones, which have shapes and no memory, and dispatch is told that the card
is there; so each operator, torch's varlen attention too, runs as its own shape rule and is one call. Views and
allocations launch nothing and are left out. Bytes are those of the tensors that a call takes and gives. Nothing can be
read from a meta tensor: a choice that waits for the device fails here. Beside it: the attention of
kernels/reference.py, a loop over the sequences, counted on short real ones, since its calls do not depend on lengths.
"""

import argparse
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cramfast.batches.loader import Batch
from cramfast.config import ModelConfig
from cramfast.errors import command
from cramfast.kernels import dispatch, peers, reference
from cramfast.model.encoder import Encoder
from cramfast.recipes import starting_config

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- launches: python -m bench.launches --write -->", "<!-- end of launches -->"
CARDS = (("sm_75", torch.float16), ("sm_86", torch.bfloat16), ("sm_120", torch.bfloat16))
TOKENS, SEQUENCES, LONGEST, MASKED = 65_536, 854, 128, 19_661
GOAL = 1500  # calls, forward and backward
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "_unsafe_view")


class Calls(TorchDispatchMode):
    """Counts operator calls that launch work, and the bytes of their tensors."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = Counter[str](), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        if not function.is_view and name not in ALLOCATIONS:
            self.calls[name] += 1
            for value in (*args, *(result if isinstance(result, tuple) else (result,))):
                self.bytes += value.nbytes if isinstance(value, torch.Tensor) else 0
        return result


def microbatch(model: ModelConfig, architecture: str, dtype: torch.dtype, sequences: int) -> tuple[Calls, dict]:
    """(calls of one forward and backward pass, implementation of each operator) on a card without other packages."""
    used: dict[str, str] = {}

    def pick(op, tensor, windowed=False):
        used[op] = dispatch.choose(op, "cuda", dtype, windowed).implementation
        return used[op], dispatch.IMPLEMENTATIONS[op][used[op]].function

    with (
        mock.patch.object(dispatch, "architecture", lambda device: architecture),
        mock.patch.object(dispatch, "pick", pick),
        mock.patch.object(peers, "installed", lambda module: False),
        mock.patch.object(Encoder, "initialise", lambda self: None),
        torch.device("meta"),
    ):
        encoder = Encoder(model)
        for parameter in encoder.parameters():
            if parameter.dim() >= 2:
                parameter.data = parameter.data.to(dtype)
        batch = Batch(
            torch.empty(TOKENS, dtype=torch.int32), torch.empty(sequences + 1, dtype=torch.int32),
            torch.empty(MASKED, dtype=torch.long), torch.empty(MASKED, dtype=torch.long), LONGEST, TOKENS,
        )  # fmt: skip
        with Calls() as calls:
            encoder.loss(batch).backward()
    return calls, used


def loop(sequences: int) -> int:
    """Calls of the reference's attention in one layer, forward and backward."""
    qkv = torch.zeros(2 * sequences, 3, 1, 32, requires_grad=True)
    offsets = torch.arange(0, 2 * sequences + 1, 2, dtype=torch.int32)
    tables = (torch.ones(2, 16), torch.zeros(2, 16))
    with Calls() as calls:
        reference.varlen_attention(qkv, offsets, 2, tables, None).sum().backward()
    return sum(calls.calls.values())


def table(model: ModelConfig) -> str:
    """The page's table: calls at three numbers of sequences, bytes, and the loop's calls."""
    old = model.layers * loop(SEQUENCES)
    lines = [
        f"One microbatch of `base`, {TOKENS:,} tokens in {SEQUENCES} sequences of up to {LONGEST}, forward and "
        f"backward, counted by `python -m bench.launches` with torch {torch.__version__.split('+')[0]} (goal: {GOAL:,} "
        "calls, the same for any number of sequences; no card was at hand):",
        "",
        "| card, dtype | attention | calls | with 100, 3,000 sequences | GB of tensors | the loop's attention alone |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for architecture, dtype in CARDS:
        counted = {n: microbatch(model, architecture, dtype, n) for n in (SEQUENCES, 100, 3000)}
        calls, used = counted[SEQUENCES]
        others = ", ".join(f"{sum(counted[n][0].calls.values()):,}" for n in (100, 3000))
        lines.append(
            f"| {architecture}, {str(dtype).removeprefix('torch.')} | {used['attention']} | "
            f"{sum(calls.calls.values()):,} | {others} | {calls.bytes / 1e9:.0f} | {old:,} |"
        )
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write the table into docs/{PAGE.name}")
    made = table(starting_config("base", None, "cuda").model)
    if parser.parse_args().write:
        text = PAGE.read_text(encoding="utf-8")
        head, rest = text.split(BEGIN)
        PAGE.write_text(f"{head}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    print(made)


if __name__ == "__main__":
    command(main)
