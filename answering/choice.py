"""Choice of the next token by the decoding settings. Used by `answer.py` and `batches.py`."""

from collections.abc import Sequence

import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from config import Generate


class TokenChoice:
    """Chooses the tokens of one answer; has the random numbers of its own, so other answers do not change it."""

    def __init__(self, settings: Generate, device: torch.device) -> None:
        self.greedy = settings.temperature == 0
        self.uses_history = settings.repetition_penalty != 1.0
        self._generator = torch.Generator(device).manual_seed(settings.seed)
        self._processors = LogitsProcessorList()
        if self.uses_history:
            self._processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
        if not self.greedy:
            self._processors.append(TemperatureLogitsWarper(settings.temperature))
            if settings.top_p < 1:
                self._processors.append(TopPLogitsWarper(settings.top_p))

    def token(self, logits: torch.Tensor, history: Sequence[int]) -> int:
        """Choose a token by `logits` (V,); `history` has prompt and answer, and may be empty unless `uses_history`."""
        scores = self._processors(torch.tensor([history], device=logits.device), logits.unsqueeze(0))  # (1, V)
        if self.greedy:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))
