"""Construction of a run from the config: processes, model, data, setting, optimizer. Used by `loop.py`."""

import contextlib
import math
import os
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import PreTrainedModel

from batch import Batch
from compat import set_activation_checkpointing
from config import Config, Train
from dataset.image_caption_dataset import ImageCaptionDataset
from dataset.records import Entry, Photo
from errors import UserError
from model.checkpoint import fingerprints
from model.checkpoint_folder import check_complete, read_config, read_provenance
from model.model import MMultiModal
from model.parts import check_part_name
from model.precision import DTYPES, pick_device, pick_precision
from model.restore import restore_weights
from paths import check_folder, resolve_path
from training import state
from training.agreement import all_or_none, on_main
from training.batches import checked
from training.costs import Arithmetic, PeakMemory, matrix_peak
from training.data import (
    MicroBatches,
    build_datasets,
    epoch_order,
    micro_batches,
    read_split,
    sample_lengths,
    validation_sample,
)
from training.estimate import Estimate, Setting, Trial, choose_setting, longest_sample, usable_memory
from training.folder_lock import folder_lock
from training.movement import sample_weights
from training.optimizer import build_optimizer, build_schedule
from training.provenance import make_provenance
from training.run_log import check_trackers
from training.sharding import check_shardable, wrap
from training.signals import StopSignals
from training.word_alignment import align_words

# keys that determine the setting; if none has changed, a resumed run keeps the values that `auto` chose
SETTING_KEYS = ("micro_batch", "accumulation", "samples_per_step", "tokens_per_batch", "gradient_checkpointing")
LENGTH_KEYS = ("epochs", "max_steps")  # together with SETTING_KEYS they determine the number of steps


class Run:
    """Model, data, optimizer and state of one run.

    Args:
        config: config of the run.
        resume: checkpoint folder to continue from; `"auto"`: the newest of `train.output_dir`; None: a new run.
        accept_changes: resume although data, split, seeds, packing, weights or prompt differ from the checkpoint's.
        dry_run: do not train: ignore existing checkpoints and do not fill the feature cache.

    Attributes:
        accelerator, precision: the processes of the run and their compute precision.
        in_use: lock of the output folder, which the first process holds while the run trains.
        model, wrapped: the model, and the wrapper of its loss that synchronises gradients over processes.
        train_set, val_set: the data; each validation reads the indices in `val_samples`.
        setting: micro-batch size, accumulation and gradient checkpointing of a step.
        optimizer, schedule: of the trained parts.
        progress: the position of the run.
        stop: the first stop signal that this process received.
        steps_per_epoch, total_steps: numbers of optimizer steps.
        whole_step: False during an update, when some weights already belong to the next step.
        last_figures: the newest value of each logged figure.
        saved_step: the step of the newest checkpoint.
        start: sampled weights from the start of the run; None if the resumed checkpoint lacks them.

    Raises:
        UserError: wrong data, backbones or checkpoint; or a new run in an output folder that contains checkpoints.
    """

    def __init__(
        self, config: Config, resume: str | None = None, accept_changes: bool = False, dry_run: bool = False
    ) -> None:
        assert not config.train.stages, "training.stages.stages runs them"
        if dry_run and config.train.shard:
            raise UserError("--dry-run measures a process that has all weights: set train.shard=false for it")
        check_trackers(config.train)
        for key, _ in config.train.parts:
            check_part_name(key)
        self.config = config
        self.accelerator, self.precision = make_accelerator(config)
        self.output_dir = resolve_path(config.train.output_dir)
        self.in_use = folder_lock(self.output_dir)
        check_folder(self.output_dir, "'train.output_dir'")
        resumed = None if dry_run else state.find_checkpoint(self.accelerator, self.output_dir, resume)
        saved = None if resumed is None else state.read_state(resumed, self.accelerator)
        photos, train, val = read_split(config)
        self.provenance = make_provenance(config)
        if resumed is not None:
            accepted = state.accepted_changes(resumed, self.provenance["shape"], accept_changes)
            self.provenance["accepted_changes"] = accepted

        self.model = load_model(config, self.accelerator.device, self.precision)
        self._restore_weights(resumed, accept_changes)
        if config.train.compile:
            compile_layers(self.model.language_model)
        self._same_on_all_processes()
        # on each disk, the first process writes the feature cache; the other processes read it
        with self.accelerator.main_process_first(), self.accelerator.local_main_process_first():
            self.train_set, self.val_set = build_datasets(config, self.model, photos, train, val, encode=not dry_run)
        if config.train.word_alignment and resumed is None and not dry_run:
            if config.train.init_from is None:
                self._align_projector(photos, train)
            else:
                self.say("train.word_alignment is left out: the projector of train.init_from is trained already")
        self.weights = {source.name: source.weight for source in config.data.sources}
        self.val_samples = validation_sample(self.val_set, config.train.eval_samples, config.train.seed)

        self.wrapped = wrap(self.accelerator, self.model)
        before = None if resumed is None else read_config(resumed).train
        self.stop = StopSignals()
        self._counted: tuple[int, Sequence[int]] = (-1, ())
        self.setting = self._setting(saved, before)
        self.set_checkpointing(self.setting.checkpointing)
        self.steps_per_epoch = math.ceil(len(self.epoch_batches(0)) / self.batches_per_step)
        same_data = resumed is None or read_provenance(resumed).get("shape") == self.provenance["shape"]
        self.total_steps = self._count_steps(saved, before, same_data)
        optimizer = build_optimizer(self.model, config.train)
        self.schedule = build_schedule(optimizer, config.train, self.total_steps)
        self.optimizer = self.accelerator.prepare(optimizer)
        self.arithmetic = Arithmetic(self.model)
        self.matrix_peak = matrix_peak(self.accelerator.device, DTYPES[self.precision])
        torch.manual_seed(config.train.seed + self.accelerator.process_index)  # different dropout on each process
        self.whole_step = True
        self.last_figures = {} if resumed is None else state.saved_figures(resumed)
        self.saved_step = -1
        self.start = sample_weights(self.model) if saved is None else saved.get("start")
        self.progress = state.Progress() if saved is None else state.restore(self, saved)
        self.progress.note_generators(self.accelerator.device)

    @property
    def batches_per_step(self) -> int:
        """Number of micro-batches of an optimizer step over all processes."""
        return self.setting.accumulation * self.accelerator.num_processes

    @cached_property
    def estimate(self) -> Estimate:
        """Memory and time of micro-batches of any size; measured at the first access."""
        sample = checked(self.train_set[longest_sample(self.train_set)])
        trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        limit = usable_memory(self.accelerator.device)
        return Estimate(make_trial(self), sample, limit, trained, self.config.train.tokens_per_batch)

    def _setting(self, saved: dict[str, Any] | None, before: Train | None) -> Setting:
        if saved is not None and before is not None and same_keys(before, self.config.train, SETTING_KEYS):
            return Setting(**saved["setting"])
        setting = choose_setting(self.config.train, lambda: self.estimate)
        self.model.zero_grad()
        return setting

    def _count_steps(self, saved: dict[str, Any] | None, before: Train | None, same_data: bool) -> int:
        train = self.config.train
        if train.max_steps is not None or before is None or saved is None:
            return train.max_steps or train.epochs * self.steps_per_epoch
        if same_data and same_keys(before, train, SETTING_KEYS + LENGTH_KEYS):
            return saved["total_steps"]
        # earlier steps may have used another number of samples per step, or other samples
        step, epoch, samples = (saved["progress"][name] for name in ("step", "epoch", "samples"))
        if epoch >= train.epochs:
            return step
        rest = math.ceil(len(self.epoch_batches(epoch, samples)) / self.batches_per_step)
        return step + rest + (train.epochs - epoch - 1) * self.steps_per_epoch

    def _restore_weights(self, resumed: Path | None, accept_changes: bool) -> None:
        """Take the weights of the resumed checkpoint, or of `train.init_from`; print what differs."""
        notes: list[str] = []
        if resumed is not None:
            notes = restore_weights(self.model, resumed, other_prompt=accept_changes)
        elif self.config.train.init_from is not None:
            origin = check_complete(resolve_path(self.config.train.init_from))
            notes = restore_weights(self.model, origin, other_prompt=True, new_run=True)
        for note in notes:
            self.say(note)

    def _align_projector(self, photos: Mapping[int, Photo], entries: Sequence[Entry]) -> None:
        """Align the new projector with words on the first process, and give its weights to all."""

        def task() -> tuple[str, dict[str, torch.Tensor]]:
            train = self.config.train
            sentence = align_words(self.model, photos, entries, train.word_alignment, train.seed, train.workers)
            return sentence, {name: weight.cpu() for name, weight in self.model.feature_proj.state_dict().items()}

        sentence, weights = on_main(self.accelerator, task)
        self.model.feature_proj.load_state_dict(weights)
        self.say(sentence)

    def _same_on_all_processes(self) -> None:
        """Raise an error if processes have different files; averaging their gradients would raise none."""
        own = {"backbones and prompt": fingerprints(self.model), "data and config": self.provenance["shape"]}
        first = gather_object([own])[0]
        different = [name for name in own if own[name] != first[name]]
        problem = f"has other {' and '.join(different)} than process 0: give all machines the same files"
        all_or_none(self.accelerator, problem if different else None)

    def say(self, sentence: str) -> None:
        """Print a line on the first process, above its progress bar."""
        if self.accelerator.is_main_process:
            with contextlib.suppress(OSError):  # a closed terminal or pipe
                tqdm.write(sentence)

    def agree(self, problem: str | None) -> None:
        """Return if no process has a problem; otherwise all processes raise the first one as an AgreedError."""
        all_or_none(self.accelerator, problem)

    def set_checkpointing(self, on: bool) -> None:
        """Turn gradient checkpointing on or off in the language model and in a trained encoder."""
        set_activation_checkpointing(self.model.language_model, on)
        encoder = self.model.encoder.library_model
        if self.model.trains_encoder and isinstance(encoder, PreTrainedModel):  # other libraries: no checkpointing
            set_activation_checkpointing(encoder, on)

    def cut(
        self, dataset: ImageCaptionDataset, order: Sequence[int], processes: int = 1, start: int = 0
    ) -> MicroBatches:
        """Cut the sample indices from position `start` of `order` into micro-batches; see `micro_batches`."""
        train = self.config.train
        lengths = None if train.tokens_per_batch is None else self._lengths(dataset, order)
        return micro_batches(order, self.setting.micro_batch, processes, lengths, train.tokens_per_batch, start)

    def epoch_batches(self, epoch: int, samples: int = 0) -> MicroBatches:
        """Return the micro-batches of an epoch after its first `samples` samples; they alternate between processes."""
        self.train_set.set_epoch(epoch)
        order = epoch_order(self.train_set, self.weights, self.config.train.seed, epoch)
        return self.cut(self.train_set, order, self.accelerator.num_processes, samples)

    def _lengths(self, dataset: ImageCaptionDataset, order: Sequence[int]) -> Sequence[int]:
        """Tokens of the samples of `order`, by index; those of a training epoch are kept for the next call."""
        workers = self.config.train.workers
        if dataset is not self.train_set:
            return sample_lengths(dataset, workers, order, self.stop)
        if self._counted[0] != int(dataset.epoch):
            self._counted = int(dataset.epoch), sample_lengths(dataset, workers, stop=self.stop)
        return self._counted[1]


def same_keys(before: Train, now: Train, keys: tuple[str, ...]) -> bool:
    """Return whether both configs have the same values under `keys`."""
    return all(getattr(before, key) == getattr(now, key) for key in keys)


def make_accelerator(config: Config) -> tuple[accelerate.Accelerator, str]:
    """Set up the processes of the run; return the accelerator and the compute precision.

    Raises:
        UserError: this device or training does not support a setting, or some launched processes did not join.
    """
    if config.llm.device_map is not None:
        raise UserError(
            "'llm.device_map': auto is for answering; in training each GPU holds the language model whole: set "
            "llm.device_map=null, and llm.quantization=nf4 if it does not fit"
        )
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise UserError(
                f"accelerate's {name} is not used here: turn it off for the launch; train.shard=true shares all weights"
            )
    device = pick_device()
    precision = pick_precision(config.train.precision, device)
    # the other processes wait while one encodes the data set, which can exceed the default timeout
    waits = config.data.cache_features or config.train.word_alignment
    patience = [accelerate.InitProcessGroupKwargs(timeout=timedelta(hours=6))] if waits else []
    accelerator = accelerate.Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no" if precision == "float32" else precision,
        kwargs_handlers=patience,
    )
    if "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise UserError(
            "accelerate launch was asked for several processes on the CPU and started one, because it needs MPI there: "
            "use torchrun --nproc-per-node N train.py … (or unset MASTER_ADDR if one is meant)"
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise UserError(f"{launched} processes were launched but {accelerator.num_processes} joined the run")
    if config.train.shard:
        check_shardable(config, launched, precision)
    return accelerator, precision


def load_model(config: Config, device: torch.device, precision: str) -> MMultiModal:
    """Load the model; a language model that will be sharded stays on the CPU, as it may be larger than the device."""
    model = MMultiModal.from_config(config, "cpu" if config.train.shard else device, DTYPES[precision])
    model.encoder.to(device)
    model.feature_proj.to(device)
    return model


def compile_layers(language_model: torch.nn.Module) -> None:
    """Compile attention, MLP and norms of every decoder layer in place, for any sequence length.

    Gradient checkpointing wraps the whole layer, and torch does not compile a wrapped layer. Its submodules are
    therefore compiled one by one.
    """
    language_model.whole_layers = True
    for layer in language_model.model.layers:
        for part in layer.children():
            part.compile(dynamic=True)


def make_trial(run: Run) -> Trial:
    """Return a function that measures the peak memory of a batch and the time of the faster of two passes.

    The passes accumulate gradients, as the micro-batches of a step do. `Estimate` calls the function.
    """

    def trial(batch: Batch | None, checkpointing: bool) -> tuple[int, float]:
        run.set_checkpointing(checkpointing)
        run.wrapped.train()
        seconds = []
        with PeakMemory(run.accelerator.device) as peak:
            for _ in range(2):
                began = time.perf_counter()
                if batch is not None:
                    with run.accelerator.no_sync(run.wrapped):
                        loss = run.wrapped(batch.to(run.accelerator.device), 1)
                        run.accelerator.backward(loss)
                    loss.item()  # waits until the device is done
                seconds.append(time.perf_counter() - began)
        return peak.bytes, min(seconds)

    return trial
