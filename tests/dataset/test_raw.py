"""Raw annotation rows → photos and questions: nothing lost, nothing swapped, nothing dropped silently."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset.json_files import read_json, read_jsonl
from dataset.raw import CHINESE_QUESTIONS, ENGLISH_QUESTIONS, READERS, Report, merge_captions, process_ali, process_coco

TAG = "<|extra_0|>"


def llava(image, *texts, **more):
    speakers = ["human", "gpt"] * (len(texts) // 2)
    turns = [{"from": speaker, "value": text} for speaker, text in zip(speakers, texts, strict=True)]
    return ({} if image is None else {"image": image}) | {"conversations": turns} | more


def only_entry(rows, process=process_coco, **options):
    report = Report("s")
    _, captions = process(rows, "photos", 0, source="s", report=report, **options)
    assert report.dropped == {}
    [entries] = captions.values()
    [entry] = entries
    return entry


WORDS = st.sampled_from(["image", "image_id", "caption", "conversations", "from", "value", "human", "gpt", "q", "a"])
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4) | WORDS | st.sampled_from(["<image>", TAG]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)


class TestReadJson:
    def test_bom_and_chinese(self, tmp_path):
        file = tmp_path / "带 空格.json"
        file.write_bytes(b"\xef\xbb\xbf" + '[{"caption": "一只狗"}]'.encode())
        assert read_json(file) == [{"caption": "一只狗"}]

    def test_missing(self, tmp_path):
        with pytest.raises(ValueError, match=r"none\.json: file not found"):
            read_json(tmp_path / "none.json")

    @pytest.mark.parametrize("content", [b"", b" \n\n", b"\xef\xbb\xbf"])
    def test_empty(self, tmp_path, content):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.json: the file is empty"):
            read_json(tmp_path / "a.json")

    def test_wrong_json_names_line_and_column(self, tmp_path):
        (tmp_path / "a.json").write_text('[\n  {"image": "1.jpg"},\n  {"image": oops}\n]', encoding="utf-8")
        with pytest.raises(ValueError, match=r"a\.json: not valid JSON at line 3, column 13: "):
            read_json(tmp_path / "a.json")

    def test_other_encoding_names_line(self, tmp_path):
        (tmp_path / "a.json").write_bytes('[\n"狗"]'.encode("gbk"))
        with pytest.raises(ValueError, match=r"a\.json: line 2 is not UTF-8 text \(byte 3\): save it as UTF-8"):
            read_json(tmp_path / "a.json")

    def test_jsonl_skips_blank_lines_and_names_line(self, tmp_path):
        file = tmp_path / "a.jsonl"
        file.write_text('{"q": 1}\r\n\n{"q": 2}\n', encoding="utf-8")
        assert read_jsonl(file) == [{"q": 1}, {"q": 2}]
        file.write_text('{"q": 1}\n\n{"q": }\n', encoding="utf-8")
        with pytest.raises(ValueError, match=r"a\.jsonl: not valid JSON at line 3, column 7"):
            read_jsonl(file)


class TestCaptionRows:
    @pytest.mark.parametrize("image_key", ["image_id", "image"])
    @pytest.mark.parametrize("text_key", ["caption", "conversations"])
    @pytest.mark.parametrize("texts", ["一只狗", ["一只狗", "两只猫", " "]])
    def test_field_names(self, image_key, text_key, texts):
        entry = only_entry([{image_key: "a.jpg", text_key: texts}], process_ali)
        assert entry["a"] == (["一只狗"] if isinstance(texts, str) else ["一只狗", "两只猫"])
        assert entry["q"] in CHINESE_QUESTIONS
        assert entry["source"] == "s"
        assert "type" not in entry

    def test_both_questions_half_the_time_and_seeded(self):
        assert CHINESE_QUESTIONS == ("这幅图像描述了什么？<|extra_0|>", "<|extra_0|>这幅图像中有什么？")
        rows = [{"image_id": f"{number}.jpg", "caption": ["狗"]} for number in range(2000)]

        def questions(seed):
            return [entries[0]["q"] for entries in process_ali(rows, "photos", 0, seed=seed)[1].values()]

        assert 900 < questions(0).count(CHINESE_QUESTIONS[0]) < 1100
        assert questions(0) == questions(0)
        assert questions(0) != questions(1)

    def test_dialogue_in_conversations(self):
        entry = only_entry([llava("a.jpg", "<image>\n什么颜色？", "红色")], process_ali)
        assert (entry["q"], entry["a"]) == (f"{TAG}\n什么颜色？", ["红色"])


class TestDialogueRows:
    @pytest.mark.parametrize(
        ("raw", "question"),
        [("<image>\nWhy?", f"{TAG}\nWhy?"), ("Why?\n<image>", f"Why?\n{TAG}"), ("Why?", f"{TAG}\nWhy?")],
    )
    def test_tag(self, raw, question):
        assert only_entry([llava("a.jpg", raw, "So.")])["q"] == question

    def test_added_tags_are_counted(self):
        report = Report("s")
        process_coco([llava("a.jpg", "Why?", "So."), llava("b.jpg", "<image>Why?", "So.")], "p", 0, report=report)
        assert report.tags_added == 1

    def test_all_turns_are_kept(self):
        entry = only_entry([llava("a.jpg", "<image>\n1?", "one", "2?", "two <image>", "3?", "three")])
        assert entry["turns"] == [
            {"q": f"{TAG}\n1?", "a": ["one"]},
            {"q": "2?", "a": ["two <image>"]},
            {"q": "3?", "a": ["three"]},
        ]

    @pytest.mark.parametrize("keys", [("question", "answer"), ("q", "a")])
    def test_question_and_answer(self, keys):
        entry = only_entry([{"image": "a.jpg", keys[0]: "Why?", keys[1]: ["yes", "yes", "no"]}])
        assert (entry["q"], entry["a"]) == (f"{TAG}\nWhy?", ["yes", "yes", "no"])

    def test_type_is_carried(self):
        assert only_entry([llava("a.jpg", "Why?", "So.", type="reason")])["type"] == "reason"
        assert "type" not in only_entry([llava("a.jpg", "Why?", "So.")])

    def test_text_only(self):
        _, captions = process_coco([llava(None, "1+1?", "2"), llava("a.jpg", "Why?", "So.")], "p", 0)
        assert [entry["q"] for entry in captions["text"]] == ["1+1?"]
        assert list(captions) == ["text", "0"]

    def test_several_photos(self):
        rows = [llava("b.jpg", "Why?", "So."), llava(["a.jpg", "b.jpg"], "<image><image>\nWhich?", "Both.")]
        image_map, captions = process_coco(rows, "p", 0)
        assert {key: photo["ID"] for key, photo in image_map.items()} == {"p/b.jpg": 0, "p/a.jpg": 1}
        [entry] = captions["1"]
        assert entry["images"] == [1, 0]
        assert entry["q"] == f"{TAG}{TAG}\nWhich?"
        assert only_entry([llava(["a.jpg", "b.jpg"], "Which?", "Both.")])["q"] == f"{TAG}{TAG}\nWhich?"

    @pytest.mark.parametrize(
        ("row", "reason", "detail"),
        [
            ("text", "row is not an object", "'text'"),
            (llava("../a.jpg", "Why?", "So."), "photo path leaves the image folder", "../a.jpg"),
            (llava("b/../../a.jpg", "Why?", "So."), "photo path leaves the image folder", "b/../../a.jpg"),
            (llava("..\\a.jpg", "Why?", "So."), "photo path leaves the image folder", "..\\a.jpg"),
            (llava("/etc/a.jpg", "Why?", "So."), "photo path leaves the image folder", "/etc/a.jpg"),
            (llava("C:\\a.jpg", "Why?", "So."), "photo path leaves the image folder", "C:\\a.jpg"),
            (llava(9, "Why?", "So."), "photo name is not a file name", "9"),
            (llava("", "Why?", "So."), "photo name is not a file name", "''"),
            (llava("a.jpg", f"{TAG}Why?", "So."), f"text holds a literal {TAG}", f"{TAG}Why?"),
            (llava("a.jpg", "Why?", f"{TAG}."), f"text holds a literal {TAG}", f"{TAG}."),
            (
                llava("a.jpg", "<image><image>?", "So."),
                "number of <image> tags is not that of photos",
                "2 tags, 1 photos",
            ),
            (llava(None, "<image>?", "So."), "number of <image> tags is not that of photos", "1 tags, 0 photos"),
            (llava("a.jpg", "1?", "1", "<image>2?", "2"), "<image> stands in a later question", "1?"),
            (llava("a.jpg"), "conversations is not a list of messages", "[]"),
            ({"conversations": [{"from": "human"}]}, "human and gpt do not take turns", "human"),
            (llava("a.jpg", " ", "So."), "no question", "' '"),
            (llava("a.jpg", "Why?", ""), "no answer", "['']"),
            ({"image": "a.jpg", "q": "Why?"}, "no answer", "None"),
            ({"image": "a.jpg", "q": "Why?", "a": [1]}, "answer is not text", "[1]"),
        ],
    )
    def test_dropped_with_reason(self, row, reason, detail):
        report = Report("s")
        _, captions = process_coco([llava("z.jpg", "Why?", "So."), row], "photos", 0, report=report)
        assert list(captions) == ["0"]
        assert (report.rows, report.kept) == (2, 1)
        [(found, entry)] = report.dropped.items()
        assert found == reason
        assert entry["count"] == 1
        assert entry["examples"][0].startswith("row 2: ")
        assert detail.strip("'[]") in entry["examples"][0]

    def test_caption_row_without_photo(self):
        report = Report("s")
        assert process_ali([{"caption": "狗"}], "p", 0, report=report) == ({}, {})
        assert report.dropped == {"no photo named": {"count": 1, "examples": ["row 1: keys caption"]}}

    def test_at_most_three_examples(self):
        report = Report("s")
        process_coco([1] * 10, "photos", 0, report=report)
        assert report.dropped["row is not an object"]["count"] == 10
        assert len(report.dropped["row is not an object"]["examples"]) == 3


class TestPhotos:
    def test_record_of_a_photo(self):
        image_map, _ = process_coco([llava("./sub/a.jpg", "Why?", "So.")], "data/coco/train2017/", 7)
        photo = {"ID": 7, "image_file": "sub/a.jpg", "path": "data/coco/train2017/sub/a.jpg"}
        assert image_map == {"train2017/sub/a.jpg": photo}

    def test_two_rows_on_one_photo_keep_their_answers(self):
        _, captions = process_coco([llava("a.jpg", "1?", "one"), llava("./a.jpg", "2?", "two")], "p", 0)
        assert [(e["q"], e["a"]) for e in captions["0"]] == [(f"{TAG}\n1?", ["one"]), (f"{TAG}\n2?", ["two"])]

    def test_photo_in_two_sources_has_one_id(self, tmp_path):
        first_map, captions = process_coco([llava("train/a.jpg", "1?", "one")], tmp_path, 0, source="first")
        rows = [llava("b.jpg", "3?", "three"), llava("a.jpg", "2?", "two")]
        second_map, second = process_coco(rows, f"{tmp_path}/x/../train", 1, image_map=first_map, source="second")
        assert [photo["ID"] for photo in second_map.values()] == [1]
        merge_captions(captions, second)
        answers = {ID: [(entry["source"], entry["a"][0]) for entry in entries] for ID, entries in captions.items()}
        assert answers == {"0": [("first", "one"), ("second", "two")], "1": [("second", "three")]}

    def test_folders_of_the_same_name(self, tmp_path):
        first, _ = process_coco([llava("1.jpg", "?", "x")], tmp_path / "a" / "images", 0, source="first")
        second, _ = process_coco(
            [llava("1.jpg", "?", "x"), llava("2.jpg", "?", "x")],
            tmp_path / "b" / "images",
            1,
            image_map=first,
            source="second",
        )
        assert list(first) == ["images/1.jpg"]
        assert list(second) == ["second/images/1.jpg", "images/2.jpg"]

    def test_known_photos_are_not_checked_again(self):
        known, _ = process_coco([llava("a.jpg", "?", "x")], "p", 0)
        asked = []
        rows = [llava("a.jpg", "?", "x"), llava("b.jpg", "?", "x")]
        process_coco(rows, "p", 1, image_map=known, check=lambda paths: asked.extend(paths) or {})
        assert asked == ["p/b.jpg"]

    def test_wrong_start_id(self):
        with pytest.raises(ValueError, match="source 's': start_ID is 5 but 0 photos stand before it"):
            process_ali([], "p", 5, image_map={}, source="s")

    def test_check_drops_all_rows_of_a_photo_and_leaves_no_gap(self):
        rows = [llava(name, "?", f"{number}") for number, name in enumerate(["bad.jpg", "a.jpg", "bad.jpg", "b.jpg"])]
        asked, report = [], Report("s")

        def check(paths):
            asked.extend(paths)
            return {"p/bad.jpg": ("photo not found", "p/bad.jpg")}

        image_map, captions = process_coco(rows, "p", 0, check=check, report=report)
        assert asked == ["p/bad.jpg", "p/a.jpg", "p/b.jpg"]
        assert {key: photo["ID"] for key, photo in image_map.items()} == {"p/a.jpg": 0, "p/b.jpg": 1}
        assert {ID: entries[0]["a"] for ID, entries in captions.items()} == {"0": ["1"], "1": ["3"]}
        assert report.dropped["photo not found"]["examples"] == ["row 1: p/bad.jpg", "row 3: p/bad.jpg"]
        assert report.rows == report.kept + 2

    @given(st.lists(st.lists(st.sampled_from(["a.jpg", "./a.jpg", "b.jpg", "c/d.jpg", None]), max_size=8), max_size=4))
    def test_every_row_stays_with_its_photo(self, sources):
        image_map, captions, expected = {}, {}, set()
        for index, names in enumerate(sources):
            rows = [llava(name, "?", f"{index} {number}") for number, name in enumerate(names)]
            expected |= {
                (f"{index} {number}", name.removeprefix("./") if name else None) for number, name in enumerate(names)
            }
            photos, new = process_coco(rows, "p", len(image_map), image_map=image_map)
            image_map |= photos
            merge_captions(captions, new)
        file_of_ID = {str(photo["ID"]): photo["image_file"] for photo in image_map.values()}
        assert sorted(file_of_ID, key=int) == [str(ID) for ID in range(len(image_map))]
        found = [(entry["a"][0], file_of_ID.get(ID)) for ID, entries in captions.items() for entry in entries]
        assert len(found) == len(expected)
        assert set(found) == expected

    @given(st.lists(JUNK, max_size=4), st.sampled_from(sorted(READERS)))
    def test_junk_is_dropped_never_an_error(self, rows, name):
        report = Report("s")
        _, captions = READERS[name].process(rows, "p", 0, report=report)
        assert report.rows == len(rows) == report.kept + sum(entry["count"] for entry in report.dropped.values())
        assert report.kept == sum(map(len, captions.values()))


class TestFormats:
    def load(self, tmp_path, name, content, questions=None):
        file = tmp_path / "annotations.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        if questions is not None:
            (tmp_path / "questions.json").write_text(json.dumps(questions), encoding="utf-8")
        images = tmp_path / "train2014"
        images.mkdir(exist_ok=True)
        rows = READERS[name].load(file, tmp_path / "questions.json" if questions is not None else None, images)
        return READERS[name].process(rows, images, 0, source="s", report=Report("s"))

    @pytest.mark.parametrize("name", ["ai_challenger", "llava"])
    def test_not_a_list(self, tmp_path, name):
        with pytest.raises(
            ValueError, match=r"annotations\.json: expected a list of rows, found dict: is 'format' right"
        ):
            self.load(tmp_path, name, {"images": []})

    def test_jsonl(self, tmp_path):
        lines = [{"image": "a.jpg", "q": "1?", "a": "one"}, llava("a.jpg", "<image>2?", "two")]
        _, captions = self.load(tmp_path, "jsonl", "\n".join(map(json.dumps, lines)))
        assert [entry["a"] for entry in captions["0"]] == [["one"], ["two"]]

    def test_coco_captions(self, tmp_path):
        content = {
            "images": [
                {"id": 1, "file_name": "1.jpg"},
                {"id": 2, "file_name": "2.jpg"},
                {"id": 3, "file_name": "3.jpg"},
            ],
            "annotations": [
                {"image_id": 2, "caption": "一只狗"},
                {"image_id": 1, "caption": "A dog."},
                {"image_id": 2, "caption": "两只狗"},
                {"image_id": 9, "caption": "No photo."},
            ],
        }
        image_map, captions = self.load(tmp_path, "coco_captions", content)
        assert list(image_map) == ["train2014/1.jpg", "train2014/2.jpg"]
        assert captions["0"][0]["a"] == ["A dog."]
        assert captions["0"][0]["q"] in ENGLISH_QUESTIONS
        assert captions["1"][0]["a"] == ["一只狗", "两只狗"]
        assert captions["1"][0]["q"] in CHINESE_QUESTIONS

    def test_coco_captions_of_another_shape(self, tmp_path):
        with pytest.raises(ValueError, match=r"expected an object with a list of objects 'images': is 'format' right"):
            self.load(tmp_path, "coco_captions", [])

    @pytest.mark.parametrize("layout", ["COCO_train2014_000000000009.jpg", "000000000009.jpg"])
    def test_vqav2_keeps_all_answers(self, tmp_path, layout):
        (tmp_path / "train2014").mkdir()
        (tmp_path / "train2014" / layout).touch()
        questions = [{"image_id": 9, "question_id": 90, "question": "How many?"}, {"image_id": 9, "question_id": 91}]
        answers = [{"answer": "2", "answer_id": number} for number in range(9)] + [{"answer": "3"}]
        annotations = [{"question_id": 90, "image_id": 9, "answer_type": "number", "answers": answers}]
        image_map, captions = self.load(
            tmp_path,
            "vqav2",
            {"annotations": annotations},
            {"data_subtype": "train2014", "questions": questions},
        )
        assert list(image_map) == [f"train2014/{layout}"]
        [entry] = captions["0"]
        assert entry == {"source": "s", "type": "number", "q": f"{TAG}\nHow many?", "a": ["2"] * 9 + ["3"]}


def test_real_samples(samples_folder):
    annotations = samples_folder / "coco"
    image_map, captions = {}, {}
    raw = {}
    for name in ["complex_reasoning_77k", "detail_23k"]:
        rows = read_json(annotations / f"{name}.json")
        for row in rows:
            raw.setdefault(row["image"], []).append(row["conversations"][1]["value"])
        photos, new = process_coco(rows, annotations / "train2017", len(image_map), image_map=image_map, source=name)
        image_map |= photos
        merge_captions(captions, new)
    kept = {
        Path(photo["path"]).name: [entry["a"][0] for entry in captions[str(photo["ID"])]]
        for photo in image_map.values()
    }
    assert kept == raw
    assert len(image_map) == 44
