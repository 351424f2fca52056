"""How many operator calls a microbatch makes on a GPU by the unasked choice: python -m bench.launches [--write]

Counted on a CPU, on tensors without memory (cramfast/cost/counted.py). Not in it: gathering gradients, the same for
every choice, and that a call may be more than one kernel. Beside it: the attention of kernels/reference.py, a loop over
the sequences, counted on short real ones, since its calls do not depend on lengths.
"""

import argparse
from pathlib import Path

import torch

from cramfast.config import ModelConfig
from cramfast.cost import counted
from cramfast.cost.counted import Calls
from cramfast.errors import command
from cramfast.kernels import reference
from cramfast.recipes import starting_config

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- launches: python -m bench.launches --write -->", "<!-- end of launches -->"
CARDS = (("sm_75", torch.float16), ("sm_86", torch.bfloat16), ("sm_120", torch.bfloat16))
TOKENS, SEQUENCES, LONGEST, MASKED = 65_536, 854, 128, 19_661
GOAL = 1500  # calls, forward and backward


def microbatch(model: ModelConfig, architecture: str, dtype: torch.dtype, sequences: int) -> Calls:
    """Calls of one forward and backward pass by the unasked choice; lengths do not matter to them."""
    lengths = [TOKENS // sequences] * (sequences - 1)
    return counted.microbatch(model, architecture, dtype, [*lengths, TOKENS - sum(lengths)], LONGEST, MASKED)


def loop(sequences: int) -> int:
    """Calls of the reference's attention in one layer, forward and backward."""
    qkv = torch.zeros(2 * sequences, 3, 1, 32, requires_grad=True)
    offsets = torch.arange(0, 2 * sequences + 1, 2, dtype=torch.int32)
    tables = (torch.ones(2, 16), torch.zeros(2, 16))
    with Calls() as calls:
        reference.varlen_attention(qkv, offsets, 2, tables, None).sum().backward()
    return calls.counts.total()


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
        found = {n: microbatch(model, architecture, dtype, n) for n in (SEQUENCES, 100, 3000)}
        calls, used = found[SEQUENCES], counted.implementations(architecture, dtype)
        others = ", ".join(f"{found[n].counts.total():,}" for n in (100, 3000))
        lines.append(
            f"| {architecture}, {str(dtype).removeprefix('torch.')} | {used['attention']} | "
            f"{calls.counts.total():,} | {others} | {calls.bytes / 1e9:.0f} | {old:,} |"
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
