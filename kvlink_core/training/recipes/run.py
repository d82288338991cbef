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
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from kvlink_core.errors import ConfigError, ModelError
from kvlink_core.models.describe import describe_model
from kvlink_core.models.spec import check_architecture
from kvlink_core.template import FIRST_WRAP_ID
from kvlink_core.text import first_line
from kvlink_core.training.recipes.config import Recipe
from kvlink_core.training.recipes.directory import Target, copy_weights, prepare, write_wrap
from kvlink_core.training.recipes.examples import Reader
from kvlink_core.training.recipes.masks import check_layers
from kvlink_core.training.recipes.rows import RowDataset, collate
from kvlink_core.training.recipes.trainee import Rows, Trainee, start_of_rows

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
    network = _network(recipe, target)
    trainee = _trainee(recipe, target, network)
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


def _network(recipe: Recipe, target: Target) -> Any:
    """The base's network, with room for added tokens, ready for training."""
    description = describe_model(str(target.base))
    check_architecture(description.config.model_type)
    check_layers(description.config)
    frozen = recipe.train != "model" or recipe.lora is not None
    dtype: Any = "auto" if frozen and recipe.dtype == "bfloat16" else torch.float32
    transformers_logging.disable_progress_bar()
    try:
        network = AutoModelForCausalLM.from_pretrained(
            str(target.base),
            local_files_only=True,
            use_safetensors=True,
            dtype=dtype,
            attn_implementation="flex_attention" if recipe.attention == "flex" else plain_attention(description.config),
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise ModelError(f"cannot load the model at {str(target.base)!r} for training: {first_line(error)}") from error
    if target.added and max(target.added) >= network.get_input_embeddings().weight.shape[0]:
        network.resize_token_embeddings(max(target.added) + 1, mean_resizing=False)
        like = network.get_input_embeddings().weight
        with torch.no_grad():
            first = min(target.added)
            start = start_of_rows(network, target.added, list(range(min(first, 1000))), recipe.seed)
            like[list(target.added)] = start.to(like.dtype)
    if recipe.gradient_checkpointing:
        # transformers 5.17 knows the second name only, and 5.23 warns of it.
        enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return network


def plain_attention(config: Any) -> str:
    """The implementation of attention that takes a 4-D mask: SDPA, or where a model lacks it its own."""
    return "sdpa" if AutoModelForCausalLM._model_mapping[type(config)]._supports_sdpa else "eager"


def _trainee(recipe: Recipe, target: Target, network: Any) -> Trainee:
    if recipe.train == "model" and recipe.lora is None:
        rows = None
    else:
        network.requires_grad_(False)
        rows = _rows(recipe, target, network)
        if recipe.lora is not None:
            network = _with_lora(recipe, network)
        network.train()
    tied = None
    head = network.get_output_embeddings()
    if rows is not None and recipe.train != "wrap" and head is not None:
        tied = head if head.weight is network.get_input_embeddings().weight else None
    dtype = torch.bfloat16 if recipe.dtype == "bfloat16" else torch.float32
    mask_dtype = dtype if rows is None else network.get_input_embeddings().weight.dtype
    return Trainee(network, rows, tied=tied, attention=recipe.attention, dtype=mask_dtype)


def _rows(recipe: Recipe, target: Target, network: Any) -> Rows | None:
    if recipe.train == "wrap":
        ids = tuple(range(FIRST_WRAP_ID, FIRST_WRAP_ID + recipe.wrap.header + recipe.wrap.trailer))
        like = target.layout.plain_tokens("\n") or [0]
        return Rows(ids, start_of_rows(network, ids, like, recipe.seed))
    if target.links is None:
        return None
    ids = target.links.ids
    embedding = network.get_input_embeddings()
    with torch.no_grad():
        own = embedding(torch.tensor([ids]))[0].float()
    like = list(target.layout.mem_end) or target.layout.plain_tokens("\n") or [0]
    spread = embedding.weight[: min(2000, embedding.weight.shape[0])].float().std()
    # Reserved tokens that nothing was trained on may all be one point, or far smaller than the others.
    alike = bool(own.std(0).mean() < 0.1 * spread) and len(ids) > 1
    return Rows(ids, start_of_rows(network, ids, like, recipe.seed) if alike else own)


def _with_lora(recipe: Recipe, network: Any) -> Any:
    assert recipe.lora is not None
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError("a LoRA adapter needs the extra 'train': pip install 'kvlink[train]'.") from error
    targets = recipe.lora.targets if isinstance(recipe.lora.targets, str) else list(recipe.lora.targets)
    config = LoraConfig(
        r=recipe.lora.rank, lora_alpha=recipe.lora.alpha, lora_dropout=recipe.lora.dropout, target_modules=targets,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    try:
        return get_peft_model(network, config)
    except ValueError as error:
        raise ConfigError(f"lora.targets do not fit this model: {first_line(error)}") from error


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
