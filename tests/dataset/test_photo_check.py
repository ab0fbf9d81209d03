"""Photos are decoded in processes that end with their parent and never take a run along."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from PIL import Image

from dataset.photo_check import _decode_all, _interrupts_held, photo_check
from paths import REPO_ROOT
from tests.raw_world import write_json


class TestDecoding:
    """data.check_images=open with more photos than one process gets at a time."""

    def many(self, world, photos=40):
        for number in range(photos):
            Image.new("RGB", (30, 20), (number, 60, 50)).save(world.photos[0] / f"{number}.jpg")
        rows = [{"image_id": f"{number}.jpg", "caption": ["狗"]} for number in range(photos)]
        write_json(world.annotations["ali"], rows)
        world.data["sources"] = world.data["sources"][:1]
        world.data["check_images"] = "open"
        world.write_config()

    def test_in_processes(self, world):
        self.many(world)
        for number in (3, 20, 39):
            file = world.photos[0] / f"{number}.jpg"
            file.write_bytes(file.read_bytes()[:-20])
        (world.photos[0] / "21.jpg").unlink()
        paths = [str(world.photos[0] / f"{number}.jpg") for number in range(40)]
        check = photo_check("open", "s", processes=2)
        found = check(paths)
        assert [int(path.rpartition("/")[2][:-4]) for path in found] == [3, 20, 21, 39]
        assert found[paths[21]] == ("photo not found", paths[21])
        assert found[paths[3]][0] == "photo cannot be decoded"
        assert found == photo_check("open", "s", processes=1)(paths)

    def test_worker_that_dies_is_a_sentence(self):
        paths = [f"{number}.jpg" for number in range(40)]
        with pytest.raises(
            ValueError, match="a process that decodes photos was ended, .* at one of these photos or soon"
        ):
            list(_decode_all([paths, [Deadly("41.jpg")]], 2))

    @pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
    @pytest.mark.parametrize("decoded", ["0", "[1-9][0-9]*"], ids=["starting", "decoding"])
    @pytest.mark.parametrize("kind", ["SIGINT", "SIGKILL"])
    def test_nothing_is_left_running(self, world, kind, decoded):
        self.many(world, photos=400)
        Image.effect_noise((2000, 2000), 50).save(world.photos[0] / "0.jpg")
        for number in range(1, 400):
            (world.photos[0] / f"{number}.jpg").unlink()
            (world.photos[0] / f"{number}.jpg").hardlink_to(world.photos[0] / "0.jpg")
        command = [sys.executable, str(REPO_ROOT / "process_image.py"), "--config", str(world.config)]
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8", start_new_session=True
        )
        seen = ""
        while not re.search(rf"photos: .*\| {decoded}/400", seen):
            piece = process.stderr.read(1)
            assert piece, seen
            seen += piece
        if kind == "SIGINT":
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        else:
            process.kill()
        rest = process.stderr.read()  # ends when every process has ended
        assert process.wait() == (130 if kind == "SIGINT" else -9), rest
        assert kind == "SIGKILL" or "Traceback" not in rest
        assert world.written() == {}

    @pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
    def test_an_interrupt_waits_until_a_process_has_started(self):
        """Also where another thread takes the signal: it has no mask."""
        ended, reached = threading.Event(), []

        def start():
            with _interrupts_held():
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.05)
                reached.append(True)

        thread = threading.Thread(target=ended.wait)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            start()
        ended.set()
        thread.join()
        assert reached
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Deadly(str):
    """A path that ends the process that unpickles it, as a crash of a decoder would."""

    def __reduce__(self):
        return os._exit, (1,)
