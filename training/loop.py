"""The training loop: samples in, checkpoints out. Called by `train.py`.

One optimiser step reads `setting.accumulation` micro-batches on each process. Its loss is the sum over all of them
divided by their supervised tokens, so neither accumulation nor the number of processes changes what is learned.
"""

import dataclasses
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import accelerate
import peft
import torch
import transformers
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm import tqdm

from config import Config
from dataset.image_caption_dataset import ImageCaptionDataset, collate
from errors import UserError
from model.backbone import remember_backbones
from model.checkpoint import check_complete, list_checkpoints, restore_weights, save_checkpoint
from model.model import DTYPES, MMultiModal, pick_device, pick_precision
from paths import REPO_ROOT, resolve_path
from qwen.chat import IGNORE_INDEX
from qwen.loading import set_activation_checkpointing
from training.costs import Arithmetic, matrix_peak, peak_memory
from training.data import build_datasets, data_hash, epoch_order, micro_batches, read_split, sample_lengths
from training.estimate import Estimate, Setting, choose_setting
from training.optimizer import build_optimizer, build_schedule
from training.run_log import RunLog


def supervised_tokens(batch: dict[str, Any]) -> int:
    """Number of labels the loss of a batch is summed over."""
    return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())


def compile_layers(language_model: torch.nn.Module) -> None:
    """`torch.compile` for attention, MLP and norms of every decoder layer, in place, for any length of batch.

    The parts and not the layer: gradient checkpointing wraps that, and inside a wrapped one nothing would be compiled.
    """
    for layer in language_model.model.layers:
        for part in layer.children():
            part.compile(dynamic=True)


class Trainer:
    """One run.

    Args:
        config: the run.
        resume: a checkpoint folder to go on from, `"auto"` for the newest of `train.output_dir`, None to start anew.

    Raises:
        UserError: wrong data, backbones or checkpoint; an output folder that holds checkpoints when starting anew.
    """

    def __init__(self, config: Config, resume: str | None = None) -> None:
        self.config = config
        if config.llm.device_map is not None:
            raise UserError(
                "'llm.device_map': auto is for answering; in training each GPU holds the language model whole: set "
                "llm.device_map=null, and llm.quantization=nf4 if it does not fit"
            )
        device = pick_device()
        self.precision = pick_precision(config.train.precision, device)
        if config.train.attention == "flex" and device.type != "cuda":
            raise UserError("'train.attention': flex needs a CUDA GPU, elsewhere it has no backward pass; use sdpa")
        self.accelerator = accelerate.Accelerator(
            cpu=device.type == "cpu", mixed_precision="no" if self.precision == "float32" else self.precision
        )
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if self.accelerator.num_processes != launched:
            raise UserError(f"{launched} processes were launched but {self.accelerator.num_processes} joined the run")
        self.output_dir = resolve_path(config.train.output_dir)
        resumed = self._find_checkpoint(resume)
        state = None if resumed is None else self._read_state(resumed / "trainer_state")
        photos, train, val = read_split(config)

        origin = resumed
        if resumed is None and config.train.init_from is not None:
            origin = check_complete(Path(config.train.init_from))
        self.model = MMultiModal.from_config(config, self.accelerator.device)
        if origin is not None:
            restore_weights(self.model, origin)
        if config.train.lora_lr == 0:
            self.model.freeze_lora()
        if config.train.compile:
            compile_layers(self.model.LLM.get_base_model())
        self.weights = {source.name: source.weight for source in config.data.sources}
        with self.accelerator.main_process_first():  # the first one writes the feature cache, the others read it
            self.train_set, self.val_set = build_datasets(config, self.model, photos, train, val)
        self.provenance = _provenance(config)

        self.wrapped = self.accelerator.prepare(self.model)
        # a resumed run goes on as it was: its place in the data is counted in micro-batches
        self.setting = choose_setting(self) if state is None else Setting(**state["setting"])
        self.set_checkpointing(self.setting.checkpointing)
        self.steps_per_epoch = math.ceil(len(self._epoch_batches(0)) / self._batches_per_step)
        self.total_steps = config.train.max_steps or config.train.epochs * self.steps_per_epoch
        optimizer = build_optimizer(self.model, config.train)
        self.schedule = build_schedule(optimizer, config.train, self.total_steps)
        self.optimizer = self.accelerator.prepare(optimizer)
        self.position = {"step": 0, "epoch": 0, "micro_batches": 0}
        self.arithmetic = Arithmetic(self.model)
        self.matrix_peak = matrix_peak(self.accelerator.device, DTYPES[self.precision])
        self.window: list[dict[str, Any]] = []  # the steps since the last line of the log
        self.last_figures: dict[str, Any] = {}
        torch.manual_seed(config.train.seed + self.accelerator.process_index)  # dropout, another on each process
        if state is not None:
            self._restore_state(state)

    @property
    def _batches_per_step(self) -> int:
        return self.setting.accumulation * self.accelerator.num_processes

    @cached_property
    def estimate(self) -> Estimate:
        """Memory and time of micro-batches of any size, measured when asked."""
        return Estimate(self)

    def set_checkpointing(self, on: bool) -> None:
        """Recompute the language model's activations in the backward pass, or keep them."""
        set_activation_checkpointing(self.model.LLM.get_base_model(), on)

    def training_mode(self) -> None:
        """Dropout on, except in the encoder."""
        self.wrapped.train()
        self.model.encoder.eval()

    def run(self) -> Path:
        """Train to the end and return the last checkpoint folder; on interruption a checkpoint is written first."""
        main = self.accelerator.is_main_process
        log = RunLog(self.output_dir, self.position["step"]) if main else None
        bar = tqdm(total=self.total_steps, initial=self.position["step"], disable=not main, dynamic_ncols=True)
        saved = -1
        try:
            for figures in self.steps():
                self.window.append(figures)
                step = self.position["step"]
                last = step == self.total_steps
                line = self._summary()
                logged = step % self.config.train.log_steps == 0 or step == 1 or last
                if self._due(self.config.train.eval_steps, step) or (last and len(self.val_set)):
                    line["val_loss"] = self.validate()
                    logged = True
                self.last_figures |= line
                if main:
                    bar.update()
                    bar.set_postfix(
                        loss=f"{figures['loss']:.3f}",
                        lr=f"{figures['projector_lr']:.1e}",
                        questions_s=f"{line['questions_per_second']:.1f}",
                        **({} if line["mfu"] is None else {"mfu": f"{line['mfu']:.0%}"}),
                    )
                if logged:
                    if main:
                        log.write(step, line)
                    self.window.clear()
                if step % self.config.train.save_steps == 0 or last:
                    self.save()
                    saved = step
        except (KeyboardInterrupt, UserError, torch.OutOfMemoryError) as error:
            self.optimizer.zero_grad()
            # where one of several processes fails, the others are not there to save with
            together = self.accelerator.num_processes == 1 or isinstance(error, KeyboardInterrupt)
            if together and 0 < self.position["step"] != saved:
                self.save()
                bar.write(f"interrupted: {self.checkpoint_folder()} holds all so far, go on with --resume auto")
            if isinstance(error, torch.OutOfMemoryError):
                raise UserError(
                    f"out of memory at step {self.position['step'] + 1}: lower train.micro_batch and raise "
                    "train.accumulation by as much, or set train.gradient_checkpointing=on or llm.quantization=nf4, or "
                    "lower train.max_questions or data.max_length (train.py --dry-run tells what fits)"
                ) from None
            raise
        finally:
            bar.close()
            if main:
                log.close()
        if saved == -1 and self.position["step"] < self.total_steps:
            raise UserError("no step was made: the training set is smaller than one micro-batch per process")
        return self.checkpoint_folder()

    def checkpoint_folder(self) -> Path:
        """Where the checkpoint of the current step belongs."""
        return self.output_dir / f"checkpoint-{self.position['step']}"

    def _epoch_batches(self, epoch: int) -> list[list[int]]:
        self.train_set.set_epoch(epoch)
        order = epoch_order(self.train_set, self.weights, self.config.train.seed, epoch)
        return self._cut(self.train_set, order, self.accelerator.num_processes)

    def _cut(self, dataset: ImageCaptionDataset, order: list[int], processes: int) -> list[list[int]]:
        train = self.config.train
        lengths = None if train.tokens_per_batch is None else sample_lengths(dataset, train.workers)
        return micro_batches(order, self.setting.micro_batch, processes, lengths, train.tokens_per_batch)

    def _loader(self, dataset: ImageCaptionDataset, batches: list[list[int]], persistent: bool = False) -> DataLoader:
        """Hands out `batches`, collated; `persistent` workers stay for the next time it is iterated."""
        workers = self.config.train.workers
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=workers,
            # a step asks for all its micro-batches at once: so many, and some of the next, are to be ready
            prefetch_factor=max(2, math.ceil(self.setting.accumulation / workers) + 1) if workers else None,
            persistent_workers=persistent and workers > 0,
            pin_memory=self.accelerator.device.type == "cuda",
            generator=torch.Generator(),  # without one, each epoch would move the global generator
        )

    def steps(self) -> Iterator[dict[str, Any]]:
        """Make optimiser steps until the run is over, yielding the figures of each (`_summary` puts them together)."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        own_batches: list[list[int]] = []  # the loader reads them anew each epoch
        epoch_loader = self._loader(self.train_set, own_batches, persistent=True)
        while self.position["step"] < self.total_steps:
            epoch_batches = self._epoch_batches(self.position["epoch"])
            remaining = epoch_batches[self.position["micro_batches"] :]
            own_batches[:] = remaining[rank::processes]
            loader = iter(epoch_loader)
            for start in range(0, len(remaining), self._batches_per_step):
                began = time.perf_counter()
                indices = remaining[start : start + self._batches_per_step]
                batches = [self.checked(next(loader)) for _ in indices[rank::processes]]
                waited = time.perf_counter() - began
                figures = self._step(batches)
                self.position["step"] += 1
                self.position["micro_batches"] += len(indices)
                yield figures | {
                    "epoch": self.position["epoch"] + self.position["micro_batches"] / len(epoch_batches),
                    "questions": sum(len(self.train_set.groups[index]) for batch in indices for index in batch),
                    "seconds": time.perf_counter() - began,
                    "waited": waited,
                }
                if self.position["step"] >= self.total_steps:
                    return
            self.position["epoch"] += 1
            self.position["micro_batches"] = 0

    def _summary(self) -> dict[str, Any]:
        """The line of the log for the steps in `window`; `run_log.py` says what each figure is."""
        total = {
            name: sum(figures[name] for figures in self.window)
            for name in (
                "loss",
                "grad_norm",
                "supervised_tokens",
                "tokens",
                "questions",
                "seconds",
                "waited",
                "operations",
            )
        }
        steps, seconds, last = len(self.window), total["seconds"], self.window[-1]
        return {
            "loss": total["loss"] / steps,
            "grad_norm": total["grad_norm"] / steps,
            "projector_lr": last["projector_lr"],
            "lora_lr": last["lora_lr"],
            "epoch": last["epoch"],
            "supervised_tokens": total["supervised_tokens"] / steps,
            "seconds": seconds / steps,
            "questions_per_second": total["questions"] / seconds,
            "tokens_per_second": total["tokens"] / seconds,
            "supervised_tokens_per_second": total["supervised_tokens"] / seconds,
            "mfu": None if self.matrix_peak is None else total["operations"] / seconds / self.matrix_peak,
            "data_wait": total["waited"] / seconds,
            "peak_memory_gib": peak_memory(self.accelerator.device) / 2**30,
        }

    def checked(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A sample or batch itself; UserError where it stands for a photo that could not be read."""
        if "error" in batch:
            raise UserError(f"{batch['error']} (python process_image.py with data.check_images=open finds all such)")
        return batch

    def forward(self, batch: dict[str, Any], num_items_in_batch: int | None) -> torch.Tensor:
        """The loss of a collated batch, through whatever wraps the model."""
        on_device = {
            name: value.to(self.accelerator.device, non_blocking=True) if torch.is_tensor(value) else value
            for name, value in batch.items()
        }
        output = self.wrapped(
            on_device.pop("pixel_values", None),
            **on_device,
            supervised_only=True,
            num_items_in_batch=num_items_in_batch,
        )
        return output.loss

    def _step(self, batches: list[dict[str, Any]]) -> dict[str, Any]:
        self.training_mode()
        own_supervised = sum(map(supervised_tokens, batches))
        own_tokens = sum(batch["input_ids"].numel() for batch in batches)
        counts = torch.tensor([own_supervised, own_tokens]).to(self.accelerator.device)
        supervised, tokens = self.accelerator.reduce(counts).tolist()
        encoded = sum(len(batch["pixel_values"]) for batch in batches if "pixel_values" in batch)
        cached = sum(len(batch["image_features"]) for batch in batches if "image_features" in batch)
        total = torch.zeros((), device=self.accelerator.device)
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                # gradients are averaged over processes, the loss is meant to be summed
                loss = self.forward(batch, max(supervised, 1)) * self.accelerator.num_processes
                self.accelerator.backward(loss)
            total += loss.detach()
        loss_value = self.accelerator.reduce(total, reduction="mean").item()
        if not math.isfinite(loss_value):
            raise UserError(
                f"the loss became {loss_value} at step {self.position['step'] + 1}: lower train.projector_lr and "
                "train.lora_lr, or set train.precision=float32"
            )
        gradient_norm = self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.config.train.max_grad_norm)
        rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return {
            "loss": loss_value,
            "grad_norm": float(gradient_norm),
            "projector_lr": rates["projector"],
            "lora_lr": rates.get("lora", 0.0),
            "supervised_tokens": supervised,
            "tokens": tokens,
            "operations": self.arithmetic.operations(own_tokens, own_supervised, encoded + cached, encoded),
        }

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss per supervised token on the first `eval_samples` samples of the validation set."""
        self.wrapped.eval()
        count = min(len(self.val_set), self.config.train.eval_samples)
        batches = self._cut(self.val_set, list(range(count)), 1)
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in self._loader(self.val_set, batches[rank::processes]):
            loss = self.forward(self.checked(batch), 1)
            sums += torch.tensor([loss.item(), supervised_tokens(batch)], dtype=torch.float64)
        loss_sum, tokens = self.accelerator.reduce(sums.float().to(self.accelerator.device)).tolist()
        return loss_sum / max(tokens, 1)

    @staticmethod
    def _due(every: int | None, step: int) -> bool:
        return every is not None and step % every == 0

    def save(self) -> None:
        """Write `checkpoint-<step>` and drop the oldest ones beyond `save_total_limit`."""
        generators = {"cpu": torch.get_rng_state()}
        if self.accelerator.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state()
        all_generators = gather_object([generators])
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler

            def save_state(folder: Path) -> None:
                state = {
                    "position": self.position,
                    "setting": dataclasses.asdict(self.setting),
                    "processes": self.accelerator.num_processes,
                    "optimizer": self.optimizer.state_dict(),
                    "schedule": self.schedule.state_dict(),
                    "scaler": None if scaler is None else scaler.state_dict(),
                    "generators": all_generators,
                    "window": self.window,
                }
                torch.save(state, folder / "state.pt")

            folder = self.checkpoint_folder()
            folder.parent.mkdir(parents=True, exist_ok=True)
            remember_backbones(self.output_dir, self.model.visual_folder, self.model.llm_folder)
            save_checkpoint(self.model, folder, self.position | self.last_figures, self.provenance, save_state)
            for old in list_checkpoints(self.output_dir)[: -self.config.train.save_total_limit]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _find_checkpoint(self, resume: str | None) -> Path | None:
        existing = list_checkpoints(self.output_dir)
        if resume is None:
            if existing:
                raise UserError(
                    f"'train.output_dir': {self.output_dir} already holds {existing[-1].name}: go on from it with "
                    "--resume auto, or set another train.output_dir"
                )
            return None
        if resume == "auto":
            return check_complete(existing[-1]) if existing else None
        return check_complete(Path(resume))

    def _read_state(self, folder: Path) -> dict[str, Any]:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        if state["processes"] != self.accelerator.num_processes:
            raise UserError(
                f"{folder.parent.name} was written by {state['processes']} processes, this run has "
                f"{self.accelerator.num_processes}: resume with as many, or start from its weights with train.init_from"
            )
        return state

    def _restore_state(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        generators = state["generators"][self.accelerator.process_index]
        torch.set_rng_state(generators["cpu"])
        if "cuda" in generators and self.accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(generators["cuda"])
        self.position, self.window = state["position"], state["window"]


def _provenance(config: Config) -> dict[str, Any]:
    """What made a checkpoint: library versions, the code's commit, a hash of the data."""
    commit = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", "HEAD"], cwd=REPO_ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    libraries = {"torch": torch, "transformers": transformers, "peft": peft, "accelerate": accelerate}
    return {
        "versions": {"python": platform.python_version()} | {name: lib.__version__ for name, lib in libraries.items()},
        "commit": commit or None,
        "data": data_hash(config),
    }
