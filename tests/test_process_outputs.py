"""Where `process_image.py` may write: never over an input, and all files or none."""

import pytest


class TestOutputs:
    @pytest.mark.parametrize("key", ["image_map", "captions"])
    @pytest.mark.parametrize("way", ["same", "dots", "symlink", "hard link"])
    def test_never_over_an_input(self, world, key, way):
        raw = world.annotations["reasoning"]
        before = raw.read_bytes()
        path = world.folder / "other.json"
        if way == "same":
            path = raw
        elif way == "dots":
            path = world.photos[0] / ".." / raw.name
        elif way == "symlink":
            try:
                path.symlink_to(raw)
            except OSError:
                pytest.skip("Windows lets administrators only make links")
        else:
            path.hardlink_to(raw)
        world.data[key] = str(path)
        world.write_config()
        sentence = rf"'data\.{key}' would be written over 'data\.sources\.1\.annotations', .*reasoning\.json: choose"
        with pytest.raises(ValueError, match=sentence):
            world.run()
        assert raw.read_bytes() == before

    @pytest.mark.parametrize("name", ["rejected.jsonl", "process_report.json"])
    def test_nor_those_beside_the_captions(self, world, name):
        world.annotations["ali"] = world.annotations["ali"].rename(world.folder / name)
        world.data["sources"][0]["annotations"] = str(world.annotations["ali"])
        world.data["captions"] = str(world.folder / "captions.json")
        world.write_config()
        with pytest.raises(
            ValueError, match=rf"{name} \(beside 'data\.captions'\) would be written over 'data\.sources"
        ):
            world.run()

    def test_question_file(self, world):
        world.data["sources"] = [
            world.source("ali", "vqav2", world.photos[0]) | {"questions": str(world.annotations["detail"])}
        ]
        world.data["captions"] = str(world.annotations["detail"])
        world.write_config()
        with pytest.raises(ValueError, match=r"'data\.captions' would be written over 'data\.sources\.0\.questions'"):
            world.run()

    def test_photo_config_and_folder(self, world):
        photo = world.photos[0] / "0.jpg"
        for path, message in [
            (photo, r"0\.jpg exists and is not a file of records, so it is not written over"),
            (world.config, r"'data\.captions' would be written over the config"),
            (world.photos[0], "is a folder: name a file in it"),
        ]:
            with pytest.raises(ValueError, match=message):
                world.run(f"data.captions={path}")

    @pytest.mark.parametrize("name", ["process_report.json", "rejected.jsonl", "Captions.JSON"])
    def test_four_different_names(self, world, name):
        with pytest.raises(ValueError, match="give them different names"):
            world.run(f"data.image_map={world.output / name}")

    def test_what_cannot_be_written(self, world):
        world.run()
        before = world.written()
        for folder in (world.config, world.folder / ("x" * 300)):  # a file, and a name that is too long
            with pytest.raises(ValueError, match=rf"cannot write .*{folder.name[:5]}.*: .*; mend that or "):
                world.run(f"data.captions={folder / 'captions.json'}")
            assert world.written() == before
