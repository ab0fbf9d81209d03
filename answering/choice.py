"""Choice of the next token by the decoding settings. Used by all modules that make answers."""

from collections.abc import Sequence

import torch
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from config import Generate
from model.model import MMultiModal


class TokenChoice:
    """Chooses the tokens of one answer; has the random numbers of its own, so other answers do not change it.

    The processors and their order are those of transformers' `generate`.

    Args:
        prompt: ids of the prompt; the repetition penalty counts them too.
        device: of the logits.
    """

    def __init__(self, settings: Generate, prompt: Sequence[int], device: torch.device) -> None:
        self._greedy = settings.temperature == 0
        self._processors: list[LogitsProcessor] = []
        self._history: torch.Tensor | None = None  # (1, T) ids of prompt and answer, for the penalty only
        if settings.repetition_penalty != 1.0:
            self._history = torch.tensor([[*prompt]], device=device)
            self._processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
        if not self._greedy:
            self._generator = torch.Generator(device).manual_seed(settings.seed)
            self._processors.append(TemperatureLogitsWarper(settings.temperature))
            if settings.top_k > 0:
                self._processors.append(TopKLogitsWarper(settings.top_k))
            if settings.top_p < 1:
                self._processors.append(TopPLogitsWarper(settings.top_p))
            if settings.min_p > 0:
                self._processors.append(MinPLogitsWarper(settings.min_p))

    @property
    def takes_likeliest(self) -> bool:
        """Whether each token is simply the likeliest."""
        return not self._processors

    def token(self, logits: torch.Tensor) -> int:
        """Choose the next token by `logits` (V,)."""
        scores = logits.unsqueeze(0)  # (1, V)
        for processor in self._processors:
            scores = processor(self._history, scores)
        if self._greedy:
            token = scores.argmax(-1, keepdim=True)  # (1, 1)
        else:
            token = torch.multinomial(scores.softmax(-1), 1, generator=self._generator)
        if self._history is not None:
            self._history = torch.cat([self._history, token], dim=1)
        return int(token)


def suppress(model: MMultiModal, logits: torch.Tensor) -> None:
    """Exclude the ids that no answer has, the model's `suppressed_ids`, from `logits` (…, V), in place."""
    logits[..., model.processor.chat.image_token_id] = -torch.inf
    logits[..., len(model.processor.tokenizer) :] = -torch.inf
