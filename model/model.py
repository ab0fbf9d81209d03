"""The whole model: frozen SigLIP encoder → projector → Qwen with LoRA.

`train.py` builds it with `MMultiModal.from_config`; the other scripts load it with `model.checkpoint.load_checkpoint`.

Shapes: B batch, B_img photos, T text and image tokens, N image tokens of a photo, Dv and Dl widths, V vocabulary.
"""

import warnings
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging as transformers_logging

from backbones.backbone import locate_backbone
from config import Config
from errors import UserError
from model.precision import DTYPES, pick_device, pick_precision
from qwen.attention import PackedLayout
from qwen.chat import ChatFormat
from qwen.loading import load_language_model
from qwen.lora import LoraLinear
from qwen.tokenizer import image_token_id, load_tokenizer
from visual.encoder import load_encoder
from visual.transform import ImageTransform

# photos that pass the encoder at once, whatever the batch: at so400m 5,832 rows, enough to keep a GPU busy, whose
# widest activation (4,304 columns in bf16) is 50 MB
ENCODER_PHOTOS = 8


class MMultiModal(nn.Module):
    """Encoder, projector and language model with their tokenizer, image transform and prompt format.

    Attributes:
        encoder: `SigLIPViT` or `CLIPViT`, frozen.
        feature_proj: Linear(Dv, Dl), GELU, Linear(Dl, Dl); float32 in training.
        LLM: peft model around one of `qwen.Mqwen.LANGUAGE_MODELS`; LoRA in float32, the rest frozen.
        config, tokenizer, transform, chat: what the run was configured with.
        visual_folder, llm_folder: where the backbones were found.
    """

    def __init__(
        self, config: Config, encoder: nn.Module, LLM: nn.Module, tokenizer, transform: ImageTransform
    ) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.transform = transform
        assert not any(parameter.requires_grad for parameter in encoder.parameters()), "the encoder must be frozen"
        self.encoder = encoder
        self.LLM = LLM
        self.feature_proj = nn.Sequential(
            nn.Linear(encoder.config.hidden_size, LLM.config.hidden_size),
            nn.GELU(),
            nn.Linear(LLM.config.hidden_size, LLM.config.hidden_size),
        )
        for layer in (self.feature_proj[0], self.feature_proj[2]):
            nn.init.normal_(layer.weight, mean=0.0, std=config.projector.init_std)
            nn.init.zeros_(layer.bias)
        self.num_image_tokens = encoder.num_tokens - int(config.visual.drop_first_token)
        if config.visual.image_tokens not in (None, self.num_image_tokens):
            raise UserError(
                f"'visual.image_tokens' is {config.visual.image_tokens}, but the encoder gives {encoder.num_tokens} "
                f"tokens and 'visual.drop_first_token' is {config.visual.drop_first_token}: "
                f"that makes {self.num_image_tokens}"
            )
        if transform.size != (encoder.config.image_size, encoder.config.image_size):
            raise UserError(
                f"'visual.path': preprocessor_config.json makes {transform.size[0]}×{transform.size[1]} pictures, "
                f"the encoder takes {encoder.config.image_size} px squares"
            )
        self.chat = ChatFormat(tokenizer, config.prompt, self.num_image_tokens, LLM.config.model_type)

    @classmethod
    def from_config(
        cls,
        config: Config,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        run_folder: Path | None = None,
    ) -> "MMultiModal":
        """Load both backbones and add the projector and LoRA, newly initialised from `train.seed`.

        Args:
            device: default as `pick_device`.
            dtype: of the frozen backbones; default what `train.precision` says.
            run_folder: of a checkpoint that `config` is of; says where its backbones were on this machine.

        Raises:
            UserError: a backbone is missing, incomplete or of an unknown kind, or the config does not fit it.
        """
        transformers_logging.disable_progress_bar()
        device = pick_device(device)
        dtype = DTYPES[pick_precision(config.train.precision, device)] if dtype is None else dtype
        visual_folder = locate_backbone(config.visual.path, config.model_root, "visual.path", config.hub, run_folder)
        llm_folder = locate_backbone(config.llm.path, config.model_root, "llm.path", config.hub, run_folder)
        encoder = load_encoder(visual_folder, dtype)
        tokenizer = load_tokenizer(llm_folder)
        LLM = load_language_model(
            llm_folder,
            dtype,
            image_token_id(tokenizer),
            len(tokenizer),
            placement=device if config.llm.device_map is None else config.llm.device_map,
            quantization=config.llm.quantization,
        ).requires_grad_(False)
        with torch.random.fork_rng(devices=[]):  # the same weights at the start, whatever drew random numbers before
            torch.manual_seed(config.train.seed)
            LLM = _with_lora(LLM, config)
            model = cls(config, encoder, LLM, tokenizer, ImageTransform.from_folder(visual_folder))
        model.visual_folder, model.llm_folder = visual_folder, llm_folder
        # the language model is in its place already; LoRA is made where the layers are
        model.encoder.to(device)
        model.feature_proj.to(device)
        return model

    def freeze_lora(self) -> None:
        """Leave LoRA as it is: no gradient, so no optimiser state and no part in the norm that clips the projector's.

        For training the projector alone (`train.lora_lr: 0`); to be called before the optimiser is built.
        """
        for name, parameter in self.LLM.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self.feature_proj[0].weight.device

    @property
    def suppressed_ids(self) -> list[int]:
        """Ids no answer holds: the photo's placeholder, and the spare rows of the embedding, which mean nothing."""
        rows = self.LLM.get_output_embeddings().weight.shape[0]
        return [self.chat.image_token_id, *range(len(self.tokenizer), rows)]

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """`(B_img, 3, H, W)` pixels → `(B_img, N, Dv)` encoder features without a graph.

        With `visual.drop_first_token` the first row is left out: CLIP's class token. SigLIP has none: what goes is
        the top-left patch, kept this way because the report's checkpoints were trained so.
        """
        # under autocast, layer norms would take their input to float32 and back
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            image = image.to(self.encoder.dtype)
            features = torch.cat([self.encoder(photos) for photos in image.split(ENCODER_PHOTOS)])
        return features[:, int(self.config.visual.drop_first_token) :]  # (B_img, N, Dv)

    def project(self, image_features: torch.Tensor) -> torch.Tensor:
        """`(B_img, N, Dv)` encoder features → `(B_img, N, Dl)` rows the language model reads."""
        return self.feature_proj(image_features.to(self.feature_proj[0].weight.dtype))

    def forward(
        self,
        image: torch.Tensor | None,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        position_ids: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        supervised_only: bool = False,
        num_items_in_batch: int | None = None,
        past_key_values=None,
        use_cache: bool | None = None,
        layout: PackedLayout | None = None,
        photo_index: torch.Tensor | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss where there are labels.

        Args:
            image: (B_img, 3, H, W) in reading order of the placeholders; None: no photo, or `image_features` given.
            input_ids: (B, T), each photo's `<|extra_0|>` standing N times.
            labels: (B, T), -100 where nothing is asked.
            attention_mask: (B, T), or (B, 1, T, T) bool, True where a position may look.
            logits_to_keep: compute logits for the last so many positions only; 0 = all.
            position_ids: (B, T).
            image_features: (B_img, N, Dv) of `encode_image`, computed earlier.
            supervised_only: `lm_head` on labelled positions only; `logits` is None then.
            num_items_in_batch: divide the summed loss by this instead of by the labels of this batch.
            layout: for a row of packed samples, B = 1, in place of `attention_mask` (see `qwen/attention.py`).
            photo_index: (placeholders' photos,) which row of `image` or `image_features` stands where, in reading
                order; None: each stands once, in its order.

        Raises:
            ValueError: placeholders and photos differ in number, or both kinds of image input are given.
        """
        if image is not None and image_features is not None:
            raise ValueError("give 'image' or 'image_features', not both")
        if image is not None:
            image_features = self.encode_image(image)
        images = None if image_features is None else self.project(image_features)  # (B_img, N, Dl)
        if images is not None and photo_index is not None:
            images = images[photo_index]
        output = self.LLM(
            input_ids=input_ids,
            images=images,
            labels=labels,
            attention_mask=attention_mask,
            position_ids=position_ids,
            supervised_only=supervised_only,
            num_items_in_batch=num_items_in_batch,
            **({} if layout is None else {"layout": layout, "flex": self.config.train.attention == "flex"}),
            **({} if supervised_only else {"logits_to_keep": logits_to_keep}),
            **({} if past_key_values is None else {"past_key_values": past_key_values}),
            **({} if use_cache is None else {"use_cache": use_cache}),
        )
        if images is None and self.training and output.loss is not None:
            # every process of a distributed run must touch the projector, also when it drew only text
            nothing = self.project(self.feature_proj[0].weight.new_zeros(1, 1, self.feature_proj[0].in_features))
            output.loss = output.loss + 0.0 * nothing.sum()
        return output

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
        language_model = self.LLM.get_base_model()
        embeddings = language_model.embed_with_images(input_ids, images)  # (B, T, Dl)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        stop_ids = sorted(self.chat.stop_ids)
        settings = {"eos_token_id": stop_ids, "pad_token_id": stop_ids[0], "suppress_tokens": self.suppressed_ids}
        # the ids go along for a repetition penalty, which counts those of the prompt too
        tokens = self.LLM.generate(
            input_ids=input_ids, inputs_embeds=embeddings, attention_mask=attention_mask, **(settings | kwargs)
        )
        return tokens[:, input_ids.shape[1] :]

    def parameter_summary(self) -> str:
        """One line: parameters in all, those trained of each part, dtype and device."""
        counts = {
            name: sum(p.numel() for p in part.parameters() if p.requires_grad)
            for name, part in (("encoder", self.encoder), ("projector", self.feature_proj), ("LoRA", self.LLM))
        }
        # a byte of a quantised matrix holds two 4-bit weights
        total = sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in self.parameters())
        trained = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        dtype = str(self.encoder.dtype).removeprefix("torch.")
        quantization = self.config.llm.quantization
        dtype += f", the language model's {quantization}," if quantization != "none" else ""
        return f"{total:,} parameters, trained: {trained}; frozen weights {dtype} on {self.device}"


def _with_lora(LLM: nn.Module, config: Config) -> nn.Module:
    lora = config.llm.lora
    linear_names = {name.rpartition(".")[2] for name, part in LLM.named_modules() if isinstance(part, nn.Linear)}
    unknown = sorted(set(lora.target_modules) - linear_names)
    if unknown:
        raise UserError(
            f"'llm.lora.target_modules': {', '.join(unknown)} not in the language model; "
            f"its linear layers are {', '.join(sorted(linear_names))}"
        )
    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    if config.llm.quantization == "none":  # quantised layers have LoRA layers of their own in peft
        settings._register_custom_module({nn.Linear: LoraLinear})
    with warnings.catch_warnings():  # peft reads what transformers has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(LLM, settings)
