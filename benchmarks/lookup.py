"""What n-gram lookup would save an answer: tokens per pass of the language model, on the answers of a data set.

    python -m benchmarks.lookup --config configs/flickr8k_light.yaml     # after process_image.py with the same config

and `--output FILE.json` to keep the figures.

Lookup decoding drafts the next tokens by a copy: the last tokens stood earlier in prompt or answer, and what followed
them there is the draft. Drafts are those of transformers. One pass checks a whole draft; the tokens before the first
wrong one are kept, with the model's own next one. The true answers stand for the model's. A pass over a draft costs at
least as much as one over a single token, so tokens per pass bound the speed-up from above.
"""

import argparse
from operator import eq
from pathlib import Path

import torch
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from backbones.backbone import locate_backbone
from benchmarks.report import write_report
from config import load_config
from dataset.records import read_records
from paths import resolve_path
from qwen.tokenizer import load_tokenizer

DRAFTS = PromptLookupCandidateGenerator(max_length=2**31)  # else its defaults: 10 tokens behind 2 or 1 equal ones


def passes(prompt: list[int], answer: list[int]) -> int:
    """Passes that write the tokens `answer` behind `prompt`, if each draft is checked in one."""
    told, end, count = [*prompt], [*prompt, *answer], 0
    while len(told) < len(end):
        drafted = DRAFTS.get_candidates(torch.tensor([told]))[0][0].tolist()  # `told` and the draft
        equal = [*map(eq, drafted, end[:-1]), False]
        told = end[: equal.index(False) + 1]  # the pass itself gives one token more
        count += 1
    return count


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="config whose records and tokenizer are used")
    parser.add_argument("--answers", type=int, default=2000, help="at most, spread evenly over the data (default 2000)")
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
