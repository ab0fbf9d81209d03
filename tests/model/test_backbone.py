"""Where backbones come from, and the sentence each wrong folder gets."""

import hashlib
import http.server
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from errors import UserError
from model.backbone import _windows, backbone_fingerprint, locate_backbone, remember_backbones, same_backbone
from model.download import main as download
from model.model import MMultiModal
from paths import REPO_ROOT
from tests.tiny import tiny_config, write_qwen, write_siglip

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(backbones, tmp_path):
    return shutil.copytree(backbones / "qwen", tmp_path / "qwen")


def locate(folder):
    return locate_backbone(str(folder), "models", "llm.path")


def shard(folder):
    """Turn model.safetensors into two shards and their index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    files = {f"model-0000{part + 1}-of-00002.safetensors": sorted(tensors)[part::2] for part in range(2)}
    for file, names in files.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    table = {"metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table), encoding="utf-8")


def to_bin(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


class WritesFile:
    """Unpickling it creates a file: what a malicious checkpoint could do."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


def test_name_typed_wrong_gets_the_nearest(folder):
    with pytest.raises(ValueError, match=r"'llm.path': no folder .*qwn.*Did you mean .*qwen\?"):
        locate(folder.with_name("qwn"))


def test_hint_names_model_folders_or_nothing(folder, tmp_path, monkeypatch):
    (tmp_path / "qwem").mkdir()
    (tmp_path / "qwen.py").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"no folder .* Did you mean {folder}\? Set it with"):
        locate(folder.with_name("qwens"))
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match=r"'llm.path': no folder [^ ]* nor [^ ]*\. Set it with llm.path=FOLDER"):
        locate(folder)
    with pytest.raises(ValueError, match=rf"The folder {tmp_path / 'none'} does not exist\. Set it with"):
        locate(tmp_path / "none" / "qwen")
    with pytest.raises(ValueError, match=r"'visual.path': no folder [^ ]* nor [^ ]*\. Set it with visual.path=FOLDER"):
        locate_backbone("trains", str(tmp_path / "none"), "visual.path")  # beside train.py


@pytest.mark.parametrize("name", ["x" * 300, "x" * 100_000])
def test_name_that_is_too_long(name):
    with pytest.raises(UserError, match=r"^'llm.path': ") as caught:
        locate_backbone(name, "models", "llm.path")
    assert len(str(caught.value)) < 600


class TestRememberedFolders:
    def found(self, path, run, tmp_path):
        return locate_backbone(path, str(tmp_path / "none"), "llm.path", run_folder=run)

    def test_by_its_bare_name(self, folder, tmp_path):
        run = tmp_path / "run"
        run.mkdir()
        moved = folder.rename(tmp_path / "vit-tiny")
        remember_backbones(run, moved.with_name("siglip"), moved)
        remember_backbones(run, moved.with_name("siglip"), moved)  # again, as a resumed run does
        assert [file.name for file in run.iterdir()] == ["backbones.json"]
        assert self.found("vit-tiny", run, tmp_path) == moved
        for other in ("qwens", str(tmp_path / "elsewhere" / "vit-tiny")):
            with pytest.raises(ValueError, match="no folder"):
                self.found(other, run, tmp_path)
        moved.rename(tmp_path / "gone")
        with pytest.raises(ValueError, match="no folder"):
            self.found("vit-tiny", run, tmp_path)

    def test_named_as_a_package_of_ours(self, folder, tmp_path):
        remember_backbones(tmp_path, folder, folder)
        assert self.found("qwen", tmp_path, tmp_path) == folder

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"llm.path": 3}'])
    def test_damaged_file_is_as_good_as_none(self, folder, tmp_path, text):
        (tmp_path / "backbones.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="no folder"):
            self.found("vit-tiny", tmp_path, tmp_path)

    def test_folder_that_cannot_be_written(self, folder, tmp_path):
        (tmp_path / "file").write_text("", encoding="utf-8")
        with pytest.raises(UserError, match="backbones.json"):
            remember_backbones(tmp_path / "file", folder, folder)


class TestFingerprint:
    """A file of one large tensor among small ones, changed in every way that makes it another backbone."""

    @pytest.fixture
    def large(self, tmp_path):
        generator = torch.Generator().manual_seed(0)
        tensors = {name: torch.randn(64, generator=generator) for name in ("a.bias", "n.weight", "z.bias")}
        tensors["big.weight"] = torch.randn(2**16, 32, generator=generator)  # 8 MiB
        save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
        return tmp_path

    def rewritten(self, folder, change):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        return backbone_fingerprint(folder)

    def test_half_of_the_file_is_zeros(self, large):
        before = backbone_fingerprint(large)
        content = (large / WEIGHTS).read_bytes()
        for kept in (len(content) // 2, 1 << 20):
            (large / WEIGHTS).write_bytes(content[:kept].ljust(len(content), b"\0"))
            assert backbone_fingerprint(large) != before
        (large / WEIGHTS).write_bytes(content)
        assert backbone_fingerprint(large) == before
        assert same_backbone(large, before)

    @pytest.mark.parametrize("name", ["a.bias", "n.weight", "z.bias", "big.weight"])
    def test_every_tensor_counts(self, large, name):
        before = backbone_fingerprint(large)

        def tune(tensors):
            tensors[name] += 1e-3 * torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(1))

        assert self.rewritten(large, tune) != before

    def test_first_mebibyte_is_equal(self, large):
        before = backbone_fingerprint(large)
        assert self.rewritten(large, lambda tensors: tensors["big.weight"][2**13 :].mul_(1.001)) != before
        old_form = hashlib.sha256(json.dumps([WEIGHTS, (large / WEIGHTS).stat().st_size]).encode())
        old_form.update((large / WEIGHTS).read_bytes()[: 1 << 20])
        assert same_backbone(large, old_form.hexdigest()[:16])  # as the checkpoint's own check would have it

    def test_merged_lora(self, backbones, folder):
        before = backbone_fingerprint(folder)
        assert before == backbone_fingerprint(backbones / "qwen")

        def merge(tensors):
            q = tensors["model.layers.1.self_attn.q_proj.weight"]
            q += torch.outer(torch.full((q.shape[0],), 0.01), torch.full((q.shape[1],), 0.01))

        assert self.rewritten(folder, merge) != before

    def test_form_of_earlier_checkpoints(self, large, caplog):
        old_form = hashlib.sha256(json.dumps([WEIGHTS, (large / WEIGHTS).stat().st_size]).encode())
        old_form.update((large / WEIGHTS).read_bytes()[: 1 << 20])
        assert same_backbone(large, old_form.hexdigest()[:16])
        assert "was compared by the first MiB of its weight files only" in caplog.text
        assert not same_backbone(large, "0" * 16)
        caplog.clear()
        assert not same_backbone(large, "v2:" + "0" * 16)
        assert not caplog.text

    @pytest.mark.parametrize("zipped", [True, False])
    def test_bin(self, large, zipped):
        tensors = load_file(large / WEIGHTS)
        (large / WEIGHTS).unlink()
        fingerprints = []
        for change in (0.0, 0.001):
            tensors["z.bias"] += change
            torch.save(tensors, large / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
            fingerprints.append(backbone_fingerprint(large))
        if zipped:  # the old format has no table of its tensors
            assert fingerprints[0] != fingerprints[1]
        tensors["big.weight"] *= 1.001
        torch.save(tensors, large / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        assert backbone_fingerprint(large) not in fingerprints

    def test_a_large_file_is_not_read_whole(self):
        size = 15 * 2**30
        spans = [(size * part // 340, size * (part + 1) // 340) for part in range(340)]
        windows = list(_windows(spans))
        assert sum(length for _, length in windows) < 25e6
        places = sorted(position for position, _ in windows)
        assert max(later - earlier for earlier, later in itertools.pairwise(places)) <= 4 * 2**20
        assert all(begin in places and (end - 4096) in places for begin, end in spans)


def test_file_instead_of_folder(folder):
    with pytest.raises(ValueError, match=r"model\.safetensors is a file; name the folder"):
        locate(folder / WEIGHTS)


def test_folder_without_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"'llm.path': .*qwen has no config\.json, so it is not a model folder"):
        locate(folder)


def test_broken_config(folder):
    (folder / "config.json").write_text('{"model_type": ', encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON .*: copy it again"):
        locate(folder)


def test_folder_without_weights(folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"the weights are missing in .*: it needs model\.safetensors, or its shards"):
        locate(folder)


def test_weights_under_another_name(folder):
    (folder / WEIGHTS).rename(folder / "weights.safetensors")
    with pytest.raises(ValueError, match=r"the weights are missing in .* \(found weights\.safetensors\)"):
        locate(folder)


@pytest.mark.parametrize("kept", [0, 5, 200, -100])
def test_truncated_safetensors(folder, kept):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:kept])
    with pytest.raises(ValueError, match=r"'llm.path': .*model\.safetensors is damaged or cut short .*: copy it again"):
        locate(folder)


def test_shards(folder):
    shard(folder)
    assert locate(folder) == folder
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"'llm.path': model-00002-of-00002\.safetensors, a shard .* is missing"):
        locate(folder)


@pytest.mark.parametrize("text", ["{", '{"metadata": {}}'])
def test_index_that_is_no_index(folder, text):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"index\.json is not a table of shards"):
        locate(folder)


def test_gguf(tmp_path):
    (tmp_path / "qwen2.5-0.5b-q4_k_m.gguf").write_bytes(b"GGUF")
    for path in (tmp_path, tmp_path / "qwen2.5-0.5b-q4_k_m.gguf"):
        with pytest.raises(ValueError, match=r"holds GGUF, which is not read; get the original model, with config\.j"):
            locate(path)


@pytest.mark.parametrize(
    ("name", "method", "original"),
    [
        ("Qwen-7B-Chat-Int4", "gptq", "Qwen-7B-Chat"),
        ("Qwen2.5-7B-Instruct-GPTQ-Int8", "gptq", "Qwen2.5-7B-Instruct"),
        ("Qwen2.5-7B-Instruct-AWQ", "awq", "Qwen2.5-7B-Instruct"),
    ],
)
def test_quantised(folder, name, method, original):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    quantised = folder.rename(folder.with_name(name))
    with pytest.raises(ValueError, match=rf"holds weights quantised with {method}, .* for example .*/{original}$"):
        locate(quantised)


def test_adapter(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen2.5-7B"}', encoding="utf-8")
    with pytest.raises(ValueError, match="is a LoRA adapter of Qwen/Qwen2.5-7B; name that model itself"):
        locate(folder)


@pytest.mark.parametrize("projector", ["feature_proj.safetensors", "other_params.bin"])  # ours, the report's
def test_trained_checkpoint(folder, projector):
    for name in ("adapter_config.json", projector):
        (folder / name).write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="is a checkpoint of a trained model; give it with --checkpoint"):
        locate(folder)


class TestBin:
    def test_model_loads_and_has_a_fingerprint(self, backbones, tmp_path):
        for name in ("siglip", "qwen"):
            to_bin(shutil.copytree(backbones / name, tmp_path / name))
        model = MMultiModal.from_config(tiny_config(tmp_path))
        expected = MMultiModal.from_config(tiny_config(backbones))
        theirs = dict(expected.named_parameters())
        assert all(torch.equal(theirs[name], tensor) for name, tensor in model.named_parameters())
        before = backbone_fingerprint(tmp_path / "qwen")
        torch.save({"other": torch.zeros(1)}, tmp_path / "qwen" / "pytorch_model.bin")
        assert backbone_fingerprint(tmp_path / "qwen") != before

    @pytest.mark.parametrize("kept", [0, 10, 4000, -100])
    def test_truncated(self, folder, kept):
        to_bin(folder)
        file = folder / "pytorch_model.bin"
        file.write_bytes(file.read_bytes()[:kept])
        with pytest.raises(ValueError, match=r"pytorch_model\.bin (is damaged or cut short|holds more than tensors)"):
            locate(folder)

    @pytest.mark.parametrize("layout", ["zip", "plain pickle"])
    def test_malicious_pickle_does_nothing(self, folder, tmp_path, layout):
        (folder / WEIGHTS).unlink()
        victim = tmp_path / "written by the pickle"
        content = {"model.norm.weight": WritesFile(victim)}
        if layout == "zip":
            torch.save(content, folder / "pytorch_model.bin")
        else:
            (folder / "pytorch_model.bin").write_bytes(pickle.dumps(content, protocol=2))
        with pytest.raises(ValueError, match=r"'llm.path': .*pytorch_model\.bin holds more than tensors, .* run code"):
            locate(folder)
        assert not victim.exists()


class FakeHub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as `snapshot_download` asks for; serves the folders under `root`, notes what was fetched."""

    def do_HEAD(self):
        self.respond(with_body=False)

    def do_GET(self):
        self.respond(with_body=True)

    def respond(self, with_body):
        parts = self.path.partition("?")[0].strip("/").split("/")
        if len(parts) < 4:
            return self.send_error(404)
        if parts[:2] == ["api", "models"]:
            files = sorted((self.server.root / parts[3]).iterdir())
            if parts[4] == "tree":
                answer = [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": f"{parts[3]}-{file.name}"}
                    for file in files
                ]
            else:
                answer = {"id": "/".join(parts[2:4]), "sha": "a" * 40}
                answer["siblings"] = [{"rfilename": file.name} for file in files]
            return self.send(json.dumps(answer).encode(), {"Content-Type": "application/json"}, with_body)
        name = parts[-1]
        if not (self.server.root / parts[1] / name).is_file():
            return self.send_error(404)
        if with_body:
            self.server.fetched.append(name)
        content = (self.server.root / parts[1] / name).read_bytes()
        return self.send(content, {"ETag": f'"{parts[1]}-{name}"', "X-Repo-Commit": "a" * 40}, with_body)

    def send(self, content, headers, with_body):
        self.send_response(200)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


def test_hub_downloads_what_is_needed_and_no_code(tmp_path):
    root = tmp_path / "hub"
    write_siglip(root / "both")
    shutil.copy(root / "both" / WEIGHTS, root / "both" / "pytorch_model.bin")
    for name in ("modeling_qwen.py", "model.gguf", "training_args.bin", "README.md"):
        (root / "both" / name).write_bytes(b"never fetched")
    (root / "both" / "qwen.tiktoken").write_bytes(b"IQ== 0")
    to_bin(write_qwen(root / "pickled"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.root, server.fetched = root, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "from model.backbone import locate_backbone\n"
        "for name in ('both', 'pickled'): print(locate_backbone('owner/' + name, 'models', 'llm.path'))"
    )
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "*",
    }

    def run(**changes):
        return subprocess.run(
            [sys.executable, "-c", code], env=environment | changes, cwd=REPO_ROOT, capture_output=True, text=True
        )

    online = run()
    server.shutdown()
    server.server_close()
    assert online.returncode == 0, online.stderr
    fetched = ["config.json", "preprocessor_config.json", "qwen.tiktoken", WEIGHTS]
    assert sorted(server.fetched[:4]) == sorted(fetched)
    assert "pytorch_model.bin" in server.fetched[4:]
    assert not {"modeling_qwen.py", "model.gguf", "training_args.bin", "README.md"} & set(server.fetched)
    offline = run(HF_HUB_OFFLINE="1")
    assert offline.stdout == online.stdout


@pytest.mark.parametrize("name", ["nobody/no-such-model", "qwen/Qwen-7B-Chat"])  # qwen/ is a folder of ours
def test_hub_without_network_names_three_ways(monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"set HF_ENDPOINT .* or copy the model to .* or name its folder with llm.path"
    ):
        locate_backbone(name, "models", "llm.path")


class TestModelScope:
    def test_its_package_is_used(self, backbones, folder, tmp_path, monkeypatch):
        asked = []

        def snapshot_download(name, allow_patterns, ignore_patterns):
            asked.append((name, tuple(allow_patterns)))
            return str(folder)

        package = types.ModuleType("modelscope")
        package.snapshot_download = snapshot_download
        monkeypatch.setitem(sys.modules, "modelscope", package)
        config = tiny_config(backbones, llm={"path": "Qwen/some-model"})
        config.hub, config.model_root = "modelscope", str(tmp_path / "none")
        assert MMultiModal.from_config(config).llm_folder == folder
        small = ("*.json", "*.txt", "*.jinja", "*.tiktoken")
        assert asked == [("Qwen/some-model", small), ("Qwen/some-model", ("*.safetensors",))]

    def test_absent_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "modelscope", None)
        with pytest.raises(ValueError, match="'hub' is modelscope, whose package is not installed: run `pip install"):
            locate_backbone("Qwen/some-model", "models", "llm.path", "modelscope")

    def test_no_network(self, monkeypatch):
        package = types.ModuleType("modelscope")
        package.snapshot_download = lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no route"))
        monkeypatch.setitem(sys.modules, "modelscope", package)
        with pytest.raises(ValueError, match=r"nor reachable on the hub modelscope \(RuntimeError\)"):
            locate_backbone("Qwen/some-model", "models", "llm.path", "modelscope")


def test_download_names_both_folders(backbones, capsys):
    download(["--config", "configs/demo.yaml", f"visual.path={backbones / 'siglip'}", f"llm.path={backbones / 'qwen'}"])
    out = capsys.readouterr().out
    assert f"visual.path: {backbones / 'siglip'} is in {backbones / 'siglip'}" in out
    assert f"is in {backbones / 'qwen'}" in out
