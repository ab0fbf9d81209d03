"""Load the tokenizer of a Qwen checkpoint and give the placeholder `<|extra_0|>` its own id.

Called by `model/model.py`. Qwen v1 has `qwen.tiktoken`, which is converted to a fast tokenizer here; it contains
`<|extra_0|>`. Qwen2, 2.5 and 3 lack it. Their embedding has spare rows above the last token (Qwen2.5: 151,936 rows,
151,665 used), and the placeholder takes the first of them. This row has no effect, because image features replace it
before the first layer.
"""

import base64
import binascii
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from config import IMAGE_TAG
from errors import UserError

CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
TIKTOKEN_FILE = "qwen.tiktoken"
# Qwen v1's tokenizer: the special tokens follow the ranks of qwen.tiktoken in this order; the pattern splits text
QWEN1_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205)))
QWEN1_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the fast tokenizer in `folder`, with `<|extra_0|>` as a special token.

    Raises:
        UserError: no tokenizer files, damaged ones, or a vocabulary without the ChatML control tokens.
    """
    if (folder / TIKTOKEN_FILE).exists():
        return read_tiktoken(folder / TIKTOKEN_FILE)
    if not (folder / "tokenizer.json").exists() and not (folder / "vocab.json").exists():
        raise UserError(
            f"{folder}: no tokenizer.json, vocab.json or {TIKTOKEN_FILE}: copy the tokenizer files beside the weights"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in CONTROL_TOKENS if token not in vocabulary]
    if missing:
        raise UserError(f"{folder}: the tokenizer lacks {', '.join(missing)}: it is not that of a Qwen chat model")
    if IMAGE_TAG not in vocabulary:
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TAG]}, replace_extra_special_tokens=False)
    return tokenizer


def image_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of `<|extra_0|>`."""
    return tokenizer.convert_tokens_to_ids(IMAGE_TAG)


def text_encoder(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return a copy of the tokenizer's core that encodes all control tokens as plain characters.

    The tokenizer itself can do this only for special tokens, and `<think>` or `<tool_call>` of Qwen2.5 and 3 are not
    special. They must not become special, because decoding hides special tokens in an answer.
    """
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    # removes the tokens instead of setting encode_special_tokens, because a spawned worker loses that setting
    return Tokenizer.from_str(json.dumps(core | {"added_tokens": [], "truncation": None, "padding": None}))


def read_tiktoken(file: Path) -> PreTrainedTokenizerFast:
    """Build Qwen v1's tokenizer from its table of byte strings and ranks.

    Raises:
        UserError: a line is not a base64 string and a rank, or the ranks are not 0, 1, 2, …
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(f"{file}, line {number}: not a token and its rank: fetch the file again") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise UserError(f"{file}: ranks are missing, so it is cut short or damaged: fetch it again")
    letters = bytes_to_unicode()  # printable letter of each byte in a byte-level vocabulary
    text = {token: "".join(letters[byte] for byte in token) for token in ranks}
    # tiktoken joins any two neighbours that form a token, lowest rank first, so every split of a token is a merge
    merges = [
        (text[token[:cut]], text[token[cut:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    vocabulary = {text[token]: rank for token, rank in ranks.items()}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN1_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    # normalized: the original normalises text before it searches for special tokens
    backend.add_special_tokens([AddedToken(token, special=True, normalized=True) for token in QWEN1_SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(QWEN1_SPECIAL_TOKENS[1:]),
    )
