"""Trains the family: the base from scratch with full attention only, and its fine-tunes for each linker."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvlink_core.training.embedded import learning_rate, make_forward
from kvlink_core.training.family.feed import CurriculumFeed, PoolFeed
from kvlink_core.training.family.measure import Forward, by_kind, count, held_out, measure
from kvlink_core.training.family.network import FamilyLlama, export
from kvlink_core.training.family.rows import IGNORED, LAST, MODES, ROW
from kvlink_core.training.family.tales import KINDS
from kvlink_core.training.llama import Shape
from kvlink_core.training.tokenizer import LINKS

#: variant -> the modes that its model is measured in
MEASURED: dict[str, tuple[str, ...]] = {
    "base": ("full", "k0"),
    "k0": ("full", "k0"),
    "k1": ("full", "k1", "k0"),
    "k5": ("full", "k5", "k1", "k0"),
    "link-only": ("full", "k5"),
    "wrap": ("full", "wrap"),
}


@dataclass(frozen=True)
class Job:
    """One training run.

    Attributes:
        variant: a key of ``MEASURED``.
        out: folder for the directory, the log and the report.
        layout: directory with the tokenizer and the ``kvlink.json`` to start from.
        rows: rows of ``ROW`` tokens a step.
        steps: of the schedule of a fine-tune; the base's follows the clock.
        seconds: wall-clock limit of the training steps, compilation not counted.
        base: weights to start from (``base.safetensors``), none for the base itself.
        pool, chunks: the fine-tunes' rows.
        full_share: share of a fine-tune's rows with full attention, which guard it.
    """

    variant: str
    out: Path
    layout: Path
    seed: int = 0
    rows: int = 32
    steps: int = 3000
    seconds: float = 240.0
    peak: float = 6e-4
    base: Path | None = None
    pool: Path | None = None
    chunks: int = 0
    full_share: float = 0.3
    workers: int = 12
    device: str = "cuda"
    attention: str = "flex"
    compiled: bool = True
    shape: Shape = field(default_factory=Shape)
    tales: int = 300


def run(job: Job) -> dict[str, Any]:
    """Train, measure, export; returns the report, which is also written to ``out/report.json``."""
    torch.manual_seed(job.seed)
    torch.set_float32_matmul_precision("high")
    job.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(job.device)
    log = (job.out / "log.txt").open("w", encoding="utf-8")
    began = time.monotonic()

    def say(text: str) -> None:
        text = f"[{job.variant} {job.seed}] {time.monotonic() - began:5.0f}s {text}"
        print(text, flush=True)
        log.write(text + "\n")
        log.flush()

    model = FamilyLlama(job.shape, seed=job.seed)
    if job.base is not None:
        model.load_state_dict({k: v.float() for k, v in load_file(str(job.base)).items()})
        _fresh_links(model, job)
    frozen = job.variant in ("link-only", "wrap")
    if frozen:
        model.requires_grad_(False)
        model.extra.requires_grad_(True)
    model = model.to(device)
    forward = make_forward(model, device, job.attention, job.compiled)
    trained = [p for p in model.parameters() if p.requires_grad]
    decay = 0.0 if frozen else 0.05
    groups = [
        {"params": [p for p in trained if p.ndim == 2], "weight_decay": decay},
        {"params": [p for p in trained if p.ndim != 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=job.peak, betas=(0.9, 0.98), fused=device.type == "cuda")
    summary = _base(job, model, forward, optimizer, say) if job.base is None else _tune(job, forward, optimizer, say)
    # What is measured is what is exported.
    weights = {k: v.detach().cpu().to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    model.load_state_dict({k: v.float() for k, v in weights.items()})
    save_file(weights, str(job.out / f"{job.variant}.safetensors"))
    export(job.shape, weights, job.variant, job.layout, job.out / "model", f"family-{job.variant}-{job.seed}")
    summary |= {"variant": job.variant, "seed": job.seed, "questions": {}}
    for mode in MEASURED[job.variant]:
        rows, kinds = held_out(job.layout / "tokenizer.json", job.tales, mode, own_links=job.variant == "link-only")
        right = measure(forward, rows, device, job.rows)
        summary["questions"][mode] = "".join("1" if r else "0" for r in right)
        summary.setdefault("accuracy", {})[mode] = by_kind(right, kinds)
        say(f"held out, {mode}: {summary['accuracy'][mode]}")
    summary["wall_s"] = round(time.monotonic() - began, 1)
    (job.out / "report.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return summary


def _fresh_links(model: FamilyLlama, job: Job) -> None:
    """Link tokens start at the embedding of the token after the documents, with noise; a wrap at a passage's."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.layout)
    ids = [int(tokenizer.convert_tokens_to_ids(link)) for link in LINKS]
    generator = torch.Generator().manual_seed(job.seed)
    with torch.no_grad():
        table = model.model.embed_tokens.weight
        noise = torch.randn(len(ids), table.shape[1], generator=generator) * 0.03
        start = table[int(tokenizer.convert_tokens_to_ids("<|mem_end|>"))]
        table[ids] = start + noise
        model.extra[:5] = start + noise
        model.extra[5:] = table[tokenizer.encode(".\n", add_special_tokens=False)].mean(0) + (
            torch.randn(model.extra.shape[0] - 5, table.shape[1], generator=generator) * 0.03
        )


def _base(
    job: Job, model: FamilyLlama, forward: Forward, optimizer: torch.optim.Optimizer, say: Callable[[str], None]
) -> dict[str, Any]:
    device = torch.device(job.device)
    each = min(16, job.rows)
    stage, stage_began, streak, step, spent = 0, 0.0, 0, 0, 0.0
    tally = torch.zeros(2, 2 * len(KINDS), device=device)
    losses = torch.zeros((), device=device)
    with CurriculumFeed(job.layout / "tokenizer.json", job.workers, job.seed, each, job.rows // each, device) as feed:
        tick = 0.0
        while spent < job.seconds:
            tokens, answers, tags = feed.take()
            if step == 20:  # the first steps compile and do not count
                tick = time.monotonic()
            spent = time.monotonic() - tick if step >= 20 else 0.0
            rate = learning_rate(job.peak, spent / job.seconds, 0.5)
            loss, logits = _step(forward, optimizer, rate, tokens, answers)
            losses += loss
            tally += count(logits, answers, tags, 2 * len(KINDS))
            step += 1
            if step % 20:
                continue
            right, asked = tally[0].tolist(), tally[1].tolist()
            now = sum(right[4:]) / max(sum(asked[4:]), 1)
            if step % 200 == 0:
                shares = " ".join(f"{k}={r / max(a, 1):.3f}" for k, r, a in zip(KINDS * 2, right, asked, strict=True))
                say(
                    f"step {step} {spent:.0f}s stage {stage} loss {float(losses) / 20:.4f} lr {rate:.1e} "
                    f"{step * job.rows * ROW / max(spent, 1) / 1e6:.2f} Mtok/s | {shares}"
                )
            streak = streak + 1 if now >= (0.95 if stage < 3 else 0.9) else 0
            late = spent - stage_began > 0.14 * job.seconds
            if stage < LAST and (streak >= 3 or late):
                stage, streak, stage_began = stage + 1, 0, spent
                say(f"stage {stage} of {LAST} at step {step}, {spent:.0f}s{' (patience)' if late else ''}")
                feed.set_stage(stage)
            tally.zero_()
            losses.zero_()
    return {"steps": step, "seconds": round(spent, 1), "tokens": step * job.rows * ROW, "last_stage": stage}


def _tune(job: Job, forward: Forward, optimizer: torch.optim.Optimizer, say: Callable[[str], None]) -> dict[str, Any]:
    assert job.pool is not None
    device = torch.device(job.device)
    feed = PoolFeed(job.pool, job.variant, job.chunks, job.seed, device)
    guard = None if job.variant in ("link-only", "wrap") else PoolFeed(job.pool, "full", job.chunks, job.seed, device)
    guards = round(job.rows * job.full_share) if guard is not None else 0
    tally = torch.zeros(2, 2 * len(KINDS), device=device)
    losses = torch.zeros((), device=device)
    tick, spent, curve, step = 0.0, 0.0, [], 0
    for step in range(1, job.steps + 1):
        taken = feed.take(job.rows - guards)
        rate = job.peak * min(1.0, step / (0.03 * job.steps)) * _cosine(step / job.steps)
        teacher = None
        if job.variant == "wrap":
            with torch.no_grad():
                (tokens, answers, _), taken = taken[0], taken[1:]
                teacher = forward(*tokens.unbind(0), answers[0])
        tokens, answers, tags = taken[0]
        tags = torch.where(tags >= 0, tags + len(KINDS), tags)
        if guard is not None:
            kept = guard.take(guards)[0]
            tokens, answers = torch.cat([kept[0], tokens], 1), torch.cat([kept[1], answers], 1)
            tags = torch.cat([kept[2], tags])
        loss, logits = _step(forward, optimizer, rate, tokens, answers, teacher)
        losses += loss
        tally += count(logits, answers, tags, 2 * len(KINDS))
        if step == 10:
            tick = time.monotonic()
        if step % 100 == 0:
            spent = time.monotonic() - tick
            right, asked = tally[0].tolist(), tally[1].tolist()
            shares = " ".join(f"{k}={r / max(a, 1):.3f}" for k, r, a in zip(KINDS * 2, right, asked, strict=True))
            curve.append(
                [
                    step,
                    round(float(losses) / 100, 5),
                    *(round(r / max(a, 1), 4) for r, a in zip(right, asked, strict=True)),
                ]
            )
            if step % 300 == 0:
                speed = step * job.rows * ROW / max(spent, 1e-3) / 1e6
                say(f"step {step} {spent:.0f}s loss {curve[-1][1]:.4f} {speed:.2f} Mtok/s | {shares}")
            tally.zero_()
            losses.zero_()
            if spent > job.seconds:
                say(f"out of time at step {step} of {job.steps}")
                break
    return {
        "steps": step,
        "of_steps": job.steps,
        "seconds": round(spent, 1),
        "tokens": step * job.rows * ROW,
        "curve": curve,
    }


def _cosine(done: float) -> float:
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


def _step(
    forward: Forward,
    optimizer: torch.optim.Optimizer,
    rate: float,
    tokens: Tensor,
    answers: Tensor,
    teacher: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    for group in optimizer.param_groups:
        group["lr"] = rate
    logits = forward(*tokens.unbind(0), answers[0])
    if teacher is None:
        loss = F.cross_entropy(logits.flatten(0, 1), answers[1].flatten(), ignore_index=IGNORED)
    else:
        used = answers[1].flatten() != IGNORED
        divergence = F.kl_div(
            logits.flatten(0, 1).log_softmax(-1),
            teacher.flatten(0, 1).log_softmax(-1),
            reduction="none",
            log_target=True,
        ).sum(-1)
        loss = (divergence * used).sum() / used.sum().clamp(min=1)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
    optimizer.step()
    return loss.detach(), logits.detach()


assert set(MODES) >= {mode for modes in MEASURED.values() for mode in modes}
