"""Backbones that are not on the disk come from a hub, and no code with them."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import types

import pytest

from backbones.backbone import locate_backbone
from backbones.download import main as download
from model.model import MMultiModal
from paths import REPO_ROOT
from tests.tiny import tiny_config, to_bin, write_qwen, write_siglip

WEIGHTS = "model.safetensors"


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
        "from backbones.backbone import locate_backbone\n"
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
