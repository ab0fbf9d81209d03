"""What n-gram lookup would save an answer: tokens per pass of the language model, on the answers of a data set.

    python -m benchmarks.lookup --config configs/flickr8k_light.yaml     # after process_image.py with the same config

and `--output FILE.json` to keep the figures.

Lookup decoding drafts the next tokens by a copy: the last n tokens stood earlier in prompt or answer, and what
followed them there is the draft. One pass then checks the whole draft; the tokens before the first wrong one are kept,
with the model's own next one. The true answers stand for the model's. A pass over a draft costs at least as much as one
over a single token, so tokens per pass bound the speed-up from above.
"""

import argparse
from pathlib import Path

from backbones.backbone import locate_backbone
from benchmarks.report import write_report
from config import load_config
from dataset.records import read_records
from paths import resolve_path
from qwen.tokenizer import load_tokenizer

LONGEST, DRAFT = 3, 4  # tokens that must have stood earlier, at most; tokens of a draft, at most


def passes(prompt: list[int], answer: list[int]) -> int:
    """Passes that write `answer` behind `prompt`."""
    told, written, count = [*prompt], 0, 0
    while written < len(answer):
        rest = answer[written:]
        kept = 0
        for guess, true in zip(draft(told), rest[:-1], strict=False):  # the pass itself gives the token behind it
            if guess != true:
                break
            kept += 1
        told += rest[: kept + 1]
        written += kept + 1
        count += 1
    return count


def draft(told: list[int]) -> list[int]:
    """Tokens that followed the latest earlier place of the last tokens, of as many as possible."""
    for length in range(min(LONGEST, len(told) - 1), 0, -1):
        last = told[-length:]
        for start in range(len(told) - length - 1, -1, -1):
            if told[start : start + length] == last:
                return told[start + length : start + length + DRAFT]
    return []


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="config whose records and tokenizer are used")
    parser.add_argument(
        "--answers", type=int, default=2000, help="at most so many, spread over the data (default 2000)"
    )
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values of the config")
    options = parser.parse_args(arguments)
    config = load_config(options.config, options.overrides)
    tokenizer = load_tokenizer(locate_backbone(config.llm.path, config.model_root, "llm.path", config.hub))
    _, entries = read_records(resolve_path(config.data.image_map), resolve_path(config.data.captions))
    rows = [(turn.question, turn.answers[0]) for entry in entries for turn in entry.turns]
    if not rows or options.answers < 1:
        raise SystemExit(f"{config.data.captions} has no answers, or --answers asks for none")
    rows = rows[:: -(-len(rows) // options.answers)]
    texts = [(tokenizer(question).input_ids, tokenizer(answer).input_ids) for question, answer in rows]
    tokens, taken = sum(len(answer) for _, answer in texts), sum(passes(*text) for text in texts)
    report = {
        "config": options.config,
        "answers": len(texts),
        "tokens_per_answer": round(tokens / len(texts), 1),
        "tokens_per_pass": round(tokens / taken, 3),
    }
    write_report(report, options.output)


if __name__ == "__main__":
    main()
