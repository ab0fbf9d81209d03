"""Raw annotation rows → photos and questions: nothing lost, nothing swapped, nothing dropped silently."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset.json_files import read_content, read_json
from dataset.raw import CHINESE_QUESTIONS, ENGLISH_QUESTIONS, READERS, process_ali, process_coco
from dataset.rows import LONGEST_TEXT, Report
from errors import UserError

TAG = "<|extra_0|>"


def llava(image, *texts, **more):
    speakers = ["human", "gpt"] * (len(texts) // 2)
    turns = [{"from": speaker, "value": text} for speaker, text in zip(speakers, texts, strict=True)]
    return ({} if image is None else {"image": image}) | {"conversations": turns} | more


def merge_captions(captions, new):
    for key, entries in new.items():
        captions.setdefault(key, []).extend(entries)


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

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "gbk", "gb18030"])
    @pytest.mark.parametrize(
        "text", ["狗", "一只狗在草地上奔跑，旁边有一个穿红色衣服的女孩。", "一隻狗在草地上奔跑，穿紅色衣服"]
    )
    def test_encodings(self, tmp_path, encoding, text):
        (tmp_path / "a.json").write_bytes(json.dumps([{"q": text}], ensure_ascii=False).encode(encoding))
        assert read_json(tmp_path / "a.json") == [{"q": text}]
        named = {"utf-8": "UTF-8", "utf-8-sig": "UTF-8", "utf-16": "UTF-16", "utf-32": "UTF-32"}
        assert read_content(tmp_path / "a.json").encoding == named.get(encoding, "GB18030")

    def test_big_endian(self, tmp_path):
        (tmp_path / "a.json").write_bytes("\ufeff[1]".encode("utf-16-be"))
        assert read_json(tmp_path / "a.json") == [1]

    @pytest.mark.parametrize(
        ("encoding", "text"),
        [
            ("latin-1", "Un élan près de la forêt, où ça? Très résumé, naïf, déjà vu, Ébène."),
            ("cp1251", "Собака бежит по траве. Рядом девочка в красном платье. Что изображено?"),
            ("shift_jis", "犬が草原を走っている。赤い服を着た女の子がそばにいる。何が写っていますか。"),
            ("euc_jp", "犬が草原を走っている。赤い服を着た女の子がそばにいる。何が写っていますか。"),
            ("euc_kr", "개가 잔디밭에서 달리고 있다. 빨간 옷을 입은 소녀가 옆에 있다. " * 3),
            ("big5", "一隻狗在草地上奔跑，旁邊有一個穿紅色衣服的女孩。"),
        ],
    )
    def test_never_taken_for_chinese(self, tmp_path, encoding, text):
        (tmp_path / "a.json").write_bytes(f'[\n"{text}"]'.encode(encoding))
        with pytest.raises(UserError, match=r"a\.json: line 2 \(byte \d+\) is in none of the encodings that are read"):
            read_json(tmp_path / "a.json")

    @pytest.mark.parametrize("text", ["一只狗在草地上奔跑", "Собака бежит по траве, рядом девочка"])
    def test_damaged_utf8_is_not_taken_for_chinese(self, tmp_path, text):
        content = f'[\n"{text}"]'.encode()
        (tmp_path / "a.json").write_bytes(content[:5] + content[6:])  # the rest can be cut into pairs of bytes
        with pytest.raises(UserError, match=r"a\.json: line 2 is damaged: UTF-8 text around it, but not at byte \d"):
            read_json(tmp_path / "a.json")

    def test_damaged_utf16_names_line(self, tmp_path):
        (tmp_path / "a.json").write_bytes(b"\xff\xfe" + "[\n1]".encode("utf-16-le") + b"\x00\xdc ")
        with pytest.raises(UserError, match=r"a\.json: begins as UTF-16 text, but is damaged in line 2"):
            read_json(tmp_path / "a.json")

    def test_utf16_without_mark(self, tmp_path):
        (tmp_path / "a.json").write_bytes('["a"]'.encode("utf-16-le"))
        with pytest.raises(
            UserError, match=r"a\.json: UTF-16 or UTF-32 text without byte order mark: save it as UTF-8"
        ):
            read_json(tmp_path / "a.json")


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
            (llava("a.jpg"), "conversations is not a list of messages", "[]"),
            ({"conversations": [{"from": "human"}]}, "human and gpt do not take turns", "human"),
            (llava("a.jpg", " ", "So."), "no question", "' '"),
            (llava("a.jpg", "\u200b\u2060 \ufeff", "So."), "no question", "\\u200b"),
            (llava("a.jpg", "Why?", "\u200d\u00ad"), "no answer", "\\u200d"),
            (
                llava("a.jpg", "?" * (LONGEST_TEXT + 1), "So."),
                "question of more than 600,000 characters",
                "600,001: ???",
            ),
            (llava("a.jpg", "?", "So" * LONGEST_TEXT), "answer of more than 600,000 characters", "1,200,000: SoSo"),
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

    def test_blank_answers_are_counted_where_the_row_is_kept(self):
        report = Report("s")
        rows = [
            {"image": "a.jpg", "q": "Why?", "a": ["So.", "", "\u200b"]},
            {"image": "b.jpg", "q": "Why?", "a": ["So.", ""]},
            {"image": "c.jpg", "q": f"{TAG}?", "a": ["So.", ""]},
        ]

        def check(paths):
            return {"p/b.jpg": ("photo not found", "p/b.jpg")}

        _, captions = process_coco(rows, "p", 0, report=report, check=check)
        assert captions["0"][0]["a"] == ["So."]
        assert (report.kept, report.blank_answers, report.tags_added) == (1, 2, 1)

    def test_rejected_rows_are_kept_for_the_file(self):
        report = Report("s", "a.json")
        rows = [llava("a.jpg", "Why?", "So."), 7, llava("a.jpg", "Why?", "")]
        process_coco(rows, "p", 0, report=report)
        where = {"source": "s", "file": "a.json"}
        assert [json.loads(line) for line in report.rejected_lines()] == [
            where | {"place": "row 2", "reason": "row is not an object", "detail": "7", "row": 7},
            where | {"place": "row 3", "reason": "no answer", "detail": "''", "row": rows[2]},
        ]
        assert "rejected" not in report.figures()

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
    def load(self, tmp_path, name, content, questions=None, report=None):
        file = tmp_path / "annotations.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        if questions is not None:
            (tmp_path / "questions.json").write_text(json.dumps(questions), encoding="utf-8")
        images = tmp_path / "train2014"
        images.mkdir(exist_ok=True)
        report = report or Report("s")
        rows = READERS[name].load(
            file, tmp_path / "questions.json" if questions is not None else None, images, report.encodings
        )
        found = READERS[name].process(rows, images, 0, source="s", report=report)
        assert report.rows == report.kept + len(report.rejected)
        return found

    def rejected(self, tmp_path, *files, rows, kept):
        """{place: reason} of the rejected rows."""
        report = Report("s")
        self.load(tmp_path, *files, report=report)
        assert (report.rows, report.kept) == (rows, kept)
        found = {part.place: reason for part, reason, _ in report.rejected}
        assert len(found) == len(report.rejected)
        return found

    def test_a_line_of_jsonl_may_be_a_caption(self, tmp_path):
        lines = [
            {"image": "0.jpg", "caption": ["A cat.", "A red cat."]},
            {"image": "1.jpg", "caption": "ours, not asked", "question": "What?", "answer": "a dog"},
        ]
        _, captions = self.load(tmp_path, "jsonl", "\n".join(map(json.dumps, lines)))
        assert [captions["0"][0]["a"], captions["1"][0]["a"]] == [["A cat.", "A red cat."], ["a dog"]]
        assert captions["0"][0]["q"] in ENGLISH_QUESTIONS

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

    def test_jsonl_loses_bad_lines_only(self, tmp_path):
        lines = ['{"image": "a.jpg", "q": "1?", "a": "one"}\r', "", '{"q": }', "[1]", '{"q": "2?", "a": "two"}']
        found = self.rejected(tmp_path, "jsonl", "\n".join(lines), rows=4, kept=2)
        assert found == {"line 3": "line is not JSON", "line 4": "row is not an object"}

    def test_damaged_line_of_jsonl_is_kept_whole(self, tmp_path):
        lines = [json.dumps({"q": f"第{number}个？", "a": "狗"}, ensure_ascii=False).encode() for number in range(9)]
        lines[4] = lines[4].replace("狗".encode(), b"\xb9\xb7")
        (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
        encodings = {}
        rows = READERS["jsonl"].load(tmp_path / "a.jsonl", None, tmp_path, encodings)
        assert [row.value["q"] for row in rows if row.problem is None] == [f"第{n}个？" for n in range(9) if n != 4]
        assert encodings == {}
        [part] = rows[4].parts
        assert part == ("line 5", '{"q": "第4个？", "a": "\\xb9\\xb7"}', "")
        assert "line 5" in rows[4].problem.detail

    @pytest.mark.parametrize("content", ["[\n{},\n{}\n]", "[1]", "nothing", "1\n2"])
    def test_jsonl_of_another_format(self, tmp_path, content):
        if "{}" in content:
            content = '[\n  {\n    "q": "?"\n  }\n]'
        with pytest.raises(UserError, match=r"annotations\.json: no line holds a JSON object .*: is 'format' right"):
            self.load(tmp_path, "jsonl", content)

    def test_coco_counts_every_caption(self, tmp_path):
        images = [
            {"id": 1, "file_name": "1.jpg"},
            {"id": 1, "file_name": "1.jpg"},  # said twice
            {"id": 2, "file_name": "2.jpg"},
            {"id": 2, "file_name": "other.jpg"},  # which of the two have the captions of 2?
            {"file_name": "3.jpg"},
            {"id": 4, "file_name": "4.jpg"},  # no caption
            {"id": 5, "file_name": "5.jpg"},  # a blank one
            7,
            {"id": True, "file_name": "8.jpg"},
        ]
        captions = [
            {"image_id": 1, "caption": "A dog."},
            {"image_id": 1, "caption": None},
            {"image_id": 1, "caption": "Two dogs."},
            {"image_id": 2, "caption": "A cat."},
            {"caption": "No photo."},
            {"image_id": 5, "caption": "\u200b"},
            "text",
            {"image_id": 1, "caption": f"{TAG}"},
        ]
        content = {"images": images, "annotations": captions}
        assert self.rejected(tmp_path, "coco_captions", content, rows=14, kept=2) == {
            "image 2": "photo id is given twice",
            "image 4": "photo id is given twice",
            "image 5": "id is not a number or a text",
            "image 6": "photo without caption",
            "image 8": "row is not an object",
            "image 9": "id is not a number or a text",
            "annotation 2": "no answer",
            "annotation 4": "caption of a photo id that two photos have",
            "annotation 5": "image_id is not a number or a text",
            "annotation 6": "no answer",
            "annotation 7": "row is not an object",
            "annotation 8": f"text holds a literal {TAG}",
        }
        _, found = self.load(tmp_path, "coco_captions", content)
        assert [entry["a"] for entry in found["0"]] == [["A dog.", "Two dogs."]]

    def test_coco_captions_of_a_bad_photo_are_rejected_one_by_one(self, tmp_path):
        content = {"images": [{"id": 1, "file_name": "../1.jpg"}], "annotations": [{"image_id": 1, "caption": "a"}] * 2}
        reason = "photo path leaves the image folder"
        assert self.rejected(tmp_path, "coco_captions", content, rows=2, kept=0) == {
            "annotation 1": reason,
            "annotation 2": reason,
        }

    def vqav2(self, answers, *questions):
        return {"annotations": answers}, {"questions": [{"image_id": 9, "question": "?"} | item for item in questions]}

    def test_vqav2_counts_every_question(self, tmp_path):
        def answered(ID, **change):
            return {"question_id": ID, "image_id": 9, "answers": [{"answer": "2"}, {"answer": " "}]} | change

        annotations = [
            answered(1),
            answered(2, answers=None),
            answered(3),
            answered(3, answers=[{"answer": "3"}]),
            answered(5),
            answered(6, image_id=8),
            answered(99),
            answered(None),
            answered(8),
            answered(9, answers=[{"answer": None}]),
        ]
        questions = [
            {"question_id": 1},
            {"question_id": 2},
            {"question_id": 3},
            {"question_id": 4},
            {"question_id": 5},
            {"question_id": 5, "image_id": 10},
            {"question_id": 6},
            {},
            {"question_id": 8},
            {"question_id": 8},
            {"question_id": 9},
        ]
        found = self.rejected(tmp_path, "vqav2", *self.vqav2(annotations, *questions), rows=14, kept=3)
        assert found == {
            "question 2": "answers is not a list of objects",
            "annotation 4": "second annotation of a question",
            "question 4": "question without annotation",
            "question 5": "question_id of two different questions",
            "question 6": "question_id is given twice",
            "question 7": "question and annotation name different photos",
            "annotation 7": "annotation without question",
            "annotation 8": "question_id is not a number or a text",
            "question 8": "question_id is not a number or a text",
            "question 10": "question_id is given twice",
            "question 11": "answer is not text",
        }

    def test_vqav2_rejects_question_and_annotation_together(self, tmp_path):
        annotation = {"question_id": 1, "image_id": 9, "answers": None}
        report = Report("s")
        self.load(tmp_path, "vqav2", *self.vqav2([annotation], {"question_id": 1}), report=report)
        [(part, _, _)] = report.rejected
        assert part.content == {
            "question": {"question_id": 1, "image_id": 9, "question": "?"},
            "annotation": annotation,
        }
        assert part.file == str(tmp_path / "questions.json")

    @given(st.lists(JUNK, max_size=5), st.lists(JUNK, max_size=5))
    def test_no_row_of_two_lists_is_lost(self, tmp_path_factory, first, second):
        """Every caption and every question is kept or rejected, whatever the lists hold."""
        folder = tmp_path_factory.getbasetemp()
        keys = ["id", "image_id", "question_id", "file_name", "caption", "question", "answers"]
        for name, lists in {"coco_captions": ("images", "annotations"), "vqav2": ("questions", "annotations")}.items():
            both = [
                [dict(zip(keys, item.values(), strict=False)) if isinstance(item, dict) else item for item in items]
                for items in (first, second)
            ]
            content = dict(zip(lists, both, strict=True))
            report = Report("s")
            self.load(folder, name, content, content if name == "vqav2" else None, report=report)
            kind, items = ("annotation", second) if name == "coco_captions" else ("question", first)
            assert report.kept + sum(part.place.startswith(kind) for part, _, _ in report.rejected) == len(items)

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
