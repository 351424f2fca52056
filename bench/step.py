"""The whole training step beside stock transformers, on the same documents: python -m bench.step --data TEXT...

Every system lives in a process of its own, so that peak memory is its own; the parent lets them train in turn, one
slice of seconds each, so that all share the machine's weather and none runs beside another. On a GPU three systems hold
their memory at the same time.
"""

import multiprocessing
import resource
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

from bench.systems import MASK_FRACTION, Options, Sequences
from cramfast.errors import UserError

PROFILED_STEPS = 3
LEAST_STEPS = 3  # of a turn: the first ones after the others' turns are slow, twice as slow for eager transformers
WARM_UPS = {"cpu": 2, "cpu compiled": 8, "cuda": 3, "cuda compiled": 3}  # on a CPU compilation meets several shapes


def matmul_share(system, steps: int = PROFILED_STEPS) -> float:
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


def build(name: str, options: Options, prepared: Path):
    """A system by its name, and what one step of it is called with on this device."""
    if options.device == "cuda":
        from bench import gpu_systems

        return gpu_systems.build(name, options, prepared)
    from bench import systems

    if name == "cramfast":
        return systems.Cramfast(options, prepared)
    if name not in ("transformers", "transformers compiled"):
        raise UserError(f"--systems {name!r}: not known on a CPU — one of {', '.join(systems.SYSTEMS['cpu'])}")
    return systems.Transformers(options, prepared, compiled=name.endswith("compiled"))


def turn(system, device: str, seconds: float) -> dict:
    """Train so long and LEAST_STEPS at least; useful tokens a second and, on a CPU, ms a step by phase."""
    phases: dict[str, float] = {}
    tokens = steps = 0
    start = time.perf_counter()
    while steps < LEAST_STEPS or time.perf_counter() - start < seconds:
        tokens += system.step(phases) if device == "cpu" else system.step()
        steps += 1
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    return {"tokens_per_s": tokens / elapsed, "phases_ms": {k: 1e3 * v / steps for k, v in phases.items()}}


def closing(system, name: str, device: str) -> dict:
    """Peak memory of this process and, measured apart from the turns, where a step's time goes."""
    if device == "cuda":
        import torch

        from bench import phases

        peak = torch.cuda.max_memory_allocated()
        return {"peak_bytes": peak} | phases.profiled(system.step, PROFILED_STEPS)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_bytes": peak, "matmul_share": None if name.endswith("compiled") else matmul_share(system)}


def worker(name: str, options: Options, prepared: Path, pipe) -> None:
    """Build one system, then train whenever the parent says so. Sends "" when ready, or why it cannot be."""
    device = options.device
    try:
        system = build(name, options, prepared)
        for _ in range(WARM_UPS[f"{device} compiled" if name.endswith("compiled") else device]):
            system.step({}) if device == "cpu" else system.step()
    except (UserError, RuntimeError, ValueError, TypeError, ImportError) as error:  # the others are still measured
        pipe.send(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
        return
    pipe.send("")
    while (seconds := pipe.recv()) is not None:
        pipe.send(turn(system, device, seconds))
    pipe.send(closing(system, name, device))


def started(options: Options, prepared: Path):
    """(pipes, processes, faults) by name of system, when all are ready.

    On a CPU they start one after the other. On a GPU they compile side by side, which takes most of the time.

    Raises:
        UserError: the first of them, ours, cannot run.
    """
    context = multiprocessing.get_context("spawn")
    pipes, processes, faults = {}, {}, {}

    def wait_for(name: str) -> None:
        if fault := pipes[name].recv():
            faults[name] = fault
            processes.pop(name).join()
        print(f"{name}: {fault or 'ready'}", file=sys.stderr)

    for name in options.systems:
        pipes[name], child = context.Pipe()
        processes[name] = context.Process(target=worker, args=(name, options, prepared, child), daemon=True)
        processes[name].start()
        child.close()
        if options.device == "cpu":
            wait_for(name)  # so that no compilation runs beside another
    if options.device == "cuda":
        for name in options.systems:
            wait_for(name)
    if options.systems[0] in faults:
        raise UserError(f"{options.systems[0]}: {faults[options.systems[0]]}")
    return pipes, processes, faults


def measure(options: Options, prepared: Path) -> list[dict]:
    """One row a system; ratios are medians over rounds of (ours / theirs) in the same round."""
    pipes, processes, faults = started(options, prepared)
    turns: dict[str, list[dict]] = {name: [] for name in processes}
    for number in range(options.rounds):
        for name in processes:
            pipes[name].send(options.seconds)
            turns[name].append(pipes[name].recv())
        line = ", ".join(f"{n} {t[-1]['tokens_per_s']:,.0f}" for n, t in turns.items())
        print(f"round {number + 1}: {line} useful tokens/s", file=sys.stderr)
    rows = [{"system": name, "fault": fault} for name, fault in faults.items()]
    for name, process in processes.items():
        pipes[name].send(None)
        last = pipes[name].recv()
        process.join()
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


def with_mfu(rows: list[dict], options: Options, prepared: Path) -> list[dict]:
    """The rows with `mfu`: useful FLOPs a second, padding not counted, in percent of the matmul peak measured now."""
    import torch

    from bench import machine
    from cramfast.model.encoder import flops_per_token

    lengths = Sequences(prepared, options.sequence_len).lengths
    attended = float((lengths**2).sum() / lengths.sum())
    flops = flops_per_token(options.model(), MASK_FRACTION, attended)
    peak = machine.matmul_flops(getattr(torch, options.dtype), "cuda")
    more = {"flops_per_token": flops, "matmul_peak_flops": peak}
    for row in rows:
        if "fault" not in row:
            row |= more | {"mfu": 100 * row["tokens_per_s"] * flops / peak}
    return rows


def show(rows: list[dict], device: str) -> None:
    """The table a person reads."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    share = "matmul share" if device == "cpu" else "MFU"
    for column in ("system", "useful tokens/s", "ours is", "peak GB", share, "ms a step by phase"):
        table.add_column(column, justify="left" if column in ("system", "ms a step by phase") else "right")
    for row in rows:
        if "fault" in row:
            table.add_row(row["system"], "", "", "", "", row["fault"])
            continue
        part = row["matmul_share"] if device == "cpu" else row["mfu"] / 100
        table.add_row(
            row["system"],
            f"{row['tokens_per_s']:,.0f}",
            f"{row['ours_speedup']:.2f}x",
            f"{row['peak_bytes'] / 1e9:.2f}",
            "" if part is None else f"{part:.0%}",
            ", ".join(f"{k} {v:.1f}" for k, v in row["phases_ms"].items()),
        )
    Console(width=130).print(table)


def main() -> None:
    """Prepare the text, measure, print, append to the results file."""
    import tyro

    from bench import goals, machine, tables
    from cramfast.prepare import prepare

    options = tyro.cli(Options, description=__doc__).resolved()
    if options.results:
        tables.append(options.results)
    prepared = prepare(options.data, None, vocab_size=options.vocab_size, documents=options.documents)
    rows = measure(options, prepared)
    if options.device == "cuda":
        rows = with_mfu(rows, options, prepared)
    show(rows, options.device)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items() if k != "results"}
    settings["data"] = [Path(p).name for p in options.data]
    rows = [row | settings | machine.description(options.device) for row in rows]
    if options.device == "cuda":
        for verdict in goals.verdicts(goals.step_rows(rows)):
            if verdict.goal.what == "step":
                print(f"goal {verdict.goal.text()}: {verdict.text()}")
    if options.results:
        tables.append(options.results, *rows)


if __name__ == "__main__":
    from cramfast.errors import command

    command(main)
