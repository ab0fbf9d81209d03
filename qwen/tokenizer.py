"""Loads the tokenizer of a Qwen checkpoint and gives `<|extra_0|>`, the photo's placeholder, an id of its own.

Called by `model/model.py`. Qwen2, 2.5 and 3 do not know `<|extra_0|>`; their embedding has spare rows above the last
token (Qwen2.5: 151,936 rows, 151,665 used), and the placeholder takes the first of them. Its row is never looked up:
image features stand in its place before the language model reads anything.
"""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from config import IMAGE_TAG

CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The fast tokenizer in `folder`, with `<|extra_0|>` as a special token.

    Raises:
        ValueError: no tokenizer files, or a vocabulary without the ChatML control tokens.
    """
    if (folder / "qwen.tiktoken").exists():
        raise ValueError(f"{folder}: Qwen v1 checkpoints are not read yet; use Qwen2, Qwen2.5 or Qwen3")
    if not (folder / "tokenizer.json").exists() and not (folder / "vocab.json").exists():
        raise ValueError(f"{folder}: no tokenizer.json or vocab.json: copy the tokenizer files beside the weights")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in CONTROL_TOKENS if token not in vocabulary]
    if missing:
        raise ValueError(f"{folder}: the tokenizer lacks {', '.join(missing)}: it is not that of a Qwen chat model")
    if IMAGE_TAG not in vocabulary:
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TAG]}, replace_extra_special_tokens=False)
    return tokenizer


def image_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of `<|extra_0|>`."""
    return tokenizer.convert_tokens_to_ids(IMAGE_TAG)
