"""The whole training step beside stock transformers, on the same documents: python -m bench.step --data TEXT...

Every system lives in a process of its own, so that peak memory is its own; the parent lets them train in turn, one
slice of seconds each, so that all share the machine's weather and none runs beside another.
"""

import json
import multiprocessing
import resource
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

SYSTEMS = ("cramfast", "transformers", "transformers compiled")
BATCH_SEQUENCES = 64
MASK_FRACTION = 0.3
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.01}
MAX_NORM = 0.5


@dataclass(frozen=True)
class Options:
    """Measure useful tokens a second, peak memory and time by phase of whole training steps."""

    data: tuple[str, ...]
    """Text to train on: files, folders or globs."""
    documents: Literal["lines", "blocks"] = "lines"
    """What a document is: a line, or a block of lines."""
    sequence_len: int = 128
    layers: int = 4
    width: int = 256
    heads: int = 4
    feedforward: int = 512
    vocab_size: int = 16384
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of every system's matmuls; auto: what this processor multiplies fastest."""
    systems: tuple[str, ...] = field(default=SYSTEMS)
    rounds: int = 5
    """Turns that each system gets."""
    seconds: float = 10.0
    """Least length of a turn."""
    results: Path | None = None
    """Append one JSON line for every system to this file."""


class Sequences:
    """[CLS] ids [SEP] of every chunk of every document, as a stock data collator would see them."""

    def __init__(self, prepared: Path, sequence_len: int):
        from cramfast.loader import PreparedText

        text = PreparedText(prepared, "train")
        body = sequence_len - 2
        self.items = []
        for begin, end in zip(text.offsets[:-1], text.offsets[1:], strict=True):
            for start in range(begin, end, body):
                ids = np.asarray(text.ids[start : min(end, start + body)])
                self.items.append(np.concatenate([[2], ids, [3]]).astype(np.int64))
        self.mean = float(np.mean([len(item) for item in self.items]))


class Cramfast:
    """Our step: packed microbatch of as many useful tokens as the stock batch has on average."""

    def __init__(self, options: Options, prepared: Path):
        import torch

        from cramfast.allocator import keep_freed_memory
        from cramfast.config import ModelConfig
        from cramfast.loader import BatchSource
        from cramfast.model import Encoder
        from cramfast.optim import AdamW, FlatParameters

        keep_freed_memory()  # as cramfast.train does
        tokens = round(Sequences(prepared, options.sequence_len).mean * BATCH_SEQUENCES / 64) * 64
        self.source = BatchSource(
            prepared, split="train", sequence_len=options.sequence_len, batch_tokens=tokens, seed=0
        )
        torch.manual_seed(0)
        self.model = Encoder(
            ModelConfig(
                vocab_size=options.vocab_size,
                layers=options.layers,
                width=options.width,
                heads=options.heads,
                feedforward=options.feedforward,
            )
        )
        self.flat = FlatParameters(self.model, getattr(torch, options.dtype))
        self.optimizer = AdamW(
            self.flat,
            beta1=ADAMW["betas"][0],
            beta2=ADAMW["betas"][1],
            eps=ADAMW["eps"],
            weight_decay=ADAMW["weight_decay"],
            max_norm=MAX_NORM,
        )
        self.index = 0

    def step(self, phases: dict[str, float]) -> int:
        epoch, index = divmod(self.index, self.source.batches(0))
        start = time.perf_counter()
        batch = self.source.batch(epoch, min(index, self.source.batches(epoch) - 1), MASK_FRACTION)
        data = time.perf_counter()
        loss = self.model.loss(batch)
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        self.optimizer.step(ADAMW["lr"], loss.detach(), 1.0)
        end = time.perf_counter()
        self.index += 1
        _add(phases, data=data - start, forward=forward - data, backward=backward - forward, optimizer=end - backward)
        return batch.tokens


class Transformers:
    """The stock step: ModernBertForMaskedLM, padded batches in random order, autocast, clip, fused AdamW."""

    def __init__(self, options: Options, prepared: Path, compiled: bool):
        import torch
        from transformers import ModernBertConfig, ModernBertForMaskedLM

        self.torch = torch
        torch.manual_seed(0)
        config = ModernBertConfig(
            vocab_size=options.vocab_size,
            hidden_size=options.width,
            intermediate_size=options.feedforward,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            max_position_embeddings=options.sequence_len,
            global_attn_every_n_layers=1,
            pad_token_id=0,
            bos_token_id=2,
            cls_token_id=2,
            eos_token_id=3,
            sep_token_id=3,
            attn_implementation="sdpa",
            reference_compile=False,
        )
        self.model = ModernBertForMaskedLM(config).train()
        self.run = torch.compile(self.model, dynamic=True) if compiled else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True, **ADAMW)
        self.vocab_size, self.dtype = options.vocab_size, options.dtype
        self.sequences = Sequences(prepared, options.sequence_len).items
        self.random = np.random.default_rng(0)
        self.order = np.empty(0, dtype=np.int64)

    def batch(self):
        torch = self.torch
        if len(self.order) < BATCH_SEQUENCES:
            self.order = self.random.permutation(len(self.sequences))
        chosen, self.order = self.order[:BATCH_SEQUENCES], self.order[BATCH_SEQUENCES:]
        rows = [self.sequences[i] for i in chosen]
        ids = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
        for row, items in zip(ids, rows, strict=True):
            row[: len(items)] = items
        ids = torch.from_numpy(ids)
        attention = (ids != 0).long()
        chosen = (torch.rand(ids.shape) < MASK_FRACTION) & (ids > 4)
        labels = torch.where(chosen, ids, -100)
        draw = torch.rand(ids.shape)
        ids = torch.where(chosen & (draw < 0.8), 4, ids)
        ids = torch.where(chosen & (draw >= 0.9), torch.randint(5, self.vocab_size, ids.shape), ids)
        return ids, attention, labels

    def step(self, phases: dict[str, float]) -> int:
        torch = self.torch
        start = time.perf_counter()
        ids, attention, labels = self.batch()
        data = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype == "bfloat16"):
            loss = self.run(input_ids=ids, attention_mask=attention, labels=labels).loss
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        end = time.perf_counter()
        _add(phases, data=data - start, forward=forward - data, backward=backward - forward, optimizer=end - backward)
        return int(attention.sum())


def _add(phases: dict[str, float], **seconds: float) -> None:
    for name, value in seconds.items():
        phases[name] = phases.get(name, 0.0) + value


def matmul_share(system, steps: int = 3) -> float:
    """Share of the step's wall clock spent inside matrix products, by torch.profiler."""
    from torch.profiler import ProfilerActivity, profile

    names = ("mm", "addmm", "bmm", "mkldnn_linear", "linear", "_mkl_linear", "baddbmm", "mkldnn_matmul")
    with profile(activities=[ProfilerActivity.CPU]) as record:
        start = time.perf_counter()
        for _ in range(steps):
            system.step({})
        elapsed = time.perf_counter() - start
    inside = sum(e.self_cpu_time_total for e in record.key_averages() if e.key.split("::")[-1] in names)
    return inside / 1e6 / elapsed


def worker(name: str, options: Options, prepared: Path, pipe) -> None:
    """Build one system, then train whenever the parent says so."""
    if name == "cramfast":
        system = Cramfast(options, prepared)
    else:
        system = Transformers(options, prepared, compiled=name.endswith("compiled"))
    for _ in range(8 if name.endswith("compiled") else 2):  # compilation meets several shapes before it settles
        system.step({})
    pipe.send("ready")
    while (seconds := pipe.recv()) is not None:
        phases: dict[str, float] = {}
        tokens = steps = 0
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            tokens += system.step(phases)
            steps += 1
        elapsed = time.perf_counter() - start
        pipe.send({"tokens_per_s": tokens / elapsed, "phases_ms": {k: 1e3 * v / steps for k, v in phases.items()}})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    share = None if name.endswith("compiled") else matmul_share(system)
    pipe.send({"peak_bytes": peak, "matmul_share": share})


def measure(options: Options, prepared: Path) -> list[dict]:
    """One row a system; ratios are medians over rounds of (ours / theirs) in the same round."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, {}
    for name in options.systems:
        pipes[name], child = context.Pipe()
        processes[name] = context.Process(target=worker, args=(name, options, prepared, child), daemon=True)
        processes[name].start()
        child.close()
        pipes[name].recv()  # ready: one after the other, so that no compilation runs beside a measurement
        print(f"{name}: ready", file=sys.stderr)
    turns: dict[str, list[dict]] = {name: [] for name in options.systems}
    for number in range(options.rounds):
        for name in options.systems:
            pipes[name].send(options.seconds)
            turns[name].append(pipes[name].recv())
        line = ", ".join(f"{n} {t[-1]['tokens_per_s']:,.0f}" for n, t in turns.items())
        print(f"round {number + 1}: {line} useful tokens/s", file=sys.stderr)
    rows = []
    for name in options.systems:
        pipes[name].send(None)
        last = pipes[name].recv()
        processes[name].join()
        rates = [t["tokens_per_s"] for t in turns[name]]
        ours = [t["tokens_per_s"] for t in turns[options.systems[0]]]
        phases = {k: statistics.median(t["phases_ms"][k] for t in turns[name]) for k in turns[name][0]["phases_ms"]}
        rows.append(
            {
                "system": name,
                "tokens_per_s": statistics.median(rates),
                "ours_speedup": statistics.median(o / r for o, r in zip(ours, rates, strict=True)),
                "phases_ms": phases,
                **last,
            }
        )
    return rows


def show(rows: list[dict]) -> None:
    """The table a person reads."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("system", "useful tokens/s", "ours is", "peak GB", "matmul share", "ms a step by phase"):
        table.add_column(column, justify="left" if column in ("system", "ms a step by phase") else "right")
    for row in rows:
        share = row["matmul_share"]
        table.add_row(
            row["system"],
            f"{row['tokens_per_s']:,.0f}",
            f"{row['ours_speedup']:.2f}x",
            f"{row['peak_bytes'] / 1e9:.2f}",
            "" if share is None else f"{share:.0%}",
            ", ".join(f"{k} {v:.1f}" for k, v in row["phases_ms"].items()),
        )
    Console(width=130).print(table)


def main() -> None:
    """Prepare the text, measure, print, append to the results file."""
    import tyro

    from bench import machine
    from cramfast.prepare import prepare
    from cramfast.recipes import choose_dtype

    options = tyro.cli(Options, description=__doc__)
    if options.dtype == "auto":
        options = replace(options, dtype=choose_dtype("cpu"))
    prepared = prepare(options.data, None, vocab_size=options.vocab_size, documents=options.documents)
    rows = measure(options, prepared)
    show(rows)
    if options.results:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items() if k != "results"}
        settings["data"] = [Path(p).name for p in options.data]
        options.results.parent.mkdir(parents=True, exist_ok=True)
        with options.results.open("a") as out:
            for row in rows:
                out.write(json.dumps(row | settings | machine.description()) + "\n")


if __name__ == "__main__":
    from cramfast.errors import command

    command(main)
