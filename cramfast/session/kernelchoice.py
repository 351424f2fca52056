"""Which implementation of each operator a run takes: what --kernels asks for, and what comes of it."""

from pathlib import Path

import torch

from cramfast.config import TrainConfig
from cramfast.errors import UserError
from cramfast.kernels import dispatch
from cramfast.session.record import read_record

STOCK_ALONE = "auto=stock"  # among --kernels: what is not asked for by name is left to stock PyTorch, untried


def stock_alone(pairs: tuple[str, ...]) -> bool:
    """Whether nothing is to be qualified."""
    return STOCK_ALONE in pairs


def override(pairs: tuple[str, ...], device: str) -> None:
    """Take OPERATOR=IMPLEMENTATION pairs, as in --kernels, on a device.

    Raises:
        UserError: no such operator or implementation, or one that cannot run there.
    """
    for pair in pairs:
        if pair == STOCK_ALONE:
            if device == "cpu":
                raise UserError(
                    f"--kernels {pair}: on a CPU nothing is tried before it runs — leave it out, or take stock "
                    "PyTorch by --kernels all=reference"
                )
            continue
        op, separator, implementation = pair.partition("=")
        if not separator:
            raise UserError(f"--kernels {pair}: no pair — write OPERATOR=IMPLEMENTATION, as attention=reference")
        try:
            dispatch.override(op, implementation, device=device)
        except ValueError as error:
            raise UserError(f"--{error} — python -m cramfast.doctor shows what can run here") from None


def choices(config: TrainConfig) -> list[dispatch.Choice]:
    """What each operator runs on with this config."""
    dtype = getattr(torch, config.dtype)
    return [
        attention(config) if op == "attention" else dispatch.choose(op, config.device, dtype)
        for op in dispatch.OPERATORS
    ]


def attention(config: TrainConfig) -> dispatch.Choice:
    """What attention runs on, in the local layers where there are any."""
    local = config.model.global_every > 1
    return dispatch.choose("attention", config.device, getattr(torch, config.dtype), windowed=local)


def changes(chosen: list[dispatch.Choice], followed: Path) -> list[str]:
    """ "OPERATOR on IMPLEMENTATION" for every operator that the run in `followed` last ran on another one."""
    if not (followed / "metrics.jsonl").exists():
        return []
    before = {row["op"]: row["implementation"] for row in read_record(followed).run.get("kernels", ())}
    return [f"{c.op} on {before[c.op]}" for c in chosen if before.get(c.op, c.implementation) != c.implementation]
