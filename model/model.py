"""The whole model: image encoder → projector → Qwen, each frozen, with LoRA or trained whole (`model/parts.py`).

`train.py` builds it with `MMultiModal.from_config`; the other scripts load it with `model.checkpoint.load_checkpoint`.

Shapes: B batch, C crops (a photo without tiles is one), T text and image tokens, R encoder rows of a crop, M projector
tokens of a crop, Dv and Dl widths, V vocabulary.
"""

from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging as transformers_logging

from backbones.backbone import locate_backbone
from batch import Batch
from config import Config
from errors import UserError
from model.contrastive import contrastive_loss
from model.parts import make_parts
from model.precision import DTYPES, pick_device, pick_precision
from model.processor import Processor
from model.projector import FeatureProjector, build_projector
from qwen.chat import IGNORE_INDEX, ChatFormat
from qwen.loading import load_language_model
from qwen.lora import merge_lora
from qwen.Mqwen import LOSS_ROWS, supervised_positions
from qwen.tokenizer import image_token_id, load_tokenizer
from visual.encoder import load_encoder
from visual.tower import Tower
from visual.transform import ImageTransform

# crops per encoder call, for any batch size: 5,832 rows at so400m, enough to use a GPU fully; their widest activation
# (4,304 columns in bf16) is 50 MB
ENCODER_CROPS = 8
UNTRAINED_SEED = 0


class MMultiModal(nn.Module):
    """Encoder, projector and language model.

    Attributes:
        encoder: a tower of `visual.encoder.TOWERS`.
        feature_proj: a projector of `model.projector.PROJECTORS`.
        LLM: one of `qwen.loading.LANGUAGE_MODELS`, in peft's wrapper where it has LoRA; see `language_model`.
        processor: makes the inputs.
        parts: the trained parts; all other weights are frozen.
        config: config of the run.
        visual_folder, llm_folder: folders of the backbones.
    """

    def __init__(
        self,
        config: Config,
        encoder: Tower,
        LLM: nn.Module,
        tokenizer,
        transform: ImageTransform,
        visual_folder: Path,
        llm_folder: Path,
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder.requires_grad_(False)
        self.LLM = LLM.requires_grad_(False)
        self.visual_folder, self.llm_folder = visual_folder, llm_folder
        if transform.size != encoder.size:
            raise UserError(
                f"'visual.path': the image processor makes {transform.size[0]}×{transform.size[1]} pictures, the "
                f"encoder takes {encoder.size[0]}×{encoder.size[1]}"
            )
        self.feature_proj = build_projector(config.projector, encoder.grid, encoder.width, LLM.config.hidden_size)
        crop_tokens = self.feature_proj.tokens(encoder.grid)
        if config.visual.image_tokens not in (None, crop_tokens):
            raise UserError(
                f"'visual.image_tokens' is {config.visual.image_tokens}, but the encoder gives {encoder.grid.rows} "
                f"rows with 'visual.drop' {config.visual.drop}, of which the projector '{config.projector.kind}' makes "
                f"{crop_tokens} tokens: set it to that, or to null"
            )
        chat = ChatFormat(tokenizer, config.prompt, crop_tokens, LLM.config.model_type)
        self.processor = Processor(tokenizer, transform, chat, config.visual.tiles)
        self.parts = make_parts(self)

    @classmethod
    def from_config(
        cls,
        config: Config,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        run_folder: Path | None = None,
    ) -> "MMultiModal":
        """Load both backbones and add projector and adapters, newly initialised from `train.seed`.

        Args:
            device: default as `pick_device`.
            dtype: of the frozen weights; default as `train.precision`.
            run_folder: run folder of the checkpoint with this config; it records the backbones' folders.

        Raises:
            UserError: a backbone is missing, incomplete or of an unknown kind, or the config does not fit it.
        """
        transformers_logging.disable_progress_bar()
        device = pick_device(device)
        dtype = DTYPES[pick_precision(config.train.precision, device)] if dtype is None else dtype
        visual_folder = locate_backbone(config.visual.path, config.model_root, "visual.path", config.hub, run_folder)
        llm_folder = locate_backbone(config.llm.path, config.model_root, "llm.path", config.hub, run_folder)
        encoder = load_encoder(visual_folder, dtype, config.visual.drop, config.visual.feature).to(device)
        tokenizer = load_tokenizer(llm_folder)
        LLM = load_language_model(
            llm_folder,
            dtype,
            image_token_id(tokenizer),
            len(tokenizer),
            placement=device if config.llm.device_map is None else config.llm.device_map,
            quantization=config.llm.quantization,
        )
        transform = ImageTransform.from_folder(visual_folder)
        with torch.random.fork_rng(devices=[]):  # same initial weights, independent of earlier random numbers
            torch.manual_seed(config.train.seed)
            model = cls(config, encoder, LLM, tokenizer, transform, visual_folder, llm_folder)
        # the language model is already on its device, and adapters are created on the device of their layers
        model.feature_proj.to(device)
        return model

    @property
    def language_model(self) -> nn.Module:
        """The language model without peft's wrapper; LoRA is inside its layers."""
        return self.LLM.get_base_model() if isinstance(self.LLM, PeftModel) else self.LLM

    def merge_lora(self) -> None:
        """Add LoRA to the weights where `qwen.lora.merge_lora` can; it can then be neither trained nor saved."""
        merge_lora(self.encoder)
        if merge_lora(self.LLM):
            self.LLM = self.language_model
        self.drop_stale_parts()

    def drop_stale_parts(self) -> None:
        """Forget the parts whose weights are no longer the model's: they can be neither trained nor saved."""
        left = {id(weight) for weight in self.parameters()}
        self.parts = [part for part in self.parts if all(id(weight) in left for weight in part.parameters.values())]

    @property
    def device(self) -> torch.device:
        return self.feature_proj.device

    def fresh_projector(self) -> FeatureProjector:
        """Return an untrained projector, always the same one, in eval mode; all else is as the model's."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(UNTRAINED_SEED)
            fresh = build_projector(
                self.config.projector, self.encoder.grid, self.encoder.width, self.LLM.config.hidden_size
            )
        return fresh.to(self.feature_proj.device, self.feature_proj.dtype).eval()

    @property
    def suppressed_ids(self) -> list[int]:
        """Ids excluded from answers: the placeholder, and the unused spare rows of the embedding."""
        rows = self.LLM.get_output_embeddings().out_features
        return [self.processor.chat.image_token_id, *range(len(self.processor.tokenizer), rows)]

    @property
    def trains_encoder(self) -> bool:
        """Whether any weight of the encoder needs a gradient."""
        return any(parameter.requires_grad for parameter in self.encoder.parameters())

    def train(self, mode: bool = True) -> "MMultiModal":
        """As the parent's; a frozen encoder stays in eval mode."""
        super().train(mode)
        if not self.trains_encoder:
            self.encoder.eval()
        return self

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """`(C, 3, H, W)` pixels → `(C, R, Dv)` encoder features, without a graph if the encoder is frozen."""
        trained = self.trains_encoder and torch.is_grad_enabled()
        # under autocast, the layer norms of a frozen encoder would convert their input to float32 and back
        autocast = torch.is_autocast_enabled(pixels.device.type) and self.trains_encoder
        with torch.set_grad_enabled(trained), torch.autocast(pixels.device.type, enabled=autocast):
            pixels = pixels.to(self.encoder.dtype)
            return torch.cat([self.encoder(crops) for crops in pixels.split(ENCODER_CROPS)])

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """`(C, R, Dv)` encoder features → `(C, M, Dl)` image tokens; dropout in training."""
        # dropout is for what is trained: before a frozen projector it would only be noise
        trained = any(parameter.requires_grad for parameter in self.feature_proj.parameters())
        kept = nn.functional.dropout(features, self.config.projector.dropout, self.training and trained)
        return self.feature_proj(kept, self.encoder.grid)

    def forward(
        self,
        image: torch.Tensor | None,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        position_ids: torch.Tensor | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits of ordinary sequences, and the loss if labels are given; training uses `loss` instead.

        Args:
            image: (C, 3, H, W) in reading order of the placeholders; None: no photo.
            input_ids: (B, T), with the placeholders of each photo.
            labels: (B, T), -100 at unsupervised positions.
            attention_mask: (B, T).
            logits_to_keep: number of last positions with logits; 0: all.
            position_ids: (B, T).

        Raises:
            ValueError: placeholders and photos differ in number.
        """
        images = None if image is None else self.project(self.encode_image(image))  # (C, M, Dl)
        if attention_mask is None:  # without one, transformers guesses from positions that sequences were packed
            attention_mask = torch.ones_like(input_ids)
        return self.LLM(
            inputs_embeds=self.language_model.embed(input_ids, images),
            attention_mask=attention_mask,
            position_ids=position_ids,
            labels=labels,
            logits_to_keep=logits_to_keep,
        )

    def loss(self, batch: Batch, num_items: int | None = None) -> torch.Tensor:
        """Next-token loss of a packed micro-batch, computed at its supervised positions only; a scalar.

        In training mode, `train.contrastive_weight` times the contrastive term of its photos is added.

        Args:
            num_items: divisor of the summed loss (the supervised tokens of the whole optimizer step); None: those of
                this batch.

        Raises:
            ValueError: placeholders and photos differ in number.
        """
        embeddings, images = self._embed(batch)
        loss = self.language_model.packed_loss(embeddings, batch.labels, batch.position_ids, batch.lengths, num_items)
        if self.training and (images is None or self.trains_encoder):
            # all processes of a distributed run need gradients for the same weights: also in a batch without photos,
            # and for weights that the encoder's output does not depend on (CLIP's last norm, DINOv2's mask token)
            visual = (*self.feature_proj.parameters(), *self.encoder.parameters())
            loss = loss + 0.0 * sum(weight.flatten()[:1].sum() for weight in visual if weight.requires_grad)
        weight = self.config.train.contrastive_weight
        if weight > 0 and images is not None and self.training:
            own = int((batch.labels[:, 1:] != IGNORE_INDEX).sum())
            share = own / num_items if num_items is not None else 1.0  # share of this batch in the step
            term = contrastive_loss(batch, embeddings, self.processor.chat.image_token_id)
            loss = loss + weight * share * term
        return loss

    def logits(self, batch: Batch) -> torch.Tensor:
        """Logits (1, T, V) of every position of a packed micro-batch; errors as `loss`."""
        embeddings, _ = self._embed(batch)
        states = self.language_model.packed_states(embeddings, batch.position_ids, batch.lengths)
        return self.language_model.head(states)

    def token_losses(self, batch: Batch) -> torch.Tensor:
        """Next-token loss (S,) in float32 of each supervised position, in the order of the row; errors as `loss`."""
        embeddings, _ = self._embed(batch)
        predicts, targets = supervised_positions(batch.labels)
        hidden = self.language_model.packed_states(embeddings, batch.position_ids, batch.lengths, predicts)  # (S, Dl)
        parts = zip(hidden.split(LOSS_ROWS), targets.split(LOSS_ROWS), strict=True)
        losses = [
            functional.cross_entropy(self.language_model.head(rows).float(), target, reduction="none")
            for rows, target in parts
        ]
        return torch.cat(losses)

    def _embed(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Input embeddings (1, T, Dl), and the projected crops (C, M, Dl)."""
        features = batch.image_features
        if batch.pixel_values is not None:
            features = self.encode_image(batch.pixel_values)
        images = None if features is None else self.project(features)
        shown = None if images is None else images[batch.crop_index]  # in reading order of the placeholders
        return self.language_model.embed(batch.input_ids, shown), images

    def decode(self, embeddings: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """Process `embeddings` (1, T, Dl) after the tokens in `cache`; return the last logits (V,) in float32."""
        start, length = cache.get_seq_length(), embeddings.shape[1]
        positions = torch.arange(start, start + length, device=embeddings.device).unsqueeze(0)
        # A number here would give lm_head a view with the strides of all positions. In bfloat16 on a CPU, torch then
        # copies the whole vocabulary's weights first (0.6 s of Qwen2.5-0.5B's); an index gives a tensor of its own.
        last = torch.arange(length - 1, length, device=embeddings.device)
        output = self.LLM(
            inputs_embeds=embeddings, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=last
        )
        return output.logits[0, -1].float()

    @torch.no_grad()
    def generate(
        self, image: torch.Tensor | None, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor:
        """transformers' own `generate` on fused inputs.

        Args:
            image, input_ids, attention_mask: as in `forward`; batches are padded on the left.
            kwargs: `max_new_tokens`, `do_sample`, … of transformers' `GenerationMixin.generate`; they replace the stop
                and suppressed tokens set here.

        Returns:
            (B, new tokens) int64, ended by one of `chat.stop_ids` and padded with it.
        """
        images = None if image is None else self.project(self.encode_image(image))
        embeddings = self.language_model.embed(input_ids, images)  # (B, T, Dl)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        stop_ids = sorted(self.processor.chat.stop_ids)
        settings = {"eos_token_id": stop_ids, "pad_token_id": stop_ids[0], "suppress_tokens": self.suppressed_ids}
        # the ids are passed for the repetition penalty, which includes the prompt
        tokens = self.LLM.generate(
            input_ids=input_ids, inputs_embeds=embeddings, attention_mask=attention_mask, **(settings | kwargs)
        )
        return tokens[:, input_ids.shape[1] :]

    def parameter_summary(self) -> str:
        """One line: total parameters, trained parameters of each part, dtype and device."""
        # a byte of a quantised matrix holds two 4-bit weights
        total = sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in self.parameters())
        trained = ", ".join(
            f"{part.name} {sum(p.numel() for p in part.parameters.values() if p.requires_grad):,}"
            for part in self.parts
        )
        dtype = str(self.encoder.dtype).removeprefix("torch.")
        quantization = self.config.llm.quantization
        dtype += f", the language model's {quantization}," if quantization != "none" else ""
        return f"{total:,} parameters, trained: {trained}; frozen weights {dtype} on {self.device}"


class LossOf(nn.Module):
    """`model.loss` as a forward pass, because torch's DistributedDataParallel wraps only `forward`."""

    def __init__(self, model: MMultiModal) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, num_items: int) -> torch.Tensor:
        """See `MMultiModal.loss`."""
        return self.model.loss(batch, num_items)
