"""Runs a recipe: reads the data, trains with Hugging Face's Trainer, writes a directory that serving loads."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvlink_core.errors import ConfigError
from kvlink_core.models.describe import describe_model
from kvlink_core.training.recipes.config import Recipe
from kvlink_core.training.recipes.directory import Target, copy_weights, prepare, write_wrap
from kvlink_core.training.recipes.examples import Reader
from kvlink_core.training.recipes.network import load_network, make_trainee
from kvlink_core.training.recipes.rows import RowDataset, collate
from kvlink_core.training.recipes.trainee import Trainee

CHECKPOINTS = "checkpoints"
_TRAINED = "trained.safetensors"


@dataclass(frozen=True)
class Outcome:
    """What a run came to: the directory, steps, losses as logged (step, loss), and lines that made no example."""

    directory: Path
    steps: int
    losses: tuple[tuple[int, float], ...]
    left_out: int


def train(
    recipe: Recipe, out: Path, *, resume: bool = False, device: str | None = None, stop_after: int | None = None
) -> Outcome:
    """Run a recipe, in one process or, where ``RANK`` and ``WORLD_SIZE`` say so, as one of several.

    Args:
        recipe: what to do.
        out: the directory to write; checkpoints and TensorBoard's files go to ``out/checkpoints``.
        resume: go on from the last checkpoint there; the data goes on where it was, row for row.
        device: ``cpu`` keeps it off an accelerator; the default is what there is.
        stop_after: end after so many steps of the schedule, with a checkpoint and without a model.

    Raises:
        ConfigError: the extra ``train`` is not installed; data or settings that do not fit; checkpoints of another
            recipe, or some where ``resume`` was not asked for.
        ModelError: the model cannot be loaded.
    """
    _check_extra()
    if recipe.attention == "flex" and (device == "cpu" or not torch.cuda.is_available()):
        raise ConfigError("attention: flex trains on CUDA only; use attention: sdpa here.")
    world, main = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0")) == 0
    last = _checkpoint(recipe, out, resume) if main or resume else None
    # One process writes the directory; the others lay out the same for themselves.
    target = prepare(recipe, out if main else Path(tempfile.mkdtemp(prefix="kvlink-train-")))
    torch.manual_seed(recipe.seed)
    network = load_network(recipe, target)
    trainee = make_trainee(recipe, target, network)
    if recipe.rows % (recipe.rows_at_once * world):
        raise ConfigError(
            f"rows ({recipe.rows}) must be a multiple of rows_at_once ({recipe.rows_at_once}) x {world} processes."
        )
    trainer = _trainer(recipe, target, trainee, out / CHECKPOINTS, world, device, stop_after)
    if main:
        (out / CHECKPOINTS).mkdir(exist_ok=True)
        (out / CHECKPOINTS / "recipe.json").write_text(_canonical(recipe), encoding="utf-8")
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    dataset: RowDataset = trainer.train_dataset
    losses = tuple((int(e["step"]), float(e["loss"])) for e in trainer.state.log_history if "loss" in e)
    if main and stop_after is None:
        _write(recipe, target, trainee)
    return Outcome(out, trainer.state.global_step, losses, dataset.left_out)


def _check_extra() -> None:
    try:
        import accelerate  # noqa: F401
        import tensorboard  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"training needs the extra 'train' ({error.name} is missing): pip install 'kvlink[train]'."
        ) from error


def _canonical(recipe: Recipe) -> str:
    return json.dumps(recipe.model_dump(mode="json"), indent=1, sort_keys=True)


def _checkpoint(recipe: Recipe, out: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from. Raises ``ConfigError`` as ``train`` says."""
    folder = out / CHECKPOINTS
    there = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    if not resume:
        if there:
            raise ConfigError(
                f"{str(folder)!r} has checkpoints of an earlier run: say --resume to go on, or another --out."
            )
        if (out / "config.json").exists() and list(out.glob("model*.safetensors")):
            raise ConfigError(f"{str(out)!r} holds a model already; name another --out.")
        return None
    if not there:
        raise ConfigError(f"there is no checkpoint in {str(folder)!r} to resume from; leave --resume out.")
    before = folder / "recipe.json"
    if before.is_file() and before.read_text("utf-8") != _canonical(recipe):
        raise ConfigError(
            f"the recipe differs from the one that {str(folder)!r} was begun with (its recipe.json); use that one."
        )
    return there[-1]


def _trainer(
    recipe: Recipe,
    target: Target,
    trainee: Trainee,
    folder: Path,
    world: int,
    device: str | None,
    stop_after: int | None,
) -> Any:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class _Trainer(Trainer):  # type: ignore[misc]  # transformers is untyped
        """Rows in their order; a checkpoint holds what is trained and no frozen weights."""

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            if self.args.should_save:
                folder = Path(output_dir or self.args.output_dir)
                folder.mkdir(parents=True, exist_ok=True)
                save_file(_trained(trainee), str(folder / _TRAINED))

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            _restore(trainee, load_file(str(Path(resume_from_checkpoint) / _TRAINED)))

    class _Stop(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if stop_after is not None and state.global_step >= stop_after:
                control.should_save = True
                control.should_training_stop = True

    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=recipe.rows_at_once,
        gradient_accumulation_steps=recipe.rows // (recipe.rows_at_once * world),
        max_steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule if recipe.schedule != "constant" else "constant_with_warmup",
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        adam_beta2=recipe.beta2,
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.dtype == "bfloat16",
        save_steps=recipe.save_steps,
        save_total_limit=recipe.keep,
        logging_steps=recipe.log_steps,
        logging_first_step=True,
        report_to=["tensorboard"],
        seed=recipe.seed,
        data_seed=recipe.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available() and device != "cpu",
        ddp_find_unused_parameters=False,
        use_cpu=device == "cpu" or not torch.accelerator.is_available(),
        disable_tqdm=None,
    )
    multiple = 128 if recipe.attention == "flex" else 8
    return _Trainer(
        model=trainee,
        args=arguments,
        train_dataset=_dataset(recipe, target, trainee),
        data_collator=lambda rows: collate(rows, multiple),
        callbacks=[_Stop()],
    )


def _dataset(recipe: Recipe, target: Target, trainee: Trainee) -> RowDataset:
    write = _writer(recipe, target, trainee) if recipe.train == "wrap" else None
    bos = target.bos
    readers = [Reader(s, target.layout, target.links, recipe.max_tokens, bos, write) for s in recipe.mixture]
    return RowDataset(readers, recipe.rows * recipe.steps, recipe.max_tokens, recipe.seed)


def _writer(recipe: Recipe, target: Target, trainee: Trainee) -> Callable[[Sequence[int]], list[int]]:
    """The teacher's own answers, greedily, each made once."""
    known: dict[tuple[int, ...], list[int]] = {}

    def write(prompt: Sequence[int]) -> list[int]:
        key = tuple(prompt)
        if key not in known:
            network = trainee.network
            ids = torch.tensor([key], device=next(network.parameters()).device)
            training = network.training
            network.eval()
            with torch.no_grad():
                made: Tensor = network.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=recipe.wrap.answer_tokens, do_sample=False,
                    pad_token_id=target.layout.end_id,
                )  # fmt: skip
            network.train(training)
            known[key] = made[0, len(key) :].tolist()
        return known[key]

    return write


def _trained(trainee: Trainee) -> dict[str, Tensor]:
    """Parameters that are trained, those that share memory once."""
    seen: dict[int, str] = {}
    out = {}
    for name, parameter in trainee.named_parameters():
        if parameter.requires_grad and parameter.data_ptr() not in seen:
            seen[parameter.data_ptr()] = name
            out[name] = parameter.detach().contiguous()
    return out


def _restore(trainee: Trainee, tensors: dict[str, Tensor]) -> None:
    parameters = dict(trainee.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


def _write(recipe: Recipe, target: Target, trainee: Trainee) -> None:
    """The weights beside what ``prepare`` wrote."""
    network, rows = trainee.network, trainee.rows
    if recipe.train == "wrap":
        assert rows is not None
        copy_weights(target.base, target.out)
        write_wrap(target.out, rows.weight, recipe.wrap.header)
        return
    if recipe.lora is not None:
        network = network.merge_and_unload()
    if rows is not None:
        assert target.links is not None
        embedding = network.get_input_embeddings()
        scale = getattr(embedding, "embed_scale", None)
        values = rows.weight.detach() if scale is None else rows.weight.detach() / float(scale)
        with torch.no_grad():
            embedding.weight[list(target.links.ids)] = values.to(embedding.weight)
    dtype = describe_model(str(target.base), device="cuda").dtype
    network.to(dtype).save_pretrained(str(target.out))
