"""Make the demo's two backbones from the drawn world alone, in the on-disk layout of the public ones.

    python -m demo.pretrain encoder     # demo/backbones/siglip
    python -m demo.pretrain language    # demo/backbones/qwen

Not part of `make demo`: the results are in the repository. Scores on fresh scenes go to `demo/backbones/scores.json`.
Two processes (`torchrun --nproc-per-node 2 -m demo.pretrain language`) share the steps of the language model.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import SiglipImageProcessorPil

from demo import encoder, language, words
from qwen.tokenizer import load_tokenizer

ENCODER_STEPS, LANGUAGE_STEPS = 3000, 4600
BACKBONES = Path(__file__).parent / "backbones"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", choices=["encoder", "language"])
    parser.add_argument("--steps", type=int, help="training steps (default: what the shipped ones took)")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1: two runs fit two cores)")
    parser.add_argument("--output", type=Path, default=BACKBONES, help="folder (default demo/backbones)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    processes, rank = (int(os.environ.get(name, other)) for name, other in (("WORLD_SIZE", "1"), ("RANK", "0")))
    if processes > (2 if arguments.backbone == "language" else 1):
        parser.error("one process pretrains the encoder, one or two the language model: change --nproc-per-node")
    if processes > 1:
        dist.init_process_group("gloo")
    start = time.process_time()
    if arguments.backbone == "encoder":
        folder, steps = arguments.output / "siglip", arguments.steps or ENCODER_STEPS
        folder.mkdir(parents=True, exist_ok=True)
        scores = encoder.pretrain(folder, steps, arguments.seed, print_now)
        SiglipImageProcessorPil(size={"height": 384, "width": 384}).save_pretrained(folder)
    else:
        folder, steps = arguments.output / "qwen", arguments.steps or LANGUAGE_STEPS
        folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            words.save_tokenizer(words.train_tokenizer(), folder)
        if processes > 1:
            dist.barrier()  # the others read what the first one wrote
        scores = language.pretrain(load_tokenizer(folder), folder, steps, arguments.seed, print_now)
    seconds = torch.tensor(time.process_time() - start)
    if processes > 1:
        dist.all_reduce(seconds)
        dist.destroy_process_group()
    if rank:
        return  # the first process scores and writes
    program = f"torchrun --nproc-per-node {processes}" if processes > 1 else "python"
    command = f"{program} -m demo.pretrain {arguments.backbone} --steps {steps} --seed {arguments.seed}"
    record = {"command": command, "processor_minutes": round(seconds.item() / 60, 1), "scores": scores}
    file = arguments.output / "scores.json"
    records = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    records[arguments.backbone] = record
    file.write_text(json.dumps(records, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print_now(json.dumps(record, indent=2, ensure_ascii=False))


def print_now(message: str) -> None:
    """Print without buffering, also into a log file."""
    print(message, flush=True)


if __name__ == "__main__":
    main()
