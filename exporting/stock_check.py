"""Compute an exported folder's outputs, in a process that has the library that reads it and nothing of ours.

    python -P exporting/stock_check.py PROGRAM FOLDER REFERENCE

PROGRAM is a key of `READERS`. `parity.py` writes REFERENCE, starts this file and judges what it writes,
REFERENCE/theirs.safetensors and REFERENCE/theirs.json.
"""

import base64
import functools
import importlib
import importlib.metadata
import io
import json
import os
import sys
import urllib.request
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

IMAGE_TAG, PLACEHOLDER = "<|extra_0|>", "<image>"  # of a prompt, and of a message that is a string
CANNOT_WRITE = 3  # exit status where the disk is full, which says nothing about the folder
CONTEXT = 8192  # tokens of a question with its photos in llama.cpp, which would keep room for all that the model takes


class TransformersReader:
    """A stock class of transformers, in torch."""

    packages = ("transformers", "torch")

    def __init__(self, folder: Path) -> None:
        self.torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        stock_class = getattr(transformers, config["architectures"][0])
        model, info = stock_class.from_pretrained(folder, dtype="auto", output_loading_info=True)
        self.model, self.processor = (
            model.eval().requires_grad_(False),
            transformers.AutoProcessor.from_pretrained(folder),
        )
        self.tokenizer = self.processor.tokenizer
        wrong = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        self.wrong_tensors = {key: names for key, names in wrong.items() if names}

    def inputs(self, messages: list[dict[str, Any]], photos: list[Image.Image]) -> tuple[list[int], Any]:
        """Prompt ids, and pixels (C, 3, H, W) or None."""
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = self.processor(text=[text], images=photos or None, return_tensors="pt")
        return inputs["input_ids"][0].tolist(), inputs["pixel_values"].float().numpy() if photos else None

    def features(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels (C, 3, H, W) → what stands at the placeholders, in float32."""
        features = self.model.get_image_features(**self._pixels(pixels))
        features = getattr(features, "pooler_output", features)
        features = features if isinstance(features, self.torch.Tensor) else self.torch.stack(list(features))
        return features.float().numpy()

    def logits(self, ids: list[int], tokens: list[int], pixels: np.ndarray | None) -> np.ndarray:
        """Logits (N, V) behind the prompt and behind each of `tokens`, in float32."""
        whole = self.torch.tensor([ids + tokens])
        mask = self.torch.ones_like(whole)
        output = self.model(
            input_ids=whole, attention_mask=mask, logits_to_keep=len(tokens) + 1, **self._pixels(pixels)
        )
        return output.logits[0].float().numpy()

    def answer(self, ids: list[int], pixels: np.ndarray | None, longest: int) -> list[int]:
        """Tokens of the greedy answer, the end token included."""
        prompt = self.torch.tensor([ids])
        generated = self.model.generate(
            input_ids=prompt,
            attention_mask=self.torch.ones_like(prompt),
            max_new_tokens=longest,
            do_sample=False,
            top_k=None,  # the folder's own, which transformers 4 warns of beside do_sample=False
            num_beams=1,
            **self._pixels(pixels),
        )
        return generated[0, len(ids) :].tolist()

    def _pixels(self, pixels: np.ndarray | None) -> dict[str, Any]:
        return {} if pixels is None else {"pixel_values": self.torch.from_numpy(pixels).to(self.model.dtype)}


class OnnxGraph:
    """A graph in ONNX Runtime; `inputs` has name, shape and type of each."""

    folder, suffix, package = "onnx", "onnx", "onnxruntime"

    def __init__(self, file: Path) -> None:
        runtime = importlib.import_module("onnxruntime")
        self.session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
        types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
        self.inputs = [(entry.name, entry.shape, types[entry.type]) for entry in self.session.get_inputs()]

    def run(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        return self.session.run(None, inputs)


def import_openvino() -> Any:
    """Import OpenVINO, which reports its use to its makers, as NNCF does, through a library that is empty here."""
    sys.modules["openvino_telemetry"] = ModuleType("openvino_telemetry")
    return importlib.import_module("openvino")


class OpenvinoGraph:
    """A graph in OpenVINO, on the CPU."""

    folder, suffix, package = "openvino", "xml", "openvino"

    def __init__(self, file: Path) -> None:
        openvino = import_openvino()
        # some CPUs would compute in bfloat16
        self.graph = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        self.inputs = [
            (
                entry.any_name,
                [size.get_length() if size.is_static else None for size in entry.partial_shape],
                entry.element_type.to_dtype(),
            )
            for entry in self.graph.inputs
        ]

    def run(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        return list(self.graph(inputs).values())


class GraphReader:
    """The three graphs of `onnx_graphs.py`; tokenizer and pixels are transformers'."""

    def __init__(self, folder: Path, kind: type) -> None:
        transformers = importlib.import_module("transformers")
        self.packages = (kind.package, "transformers")
        self.wrong_tensors: dict[str, list[str]] = {}  # a graph has all of its own
        names = ("vision_encoder", "embed_tokens", "decoder_model_merged")
        self.vision, self.embed, self.decoder = (kind(folder / kind.folder / f"{name}.{kind.suffix}") for name in names)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.image_processor = transformers.AutoImageProcessor.from_pretrained(folder)
        self.config, self.settings = (
            json.loads((folder / name).read_text(encoding="utf-8"))
            for name in ("config.json", "generation_config.json")
        )
        self.cache_inputs = [entry for entry in self.decoder.inputs if entry[0].startswith("past_")]
        self.dtype = self.cache_inputs[0][2]

    def inputs(self, messages: list[dict[str, Any]], photos: list[Image.Image]) -> tuple[list[int], Any]:
        """As the other reader's; here the placeholder is repeated by hand."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        text = text.replace(IMAGE_TAG, IMAGE_TAG * self.config["image_seq_length"])
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        pixels = self.image_processor(photos, return_tensors="np")["pixel_values"] if photos else None
        return ids, None if pixels is None else np.asarray(pixels, np.float32)

    def features(self, pixels: np.ndarray) -> np.ndarray:
        return self.vision.run({"pixel_values": pixels.astype(self.dtype)})[0].astype(np.float32)

    def logits(self, ids: list[int], tokens: list[int], pixels: np.ndarray | None) -> np.ndarray:
        """As the other reader's, one token after another."""
        rows = [self._start(ids, pixels)]
        rows += [self._step(self._embed([token])) for token in tokens]
        return np.stack(rows)

    def answer(self, ids: list[int], pixels: np.ndarray | None, longest: int) -> list[int]:
        """As the other reader's, by the settings of generation_config.json."""
        scores, tokens = self._start(ids, pixels), []
        penalty = self.settings.get("repetition_penalty", 1.0)
        for _ in range(longest):
            seen = np.unique(ids + tokens)
            scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
            scores[self.settings["suppress_tokens"]] = -np.inf
            tokens.append(int(scores.argmax()))
            if tokens[-1] in self.settings["eos_token_id"]:
                break
            scores = self._step(self._embed(tokens[-1:]))
        return tokens

    def _embed(self, ids: list[int]) -> np.ndarray:
        return self.embed.run({"input_ids": np.array([ids], np.int64)})[0]

    def _start(self, ids: list[int], pixels: np.ndarray | None) -> np.ndarray:
        """Logits (V,) behind the prompt, which is put into a new cache."""
        embeddings = self._embed(ids)
        if pixels is not None:
            rows = self.features(pixels).reshape(-1, embeddings.shape[-1])
            embeddings[0, np.array(ids) == self.config["image_token_id"]] = rows.astype(self.dtype)
        self.cache = [np.zeros((1, shape[1], 0, shape[3]), self.dtype) for _, shape, _ in self.cache_inputs]
        return self._step(embeddings)

    def _step(self, embeddings: np.ndarray) -> np.ndarray:
        """Logits (V,) behind `embeddings` (1, T, Dl), whose keys and values are added to the cache."""
        start = self.cache[0].shape[2]
        length = start + embeddings.shape[1]
        inputs = {
            "inputs_embeds": embeddings,
            "attention_mask": np.ones((1, length), np.int64),
            "position_ids": np.arange(start, length, dtype=np.int64)[None],
        }
        names = (name for name, _, _ in self.cache_inputs)
        logits, *self.cache = self.decoder.run(inputs | dict(zip(names, self.cache, strict=True)))
        return logits[0, -1].astype(np.float32)


class LlamaCppReader:
    """The two files of `gguf_files.py` in llama.cpp's own server, which xllamacpp runs; pixels are transformers'.

    It gives no features, and the probabilities behind the prompt only. It takes text only, so `logits` and `answer`
    are those of the last `inputs`.
    """

    packages = ("xllamacpp", "transformers")
    log_probabilities = True

    def __init__(self, folder: Path) -> None:
        llama, transformers = importlib.import_module("xllamacpp"), importlib.import_module("transformers")
        settings = llama.CommonParams()
        settings.model.path, settings.mmproj.path = str(next(folder.glob("model-*.gguf"))), str(folder / "mmproj.gguf")
        settings.n_ctx, settings.verbosity = CONTEXT, 1  # errors only
        # float16 otherwise
        settings.cache_type_k = settings.cache_type_v = llama.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = int(os.environ.get("OMP_NUM_THREADS", -1))
        self.server = llama.Server(settings)
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self.wrong_tensors: dict[str, list[str]] = {}  # it does not load such files
        self.image_processor = transformers.AutoImageProcessor.from_pretrained(folder)
        self.settings = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        self.rows = self._ask("models")["data"][0]["meta"]["n_vocab"]
        self.marker = self._ask("props")["media_marker"]
        self.tokenizer = self

    def inputs(self, messages: list[dict[str, Any]], photos: list[Image.Image]) -> tuple[list[int], Any]:
        """As the other readers'; a photo is as many placeholders as it has tokens in the server."""
        pixels = np.asarray(self.image_processor(photos, return_tensors="np")["pixel_values"] if photos else [])
        pictures = [self._picture(picture) for picture in pixels]
        left = iter(pictures)
        for message in messages:
            text = message["content"]
            if isinstance(text, str) and text.startswith(PLACEHOLDER):
                message["content"] = [
                    {"type": "image"},
                    {"type": "text", "text": text.removeprefix(f"{PLACEHOLDER}\n")},
                ]
            for part in message["content"] if isinstance(message["content"], list) else []:
                if part["type"] == "image":
                    part |= {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{next(left)}"}}
        prompt = self._ask("apply-template", messages=messages)["prompt"]
        self.prompt = {"prompt_string": prompt, "multimodal_data": pictures}
        # the probabilities are those without the bias; a token that is part of a letter would be sent without any
        self.first = self._answer(1, n_probs=self.rows, logit_bias=[[self._ids("a")[0], 1e6]])
        texts = [self._ids(text) for text in prompt.split(self.marker)]
        tokens = self.first["tokens_evaluated"] - sum(map(len, texts))
        photo = self._ids(IMAGE_TAG) * (tokens // max(len(photos), 1))
        return [*texts[0], *(token for text in texts[1:] for token in photo + text)], pixels if photos else None

    def logits(self, ids: list[int], tokens: list[int], pixels: np.ndarray | None) -> np.ndarray:
        """Logarithms of probabilities (1, V) behind the prompt."""
        row = np.full((1, self.rows), -np.inf, np.float32)
        for entry in self.first["completion_probabilities"][0]["top_logprobs"]:
            row[0, entry["id"]] = entry["logprob"]
        return row

    def answer(self, ids: list[int], pixels: np.ndarray | None, longest: int) -> list[int]:
        """As the other readers', by the settings in the file."""
        return self._answer(longest)["tokens"]

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        stops = self.settings["eos_token_id"]
        return self._ask("detokenize", tokens=[token for token in tokens if token not in stops])["content"]

    def _answer(self, longest: int, **settings: Any) -> dict[str, Any]:
        return self._ask(
            "completion", prompt=self.prompt, n_predict=longest, temperature=0, cache_prompt=False, return_tokens=True,
            **settings,
        )  # fmt: skip

    def _ids(self, text: str) -> list[int]:
        return self._ask("tokenize", content=text, parse_special=True)["tokens"]

    def _picture(self, pixels: np.ndarray) -> str:
        """A PNG in base64 of normalised pixels (3, H, W), which the server normalises again."""
        mean, std = (
            np.array(getattr(self.image_processor, f"image_{kind}"))[:, None, None] for kind in ("mean", "std")
        )
        levels = np.rint((pixels * std + mean) * 255).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(levels.transpose(1, 2, 0)).save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()

    def _ask(self, path: str, **body: Any) -> dict[str, Any]:
        data = json.dumps(body).encode() if body else None
        with self.opener.open(f"{self.server.listening_address}/{path}", data) as response:
            return json.load(response)


READERS: dict[str, Any] = {
    "transformers": TransformersReader,
    "onnx": functools.partial(GraphReader, kind=OnnxGraph),
    "openvino": functools.partial(GraphReader, kind=OpenvinoGraph),
    "llama.cpp": LlamaCppReader,
}


def main() -> None:
    program, folder, reference = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    cases = json.loads((reference / "cases.json").read_text(encoding="utf-8"))
    reader, ours, theirs = READERS[program](folder), load_file(reference / "pixels.safetensors"), {}
    rows = []
    for number, case in enumerate(cases):
        photos = [Image.open(reference / name) for name in case["photos"]]
        ids, pixels = reader.inputs(case["messages"], photos)
        if photos:
            theirs[f"{number}.pixels"] = pixels
            pixels = ours[f"{number}.pixels"]
            if hasattr(reader, "features"):
                theirs[f"{number}.features"] = reader.features(pixels)
        theirs[f"{number}.logits"] = reader.logits(case["ids"], case["tokens"], pixels)
        tokens = reader.answer(case["ids"], pixels, case["max_new_tokens"])
        rows.append({"ids": ids, "tokens": tokens})
        rows[-1]["text"] = reader.tokenizer.decode(tokens, skip_special_tokens=True)
    theirs = {name: np.ascontiguousarray(array) for name, array in theirs.items()}
    versions = {name: importlib.metadata.version(name) for name in reader.packages}
    result = {"versions": versions, "tensors": reader.wrong_tensors, "cases": rows}
    result["log_probabilities"] = getattr(reader, "log_probabilities", False)
    try:
        save_file(theirs, reference / "theirs.safetensors")
        (reference / "theirs.json").write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        print(error, file=sys.stderr)
        sys.exit(CANNOT_WRITE)


if __name__ == "__main__":
    main()
