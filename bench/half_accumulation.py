"""What sums in half precision do to the loss, on any machine: python -m bench.half_accumulation --data TEXT.

GeForce cards multiply float16 twice as fast where the sum is float16 too (--half-accumulation). No CPU has such sums,
so they are made by hand: after every four products, as the tensor cores of a T4 take them (Fasi et al., PeerJ Computer
Science 7:e330), the sum so far is rounded to float16, from the first term of a row to the last. A GPU that splits a
long sum rounds less.

Three runs with the same seed and text: `float32`; `float16`, whose linear layers take rounded inputs and round their
results, in forward pass and input gradient; `float16 sums`, which round the sums on the way as well. All else stays
float32, the sums of weight gradients included, so that a difference between the last two is the effect asked for.
Every finished run is a line of --results and is not made again.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numba
import numpy as np
import torch
import tyro
from rich.console import Console
from torch import Tensor

from bench import machine
from bench.ablations import spread, train_once
from bench.tables import append, read
from cramfast import stages
from cramfast.config import TrainConfig, config_hash, require
from cramfast.errors import UserError, command
from cramfast.kernels import linear
from cramfast.model import encoder
from cramfast.pages.scoretable import ScoreTable
from cramfast.recipes import plain, resolve
from cramfast.runtime.allocator import keep_freed_memory
from cramfast.session.budget import Budget

TERMS = 4  # products between two roundings
SCALE = 2.0**16  # of gradients before they are rounded, as float16 training starts with (optim.LossScale)
SYSTEMS = ("float32", "float16", "float16 sums")
LENGTHS = (128, 256, 768, 1152, 2304)  # of the sums in the linear layers of the presets


@dataclass(frozen=True)
class Options:
    """Train each way with every seed; print the losses and the errors of single products."""

    data: tuple[str, ...] = ()
    """Text, as cramfast.train takes it; nothing: docstrings found on this machine."""
    results: Path = Path("half-accumulation.jsonl")
    """One JSON line for every run."""
    preset: str = "tiny"
    width: int = 0
    """Of the model, its feed-forward block half as wide again; 0 leaves the preset's."""
    tokens: int = 3_200_000
    seeds: int = 3
    threads: int = 0
    """CPU threads; 0 leaves the choice to torch."""

    def __post_init__(self):
        for key, least in (("tokens", 1), ("seeds", 1), ("threads", 0)):
            require(getattr(self, key) >= least, f"--{key} {getattr(self, key)}", f"use {least} or more")
        require(self.width >= 0 and self.width % 64 == 0, f"--width {self.width}", "use 0 or a multiple of 64")


@numba.njit(inline="always")
def half(x):
    """The nearest float16, as a float32: 11 bits by Veltkamp's splitting, multiples of 2^-24 below the normal ones."""
    wide = x * np.float32(8193.0)
    normal = wide - (wide - x)
    small = (x + np.float32(0.75)) - np.float32(0.75)
    size = abs(x)
    rounded = small if size < np.float32(2.0**-14) else normal
    return rounded if size < np.float32(65520.0) else np.float32(np.inf) * x


@numba.njit(parallel=True, cache=True)
def _sums(x_NK, weight_KE, out_NE):
    N, K = x_NK.shape
    for n in numba.prange(N):
        row_E = out_NE[n]
        row_E[:] = 0
        for k in range(0, K, TERMS):
            a, b, c, d = x_NK[n, k], x_NK[n, k + 1], x_NK[n, k + 2], x_NK[n, k + 3]
            for e in range(len(row_E)):
                products = (a * weight_KE[k, e] + b * weight_KE[k + 1, e]) + (
                    c * weight_KE[k + 2, e] + d * weight_KE[k + 3, e]
                )
                row_E[e] = half(row_E[e] + products)


def product_in_half(x_NK: Tensor, weight_KE: Tensor) -> Tensor:
    """x weight, (N, K), (K, E) -> (N, E) float32 with values of float16, every sum rounded after TERMS products."""
    rounded = (tensor.half().float().contiguous() for tensor in (x_NK, weight_KE))
    out_NE = torch.empty(x_NK.shape[0], weight_KE.shape[1])
    _sums(*(tensor.detach().numpy() for tensor in rounded), out_NE.numpy())
    return out_NE


def product_of_half(x_NK: Tensor, weight_KE: Tensor) -> Tensor:
    """As product_in_half(), but the sums are float32 and rounded once, at their end."""
    return (x_NK.half().float() @ weight_KE.half().float()).half().float()


WAYS = {"float16": product_of_half, "float16 sums": product_in_half}


def train_by(system: str, config: TrainConfig, prepared: Path, budget: Budget) -> dict:
    """A run whose linear layers multiply as `system` says; gradients are scaled for it as in float16 training."""
    if system == "float32":
        return train_once(config, prepared, budget)
    multiply = WAYS[system]
    products = {
        "product": lambda x_ND, weight_ED: multiply(x_ND, weight_ED.t()),
        "input_gradient": lambda dy_NE, weight_ED: multiply(dy_NE * SCALE, weight_ED) / SCALE,
    }
    with mock.patch.multiple(linear, **products), mock.patch.object(encoder, "linear", linear.LinearFunction.apply):
        return train_once(config, prepared, budget)


def product_errors() -> ScoreTable:
    """Root mean square errors of products of standard normal numbers, relative to that of the exact result."""
    g = torch.Generator().manual_seed(0)
    lines = []
    for terms in LENGTHS:
        x_NK, weight_KE = (torch.randn(shape, generator=g).half().float() for shape in ((64, terms), (terms, 256)))
        exact = x_NK.double() @ weight_KE.double()
        errors = [float((f(x_NK, weight_KE) - exact).norm() / exact.norm()) for f in WAYS.values()]
        lines.append([f"{terms:,}", *(f"{error:.1e}" for error in errors), f"{errors[1] / errors[0]:.1f}×"])
    return ScoreTable("Errors of a product", ["terms", *WAYS, "worse"], lines, [])


def losses(rows: list[dict]) -> ScoreTable:
    """Held-out losses, and the differences to float16 of the same seed; mean ± standard deviation over the seeds."""
    found = {(row["system"], row["seed"]): row["heldout_loss"] for row in rows}
    lines = []
    for system in SYSTEMS:
        seeds = sorted(seed for name, seed in found if name == system)
        differences = [found[system, s] - found["float16", s] for s in seeds if ("float16", s) in found]
        skipped = sum(row["skipped"] for row in rows if row["system"] == system)
        values = [found[system, seed] for seed in seeds]
        lines.append([system, spread(values), spread(differences, "+"), str(skipped), str(len(seeds))])
    columns = ["products", "held-out loss", "Δ to float16", "updates skipped", "seeds"]
    return ScoreTable("Losses", columns, lines, ["Nats per masked token, 15 % masked."])


def config_of(options: Options) -> TrainConfig:
    """The preset in float32 on a CPU, as wide as asked for."""
    config = replace(plain(options.preset, "cpu"), device="cpu", dtype="float32", data=options.data)
    if options.width:
        shape = {"width": options.width, "heads": options.width // 64, "feedforward": options.width * 3 // 2}
        config = replace(config, model=replace(config.model, **shape))
    return resolve(config)


def main() -> None:
    """Train what has no line yet, print."""
    options = tyro.cli(Options, description=__doc__)
    keep_freed_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    numba.set_num_threads(torch.get_num_threads())
    product_errors().show(Console())
    prepared, config = stages.prepare_text(config_of(options))
    plan = {"preset": options.preset, "config": config_hash(config), "tokens": options.tokens}
    rows = read(options.results) if options.results.exists() else []
    if not rows:
        append(options.results, {"plan": plan} | machine.description())
    elif rows[0].get("plan") != plan:
        raise UserError(f"{options.results}: begun with {rows[0].get('plan')}, not {plan} — choose another --results")
    done = {(row["system"], row["seed"]) for row in rows[1:]}
    for seed in range(options.seeds):
        for system in SYSTEMS:
            if (system, seed) in done:
                continue
            print(f"{system}, seed {seed}", flush=True)
            found = train_by(system, replace(config, seed=seed), prepared, Budget("tokens", options.tokens))
            append(options.results, {"system": system, "seed": seed} | found)
    table = losses(read(options.results)[1:])
    table.show(Console(width=130))
    print(f"\n{table.markdown()}")


if __name__ == "__main__":
    command(main)
