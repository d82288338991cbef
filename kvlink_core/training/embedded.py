"""Trains the embedded model from scratch: ``python -m kvlink_core.training.embedded --help``.

    python -m kvlink_core.training.embedded train --out runs/embedded
    python -m kvlink_core.training.embedded export --checkpoint runs/embedded --to kvlink_core/embedded
    python -m kvlink_core.training.embedded test --model kvlink_core/embedded

One model learns all modes at once (full attention; the segment mask with 5, 1 and 0 link tokens) on worlds that no
seed of the held-out ranges makes. Training may be cut in several runs (``--resume``); the learning rate follows the
share of ``--total-minutes`` that has passed. Weights depend on the wall clock through that schedule, the worlds and the
initial weights on seeds only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import queue
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer

from kvlink_core.training.batches import IGNORED, KINDS, MODES, Generator, Rows, evaluation_rows
from kvlink_core.training.checkpoint import load_checkpoint, optimizer_tensors, restore_optimizer, save_checkpoint
from kvlink_core.training.curriculum import LAST, STAGES, Progress
from kvlink_core.training.export import export_tokenizer, export_weights
from kvlink_core.training.llama import Shape, TrainingLlama, attend_dense, dense_mask, flex_attention_pair
from kvlink_core.training.measure import TAGS, Forward, count, evaluate, line, report, to_device
from kvlink_core.training.tokenizer import FastEncoder, build_tokenizer
from kvlink_core.training.worlds import TEST_SEEDS, VALIDATION_SEEDS


def learning_rate(peak: float, passed: float, decay_from: float) -> float:
    """Warm up over the first 1 % of the schedule, hold, then fall on a cosine to 1 % of the peak."""
    if passed < 0.01:
        return peak * max(passed, 1e-4) / 0.01
    if passed < decay_from:
        return peak
    done = min(1.0, (passed - decay_from) / (1.0 - decay_from))
    return peak * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * done)))


class _Feed:
    """Collects the workers' chunks into batches on the device, in a thread, a few batches ahead."""

    def __init__(self, generator: Generator, chunks: int, device: torch.device) -> None:
        self._generator, self._chunks, self._device = generator, chunks, device
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=4)
        self._stop = False
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            while not self._stop:
                parts = [self._generator.take() for _ in range(self._chunks)]
                rows = Rows(
                    np.concatenate([p.tokens for p in parts], axis=1),
                    np.concatenate([p.answers for p in parts], axis=1),
                    np.concatenate([p.tags for p in parts], axis=0),
                )
                self._ready.put(to_device(rows, self._device))
        except Exception as error:  # handed to the training loop, which raises it
            self._ready.put(error)

    def next(self) -> tuple[Tensor, Tensor, Tensor]:
        item = self._ready.get()
        if isinstance(item, Exception):
            raise item
        tokens, answers, tags = item
        return tokens, answers, tags

    def stop(self) -> None:
        self._stop = True


def make_forward(model: TrainingLlama, device: torch.device, attention: str, compiled: bool) -> Forward:
    """The model as a function of the packed integers, under bfloat16 autocast on CUDA."""
    make_mask: Any = dense_mask
    if attention == "flex":
        make_mask, model.attend = flex_attention_pair()
    run: Any = torch.compile(model, dynamic=False) if compiled else model

    def forward(ids: Tensor, positions: Tensor, ctx: Tensor, doc: Tensor, asked: Tensor, at: Tensor) -> Tensor:
        mask = make_mask(ctx, doc, asked)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=device.type == "cuda"):
            logits: Tensor = run(ids, positions, mask, at)
        return logits

    return forward


def held_out(encoder: FastEncoder, seeds: range, worlds: int, new_words: bool = False) -> list[Rows]:
    """The same worlds, encoded for each mode."""
    chosen = range(seeds.start, seeds.start + worlds)
    return [evaluation_rows(encoder, chosen, mode, new_words=new_words) for mode in range(len(MODES))]


def evaluate_all(forward: Forward, held: list[Rows], device: torch.device, rows_each: int) -> dict[str, Any]:
    """The report over all modes."""
    total = torch.zeros(2, TAGS, device=device)
    for rows in held:
        total += evaluate(forward, rows, device, rows_each)
    return report(total)


def train(options: argparse.Namespace) -> None:
    """Train until ``--minutes`` have passed; write checkpoints, a log and a report to ``--out``."""
    began = time.monotonic()
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    options.out.mkdir(parents=True, exist_ok=True)
    log = (options.out / "log.txt").open("w", encoding="utf-8")

    def say(text: str) -> None:
        print(text, flush=True)
        log.write(text + "\n")
        log.flush()

    folder = options.tokenizer
    if folder is None:
        folder = options.out / "tokenizer"
        export_tokenizer(build_tokenizer(), folder)
    encoder = FastEncoder(folder / "tokenizer.json")
    shape = Shape(width=options.width, layers=options.layers, inner=options.inner)
    model = TrainingLlama(shape, seed=options.seed, attend=attend_dense).to(device)
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    decayed = [p for p in names if p.ndim == 2]
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": [p for p in names if p.ndim != 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=options.peak, betas=(0.9, 0.98), fused=device.type == "cuda")
    progress, step, spent, runs = Progress(), 0, 0.0, 0
    if options.resume is not None:
        tensors, state = load_checkpoint(options.resume)
        model.load_state_dict({n: tensors[n] for n in names.values()})
        progress = Progress(**state["progress"])
        step, spent, runs = state["step"], state["spent"], state["runs"]
        restore_optimizer(optimizer, names, tensors, step)
    forward = make_forward(model, device, options.attention, options.compile)

    def save(final: bool = False) -> None:
        state = {"step": step, "spent": spent, "runs": runs + 1, "progress": asdict(progress), "shape": asdict(shape)}
        state["tokens"] = step * options.rows * 1024
        tensors = {name: parameter for parameter, name in names.items()}
        save_checkpoint(options.out, {**tensors, **optimizer_tensors(optimizer, names)}, state)
        if final:
            say(f"checkpoint in {options.out}")

    with Generator(folder / "tokenizer.json", options.workers, runs, options.rows_each) as generator:
        generator.set_stage(progress.stage)
        validation = held_out(encoder, VALIDATION_SEEDS, options.validation_worlds)
        feed = _Feed(generator, options.rows // options.rows_each, device)
        tally = torch.zeros(2, TAGS, device=device)
        losses = torch.zeros((), device=device)
        since, first, waited = 0, True, 0.0
        last_tick = last_eval = time.monotonic()
        say(f"{sum(p.numel() for p in names):,} parameters, ready after {time.monotonic() - began:.0f} s")
        while (time.monotonic() - began) < options.minutes * 60 and spent < options.total_minutes * 60:
            tick = time.monotonic()
            tokens, answers, tags = feed.next()
            waited += time.monotonic() - tick
            rate = learning_rate(options.peak, spent / (options.total_minutes * 60), options.decay_from)
            for group in optimizer.param_groups:
                group["lr"] = rate
            ids, positions, context, document, question = tokens.unbind(0)
            logits = forward(ids, positions, context, document, question, answers[0])
            loss = F.cross_entropy(logits.flatten(0, 1), answers[1].flatten(), ignore_index=IGNORED)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step, since = step + 1, since + 1
            losses += loss.detach()
            tally += count(logits.detach(), answers, tags)
            if since == options.every:
                current = tally.view(2, 16, len(MODES), len(KINDS))[:, 1, :2].sum((1, 2)).tolist()
                mean = float(losses) / since
                now = time.monotonic()
                # The first steps compile: they do not count towards the schedule.
                spent += 0.0 if first else now - last_tick
                speed = since * options.rows * 1024 / (now - last_tick)
                if step % (options.every * options.print_each) == 0:
                    say(
                        f"step {step} {spent:.0f}s stage {progress.stage} loss {mean:.4f} lr {rate:.1e} "
                        f"{speed / 1e6:.2f} Mtok/s waited {waited:.1f}s "
                        f"| current {current[0] / max(current[1], 1):.3f} | {line(report(tally))}"
                    )
                if progress.update(int(current[0]), int(current[1]), spent, options.patience * 60):
                    say(f"stage {progress.stage} of {LAST} after {spent:.0f}s, step {step}: {STAGES[progress.stage]}")
                    generator.set_stage(progress.stage)
                tally.zero_()
                losses.zero_()
                since, first, last_tick = 0, False, now
            if time.monotonic() - last_eval > options.evaluate_each:
                say(f"validation at step {step}: {line(evaluate_all(forward, validation, device, options.rows))}")
                save()
                last_eval = time.monotonic()
        feed.stop()
    result = evaluate_all(forward, validation, device, options.rows)
    say(f"validation at the end, step {step}: {line(result)}")
    summary = {"step": step, "spent_s": spent, "tokens": step * options.rows * 1024, "validation": result}
    (options.out / "report.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    save(final=True)


def export(options: argparse.Namespace) -> None:
    """Write the Hugging Face directory from a checkpoint."""
    tensors, state = load_checkpoint(options.checkpoint)
    tokenizer = build_tokenizer() if options.tokenizer is None else AutoTokenizer.from_pretrained(options.tokenizer)
    export_tokenizer(tokenizer, options.to)
    weights = {name: tensor for name, tensor in tensors.items() if name[:2] not in ("m.", "v.")}
    export_weights(Shape(**state["shape"]), weights, tokenizer, options.to)


def test(options: argparse.Namespace) -> None:
    """Exact match of an exported model on the test seeds, in float32, as a table and as JSON."""
    from safetensors.torch import load_file

    config = json.loads((options.model / "config.json").read_text(encoding="utf-8"))
    shape = Shape(
        config["vocab_size"], config["hidden_size"], config["num_hidden_layers"], inner=config["intermediate_size"]
    )
    device = torch.device(options.device)
    model = TrainingLlama(shape).to(device).eval()
    model.load_state_dict({k: v.float() for k, v in load_file(str(options.model / "model.safetensors")).items()})

    def forward(ids: Tensor, positions: Tensor, ctx: Tensor, doc: Tensor, asked: Tensor, at: Tensor) -> Tensor:
        logits: Tensor = model(ids, positions, dense_mask(ctx, doc, asked), at)
        return logits

    held = held_out(FastEncoder(options.model / "tokenizer.json"), TEST_SEEDS, options.worlds, options.new_words)
    with torch.no_grad():
        total = sum(evaluate(forward, rows, device, rows_each=4, crop=True) for rows in held)
    assert isinstance(total, Tensor)
    result = report(total)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("| mode | n | all | " + " | ".join(KINDS) + " |\n" + "| --- " * (3 + len(KINDS)) + "|")
    for name, row in result.items():
        print(f"| {name} | {row['n']} | {row['all']:.4f} | " + " | ".join(f"{row[k]:.4f}" for k in KINDS) + " |")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kvlink_core.training.embedded", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    add = commands.add_parser("train", help="train, or go on with --resume")
    add.set_defaults(run=train)
    add.add_argument("--out", type=Path, required=True, help="folder for the checkpoint, log and report")
    add.add_argument("--resume", type=Path, help="folder of the checkpoint to go on from")
    add.add_argument("--tokenizer", type=Path, help="folder with a tokenizer.json (default: build it)")
    add.add_argument("--minutes", type=float, default=14.0, help="wall-clock limit of this run, start-up included")
    add.add_argument("--total-minutes", type=float, default=12.3, help="length of the schedule over all runs")
    add.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add.add_argument("--attention", choices=("flex", "dense"), default="flex")
    add.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    add.add_argument("--rows", type=int, default=64, help="rows of 1024 tokens a step")
    add.add_argument("--rows-each", type=int, default=16, help="rows in a worker's chunk; must divide --rows")
    add.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 4) - 2))
    add.add_argument("--peak", type=float, default=1.5e-3, help="peak learning rate")
    add.add_argument("--decay-from", type=float, default=0.45, help="share of the schedule after which it decays")
    add.add_argument("--weight-decay", type=float, default=0.05)
    add.add_argument("--patience", type=float, default=1.2, help="most minutes in one stage of the curriculum")
    add.add_argument("--every", type=int, default=20, help="steps between looks at the accuracy")
    add.add_argument("--print-each", type=int, default=5, help="looks between printed lines")
    add.add_argument("--evaluate-each", type=float, default=60.0, help="seconds between validations and checkpoints")
    add.add_argument("--validation-worlds", type=int, default=250)
    add.add_argument("--width", type=int, default=256)
    add.add_argument("--layers", type=int, default=8)
    add.add_argument("--inner", type=int, default=512)
    add.add_argument("--seed", type=int, default=0)
    add = commands.add_parser("export", help="write the Hugging Face directory from a checkpoint")
    add.set_defaults(run=export)
    add.add_argument("--checkpoint", type=Path, required=True)
    add.add_argument("--to", type=Path, required=True)
    add.add_argument("--tokenizer", type=Path, help="the folder that training used (default: build it again)")
    add = commands.add_parser("test", help="measure an exported model on the test worlds")
    add.set_defaults(run=test)
    add.add_argument("--model", type=Path, required=True)
    add.add_argument("--worlds", type=int, default=300)
    add.add_argument("--device", default="cpu")
    add.add_argument("--new-words", action="store_true", help="replace some names and values by unknown words")
    add.add_argument("--json", type=Path)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the command line."""
    options = _parser().parse_args(arguments)
    options.run(options)


if __name__ == "__main__":
    main()
