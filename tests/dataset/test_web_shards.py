"""Shards at an address give the records, the pixels and the run of the same shards on the disk."""

import http.server
import json
import re
import threading
from pathlib import Path

import numpy as np
import pytest

import process_image
from config import Data
from dataset.records import read_records, write_records
from errors import UserError
from paths import address, resolve_path
from tests.dataset.test_shards import DIALOGUE, pack, picture
from tests.tiny import tiny_config
from training import due, loop
from training.loop import Trainer
from visual import web
from visual.photo import load_image
from visual.shard import Member, member_of, without_place

pytest.importorskip("aiohttp")  # fsspec asks web servers with it


class RangeServer(http.server.SimpleHTTPRequestHandler):
    """The files of a folder, whole or in ranges of bytes, as web servers and stores give them."""

    def do_GET(self):
        file = Path(self.translate_path(self.path))
        self.server.asked.append((self.path, self.headers.get("Range", "")))
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not asked or not self.server.gives_ranges or not file.is_file():
            super().do_GET()
            return
        if self.server.failures or not self.server.answering:
            self.server.failures = max(self.server.failures - 1, 0)
            self.send_error(503)
            return
        content = file.read_bytes()[int(asked[1]) : int(asked[2]) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Range", f"bytes {asked[1]}-{int(asked[1]) + len(content) - 1}/{file.stat().st_size}")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of the folder `shards`, with its address."""
    monkeypatch.setattr(web, "WAITS", (0, 0))
    folder = tmp_path / "shards"
    folder.mkdir()
    pack(
        folder / "part-0.tar",
        {"a/0.png": picture(0), "a/0.json": DIALOGUE, "1.png": picture(1), "1.txt": "一只猫".encode()},
    )
    pack(folder / "part-1.tar", {"2.png": picture(2), "2.json": {"caption": ["A dog.", "A small dog."]}})
    handler = type(
        "Handler",
        (RangeServer,),
        {"__init__": lambda self, *args: RangeServer.__init__(self, *args, directory=tmp_path)},
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        running.asked, running.gives_ranges = [], True
        running.failures, running.answering = 0, True  # answers 503 to so many requests, or to all
        running.folder, running.url = folder, f"http://127.0.0.1:{running.server_port}/shards"
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def prepare(annotations, images, **data):
    source = {"name": "packed", "format": "webdataset", "annotations": str(annotations), "images": str(images)}
    return process_image.process_sources(Data(sources=[source], **data))


@pytest.mark.parametrize("annotations", ["{url}", "{url}/", "{url}/part-{{0..1}}.tar"])
def test_records_are_those_of_the_disk(server, annotations):
    image_map, captions, [report] = prepare(annotations.format(url=server.url), server.url, check_images="open")
    local_map, local_captions, _ = prepare(server.folder, server.folder)
    assert (captions, [*image_map]) == (local_captions, [*local_map])
    assert (report.kept, report.photos) == (3, 3)
    for photo, local in zip(image_map.values(), local_map.values(), strict=True):
        assert photo["path"] == local["path"].replace(str(server.folder), server.url)
        assert load_image(photo["path"]).tobytes() == load_image(local["path"]).tobytes()


def test_a_photo_is_one_request_of_its_own_bytes(server):
    image_map, _, _ = prepare(server.url, server.url)
    path = image_map["shards/part-1.tar/2.png"]["path"]
    server.asked.clear()
    load_image(path)
    member = member_of(path)
    assert server.asked == [("/shards/part-1.tar", f"bytes={member.start - 512}-{member.start + member.size - 1}")]


def pack_photos_of(workshop, server):
    """Make the photos of the workshop the server's only shard."""
    photos, _ = read_records(workshop / "image_map.json", workshop / "captions.json")
    rows = {}
    for ID, photo in photos.items():
        rows |= {f"{ID:03}.png": photo.path.read_bytes(), f"{ID:03}.json": DIALOGUE}
    pack(server.folder / "part-0.tar", rows)
    (server.folder / "part-1.tar").unlink()


@pytest.mark.parametrize("cached", [False, True])
def test_a_run_is_that_of_the_disk(server, workshop, tmp_path, cached):
    """Written to the record files and read again, with a worker process: the same weights, bit for bit."""
    pack_photos_of(workshop, server)
    weights = []
    for name, place in (("disk", server.folder), ("web", server.url)):
        image_map, captions, _ = prepare(place, place)
        data = {"image_map": str(tmp_path / f"{name}_map.json"), "captions": str(tmp_path / f"{name}.json")}
        write_records(image_map, captions, Path(data["image_map"]), Path(data["captions"]))
        data |= {"cache_features": cached, "feature_cache": str(tmp_path / f"features {name}")}
        train = {"max_steps": 2, "workers": 1, "output_dir": str(tmp_path / f"run {name}")}
        checkpoint = Trainer(tiny_config(workshop, data=data, train=train)).run()
        weights.append((checkpoint / "feature_proj.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_a_network_that_goes_ends_the_run_with_a_checkpoint(server, workshop, tmp_path, monkeypatch):
    """No photo is left out for it, and the run goes on from there when the network is back."""
    pack_photos_of(workshop, server)
    image_map, captions, _ = prepare(server.url, server.url)
    data = {"image_map": str(tmp_path / "map.json"), "captions": str(tmp_path / "captions.json")}
    write_records(image_map, captions, Path(data["image_map"]), Path(data["captions"]))

    def trainer(name, resume=None):
        train = {"max_steps": 4, "workers": 0, "micro_batch": 1, "output_dir": str(tmp_path / name)}
        return Trainer(tiny_config(workshop, data=data, train=train), resume)

    whole = trainer("whole").run()
    broken = trainer("parts")

    def after_step(run, *others):
        due.after_step(run, *others)
        server.answering = run.progress.step < 2

    monkeypatch.setattr(loop, "after_step", after_step)
    with pytest.raises(UserError, match=r"part-0\.tar cannot be fetched \(503.*\): check the address and the network"):
        broken.run()
    assert (broken.progress.step, broken.progress.unreadable) == (2, [])
    server.answering = True
    monkeypatch.undo()
    resumed = trainer("parts", "auto").run()
    name = "feature_proj.safetensors"
    assert (resumed / name).read_bytes() == (whole / name).read_bytes()


def test_a_shard_that_changed_is_said(server):
    image_map, _, _ = prepare(server.url, server.url)
    path = image_map["shards/part-1.tar/2.png"]["path"]
    before = web.web_state(f"{server.url}/part-1.tar")
    pack(server.folder / "part-1.tar", {"0.txt": b"x" * 20_000, "2.png": picture(2)})
    web.web_state.cache_clear()
    assert web.web_state(f"{server.url}/part-1.tar") != before
    with pytest.raises(UserError, match=r"part-1\.tar/2\.png@.* run process_image\.py again"):
        load_image(path)
    (server.folder / "part-1.tar").unlink()
    with pytest.raises(UserError, match=r"^shard not found: http://127\.0\.0\.1:\d+/shards/part-1\.tar$"):
        load_image(path)


def test_a_server_that_fails_is_asked_again(server):
    image_map, _, _ = prepare(server.url, server.url)
    path = image_map["shards/part-1.tar/2.png"]["path"]
    server.failures = 2
    whole = load_image(path).tobytes()
    assert whole == load_image(path.replace(server.url, str(server.folder))).tobytes()
    server.failures = 3
    with pytest.raises(UserError, match=r"part-1\.tar cannot be fetched \(503.*\): check the address and the network"):
        load_image(path)


def test_addresses_that_cannot_be_read(server):
    with pytest.raises(UserError, match=r"shard not found: .*part-2\.tar"):
        prepare(f"{server.url}/part-{{0..2}}.tar", server.url)
    with pytest.raises(UserError, match=r"lists no file that ends in \.tar: name the shards as '…/part-\{"):
        prepare(f"{server.url}/none", f"{server.url}/none")
    with pytest.raises(UserError, match=r"\{2\.\.1\} is no range"):
        prepare(f"{server.url}/part-{{2..1}}.tar", server.url)
    with pytest.raises(UserError, match="give http://.*/shards as 'images'"):
        prepare(f"{server.url}/part-0.tar", server.folder)
    with pytest.raises(UserError, match=r"needs a package that is missing: Install s3fs"):
        prepare("s3://bucket/part-0.tar", "s3://bucket")
    with pytest.raises(UserError, match=r"cannot be fetched \(Protocol not known: nothing"):
        prepare("nothing://bucket/part-0.tar", "nothing://bucket")
    whole = (server.folder / "part-0.tar").read_bytes()
    (server.folder / "part-0.tar").write_bytes(whole[:700])
    with pytest.raises(UserError, match=r"part-0\.tar: damaged, or not an uncompressed tar file"):
        prepare(server.url, server.url)
    (server.folder / "part-0.tar").write_bytes(whole)


def test_a_server_without_ranges_is_said(server):
    image_map, _, _ = prepare(server.url, server.url)
    server.gives_ranges = False
    with pytest.raises(UserError, match=r"gives the whole file instead of a part.*the server must give ranges of byt"):
        load_image(image_map["shards/part-1.tar/2.png"]["path"])
    noise = np.random.default_rng(0).bytes(3 * web.READ_AHEAD)
    pack(server.folder / "part-1.tar", {"2.png": noise, "2.txt": b"noise", "3.png": picture(3), "3.txt": b"cat"})
    with pytest.raises(UserError, match=r"part-1\.tar cannot be fetched .*the server must give ranges of bytes"):
        prepare(server.url, server.url)


@pytest.mark.parametrize("name", ["annotations", "images"])
def test_only_shards_are_read_from_the_web(tmp_path, name):
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"image": "0.png", "question": "?", "answer": "!"}), encoding="utf-8"
    )
    source = {"name": "s", "format": "jsonl", "annotations": str(tmp_path / "rows.jsonl"), "images": str(tmp_path)}
    with pytest.raises(UserError, match=rf"'data\.sources\.0\.{name}': https://host/x is an address: only shards"):
        process_image.process_sources(Data(sources=[source | {name: "https://host/x"}]))


def test_what_an_address_is():
    for path in ("c:/photos/a.jpg", "/a/b.jpg", "a:b/c.jpg", "photos/http:/x.jpg", "HTTP://x"):
        assert address(path) is None
        assert resolve_path(path).is_absolute()
    for path in ("https://host/a b/c.tar", Path("https://host/a b/c.tar")):
        assert address(path) == "https://host/a b/c.tar"
        assert address(resolve_path(path)) == "https://host/a b/c.tar"
    path = "hf://datasets/x/y/p.tar/1.png@512+7"
    assert member_of(path) == member_of(Path(path)) == Member("hf://datasets/x/y/p.tar", "1.png", 512, 7)
    assert without_place(path) == "hf://datasets/x/y/p.tar/1.png"
