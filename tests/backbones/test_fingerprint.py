"""The fingerprint of a backbone sees every tensor of it."""

import hashlib
import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from backbones.backbone import _windows, backbone_fingerprint, same_backbone

WEIGHTS = "model.safetensors"


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
