"""Trains and measures the whole family: ``python -m kvlink_core.training.family --help``.

    python -m kvlink_core.training.family base --out runs/family/base
    python -m kvlink_core.training.family tune --base runs/family/base/base.safetensors --out runs/family
    python -m kvlink_core.training.family linked --out runs/family

``tune`` trains every variant with every seed, several processes to a GPU; ``linked`` measures every linker through the
product's own path, on CPU cores. Each writes what it has as it goes and ends by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

VARIANTS = ("k0", "k1", "k5", "wrap", "link-only")
_RECOMPUTING = ("concat", "epic:k=4", "epic:k=8", "cacheblend:ratio=0.15", "cacheblend:ratio=0.3")
MAIN_LINKERS: dict[str, tuple[str, ...]] = {
    "base": ("full", "reposition"),
    "k0": ("full", "reposition"),
    "k1": ("full", "link-tokens"),
    "k5": ("full", "link-tokens"),
    "wrap": ("full", "soft-wrap"),
    "link-only": ("full", "link-tokens"),
}
MORE_LINKERS: dict[str, tuple[str, ...]] = {
    "base": _RECOMPUTING,
    "k0": ("concat", "epic:k=8", "cacheblend:ratio=0.3"),
    "k5": ("concat", "epic:k=8", "cacheblend:ratio=0.3"),
}


def _base(options: argparse.Namespace) -> None:
    from kvlink_core.training.family.train import Job, run

    run(_job(options, Job, variant="base"))


def _one(options: argparse.Namespace) -> None:
    from kvlink_core.training.family.train import Job, run

    run(_job(options, Job, variant=options.variant, base=options.base, pool=options.pool, chunks=options.chunks))


def _job(options: argparse.Namespace, job: Any, **more: Any) -> Any:
    from kvlink_core.training.llama import Shape

    return job(
        out=options.out, layout=options.layout, seed=options.seed, rows=options.rows, steps=options.steps,
        seconds=options.seconds, peak=options.peak, workers=options.workers, device=options.device,
        attention=options.attention, compiled=options.compile, tales=options.tales,
        shape=Shape(width=options.width, layers=options.layers, inner=options.inner), **more,
    )  # fmt: skip


def _pool(options: argparse.Namespace) -> None:
    from kvlink_core.training.family.feed import SETS, make_pool

    sets = tuple(options.sets.split(",")) if options.sets else tuple(name for name, _, _ in SETS)
    make_pool(options.layout / "tokenizer.json", options.pool, options.chunks, options.workers, sets)


def _tune(options: argparse.Namespace) -> None:
    """All variants and seeds, a few at a time on each GPU; a pool of rows is written beside them."""
    options.out.mkdir(parents=True, exist_ok=True)
    here = [sys.executable, "-m", "kvlink_core.training.family"]
    common = ["--layout", options.layout, "--device", options.device, "--attention", options.attention]
    common += ["--layers", options.layers, "--width", options.width, "--inner", options.inner]
    common += ["--compile" if options.compile else "--no-compile", "--tales", options.tales]
    pool = [*here, "pool", "--pool", options.pool, "--chunks", options.chunks, "--workers", options.workers, *common]
    making = subprocess.Popen([str(a) for a in pool])
    waiting: list[tuple[str, list[str]]] = []
    for seed in map(int, options.seeds.split(",")):
        for variant in options.variants.split(","):
            peak = options.peak if variant not in ("wrap", "link-only") else options.peak_frozen
            command = [
                *here, "one", "--variant", variant, "--seed", seed, "--base", options.base, "--pool", options.pool,
                "--chunks", options.chunks, "--out", options.out / f"{variant}-{seed}", "--rows", options.rows,
                "--steps", options.steps, "--seconds", options.seconds, "--peak", peak, *common,
            ]  # fmt: skip
            waiting.append((f"{variant}-{seed}", [str(a) for a in command]))
    failed = in_turn(waiting, options.gpus, options.at_once)
    if making.wait() != 0:
        failed.append("pool")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def in_turn(waiting: list[tuple[str, list[str]]], gpus: int, at_once: int) -> list[str]:
    """Run the named commands, at most ``at_once`` on a GPU, in order; returns the names of those that failed."""
    left: queue.SimpleQueue[tuple[str, list[str]]] = queue.SimpleQueue()
    for entry in waiting:
        left.put(entry)
    failed: list[str] = []

    def work(gpu: int) -> None:
        env = dict(os.environ)
        if gpus > 1:
            env["CUDA_VISIBLE_DEVICES"] = str(gpu)
        while True:
            try:
                name, command = left.get_nowait()
            except queue.Empty:
                return
            if subprocess.run(command, env=env, check=False).returncode != 0:
                failed.append(name)

    workers = [threading.Thread(target=work, args=(gpu,)) for _ in range(at_once) for gpu in range(gpus)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return failed


def _linked(options: argparse.Namespace) -> None:
    """Every linker through the product's path; checked against the masked forward pass where there is one."""
    from kvlink_core.evaluation.tales import Task, grade, held_out

    began = time.time()
    reports = {p.parent.name: json.loads(p.read_text("utf-8")) for p in sorted(options.out.glob("*/report.json"))}
    tasks = []
    sets: dict[str, tuple[dict[str, tuple[str, ...]], ...]]
    sets = {"main": (MAIN_LINKERS,), "more": (MORE_LINKERS,), "all": (MAIN_LINKERS, MORE_LINKERS)}
    for linkers in sets[options.linkers]:
        for seed in sorted({r["seed"] for r in reports.values()}):
            for name, report in reports.items():
                wanted = linkers.get(report["variant"], ())
                if report["seed"] == seed and wanted:
                    tasks.append(Task(options.out / name / "model", wanted))
    found = grade(tasks, tales=options.tales, each=options.each, workers=options.workers, seconds=options.seconds)
    _, asked = held_out(options.tales, options.each)
    table: dict[str, Any] = {}
    for (name, linker), texts in found.items():
        here = [a for a in asked if a.number in texts]
        right = {a.number: texts[a.number] == a.question.answer for a in here}
        row: dict[str, Any] = {"n": len(here), "all": _share(list(right.values()))}
        for kind in sorted({a.question.kind for a in here}):
            chosen = [right[a.number] for a in here if a.question.kind == kind]
            row[kind], row[f"n {kind}"] = _share(chosen), len(chosen)
        masked = reports[name]["questions"].get(_mode(reports[name]["variant"], linker))
        if masked:
            row["differs from the masked pass"] = sum((masked[n] == "1") != r for n, r in right.items())
        row["right"] = "".join("1" if right.get(a.number) else "0" if a.number in right else "-" for a in asked)
        table[f"{name} {linker}"] = row
    summary = {"questions": len(asked), "seconds": round(time.time() - began, 1), "rows": table}
    (options.out / f"linked-{options.linkers}.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    for title, row in table.items():
        print(title, {k: v for k, v in row.items() if k != "right" and not k.startswith("n ")}, flush=True)


def _mode(variant: str, linker: str) -> str:
    if linker == "link-tokens":
        return "k1" if variant == "k1" else "k5"
    return {"full": "full", "reposition": "k0", "soft-wrap": "wrap", "link-tokens:k=1": "k1"}.get(linker, "")


def _share(values: list[bool]) -> float:
    return round(sum(values) / max(len(values), 1), 4)


def _parser() -> argparse.ArgumentParser:
    from kvlink_core.models.describe import EMBEDDED_DIRECTORY

    parser = argparse.ArgumentParser(prog="python -m kvlink_core.training.family", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    for name, run, about in (
        ("base", _base, "train the base with full attention"),
        ("pool", _pool, "write rows for the fine-tunes"),
        ("one", _one, "one fine-tune"),
        ("tune", _tune, "all fine-tunes"),
        ("linked", _linked, "measure every linker through the product's path"),
    ):
        add = commands.add_parser(name, help=about)
        add.set_defaults(run=run)
        add.add_argument("--out", type=Path, default=Path("runs/family"))
        add.add_argument("--layout", type=Path, default=EMBEDDED_DIRECTORY, help="tokenizer and kvlink.json")
        add.add_argument("--base", type=Path, help="base.safetensors")
        add.add_argument("--pool", type=Path, default=Path("/dev/shm/kvlink-family"))
        add.add_argument("--chunks", type=int, default=180, help="chunks of 512 rows in the pool")
        add.add_argument("--sets", default="", help="sets of the pool, by commas; default: all")
        add.add_argument("--variant", choices=VARIANTS, default="k5")
        add.add_argument("--variants", default=",".join(VARIANTS))
        add.add_argument("--seed", type=int, default=0)
        add.add_argument("--seeds", default="0,1,2")
        add.add_argument("--rows", type=int, default=32, help="rows of 1024 tokens a step")
        add.add_argument("--steps", type=int, default=3000, help="steps of a fine-tune")
        add.add_argument("--seconds", type=float, default=240.0, help="limit of training steps or of measuring")
        add.add_argument("--peak", type=float, default=1e-3, help="peak learning rate")
        add.add_argument("--peak-frozen", type=float, default=2e-2, help="the same for embeddings alone")
        add.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 4) - 2))
        add.add_argument("--gpus", type=int, default=1)
        add.add_argument("--at-once", type=int, default=4, help="fine-tunes that share a GPU")
        add.add_argument("--device", default="cuda")
        add.add_argument("--attention", choices=("flex", "dense"), default="flex")
        add.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
        add.add_argument("--tales", type=int, default=300, help="held-out tales")
        add.add_argument("--each", type=int, default=8, help="questions of each tale through the product's path")
        add.add_argument("--linkers", choices=("main", "more", "all"), default="all")
        add.add_argument("--width", type=int, default=256)
        add.add_argument("--layers", type=int, default=8)
        add.add_argument("--inner", type=int, default=512)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the command line."""
    options = _parser().parse_args(arguments)
    options.run(options)


if __name__ == "__main__":
    main()
