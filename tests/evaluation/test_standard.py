"""Standard files: the questions that `process_image.py` keeps, each with its id, and result files byte for byte."""

import json
from collections import Counter

import pytest

from config import Data
from dataset.raw import CHINESE_QUESTIONS, ENGLISH_QUESTIONS
from dataset.records import read_records, write_records
from errors import UserError
from evaluation.captions import caption_scores
from evaluation.standard import FORMATS, read_standard, write_results
from evaluation.words import english_words
from process_image import process_sources
from tests.raw_world import write_json

TAG = "<|extra_0|>"


@pytest.fixture
def images(tmp_path):
    """Photos 1 to 3 by the names of COCO 2014 and by short ones; all in a folder with a Chinese name."""
    folder = tmp_path / "照片 val2014"
    folder.mkdir()
    for number in (1, 2, 3):
        for name in (f"COCO_val2014_{number:012}.jpg", f"{number}.jpg"):
            (folder / name).write_bytes(b"not decoded here")
    return folder


def vqa_files(folder):
    """Photo 1 has the questions 10, 12 and 14; 13 has no photo, 15 no annotation, 16 no text."""
    asked = [(10, 1, "How many?"), (11, 2, "什么颜色？"), (12, 1, "Is it red?"), (13, 4, "Where?"),
             (14, 1, "How many?"), (15, 3, "Why?"), (16, 3, " ")]  # fmt: skip
    questions = [{"question_id": ID, "image_id": photo, "question": text} for ID, photo, text in asked]
    answers = {10: ["2"] * 9 + ["3"], 11: ["红色"], 12: ["yes"], 13: ["here"], 14: ["2"], 16: ["no"]}
    annotations = [
        {"question_id": ID, "answer_type": "number" if ID == 10 else "other", "answers": [{"answer": a} for a in texts]}
        for ID, texts in answers.items()
    ]
    return [
        write_json(folder / "questions.json", {"data_subtype": "val2014", "questions": questions}),
        write_json(folder / "annotations.json", {"data_subtype": "val2014", "annotations": annotations}),
    ]


def caption_file(folder):
    """Captions of photo 2 before those of photo 1, between those of a missing photo and of none."""
    photos = [{"id": 100 + number, "file_name": f"{number}.jpg"} for number in (1, 2, 3, 4)]
    captions = [(102, "一只狗在跑"), (104, "Gone."), (101, "A dog runs along the beach."), (102, "一只狗"),
                (101, "A brown dog on the sand."), (103, "Two men climb a steep rock.")]  # fmt: skip
    annotations = [{"id": number, "image_id": photo, "caption": text} for number, (photo, text) in enumerate(captions)]
    return [write_json(folder / "captions.json", {"images": photos, "annotations": annotations})]


def lines_file(folder):
    """Ids given and not; a blank line, a damaged one, a dialogue over two photos, a question without a photo."""
    dialogue = [
        {"question": "它是什么？", "answer": "猫"},
        {"question": "And this?", "answer": "A dog.", "image": "2.jpg"},
    ]
    lines = [
        {"image": "2.jpg", "question": "What is it?", "answer": ["a cat", "cat"], "type": "object"},
        "",
        {"id": "对话-1", "image": "1.jpg", "turns": dialogue},
        '{"image": }',
        {"id": 7, "question": "1+1?", "answer": "2"},
        {"id": True, "image": "2.jpg", "question": "Why?", "answer": "So."},
        {"id": "gone", "image": "4.jpg", "question": "Why?", "answer": "So."},
        {"id": "unanswered", "image": "3.jpg", "question": "Why?"},
    ]
    file = folder / "rows.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    file.write_text("\n".join(texts), encoding="utf-8")
    return [file]


FILES = {"vqav2": vqa_files, "coco_captions": caption_file, "jsonl": lines_file}


def shown(photos, entries):
    """(id, photo files, questions without tags, answers) of each entry."""
    return [
        (
            entry.id,
            [photos[ID].image_file for ID in entry.images],
            [turn.question.replace(TAG, "").strip() for turn in entry.turns],
            [turn.answers for turn in entry.turns],
        )
        for entry in entries
    ]


def reasons(report):
    assert report.rows == report.kept + len(report.rejected)
    return {reason: entry["count"] for reason, entry in report.dropped.items()}


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_those_of_process_image(name, images, tmp_path):
    """Also their order and their questions; only the id is more."""
    files = FILES[name](tmp_path)
    questions = str(files[0]) if name == "vqav2" else None
    source = {
        "name": tmp_path.name if name == "jsonl" else name,
        "format": name,
        "annotations": str(files[-1]),
        "images": str(images),
        "questions": questions,
    }
    image_map, captions, [expected] = process_sources(Data.model_validate({"sources": [source]}))
    paths = tmp_path / "image_map.json", tmp_path / "entries.json"
    write_records(image_map, captions, *paths)
    assert b'"id"' not in paths[1].read_bytes()

    before = sorted(tmp_path.iterdir())
    photos, entries, report = read_standard(name, files, images)
    assert sorted(tmp_path.iterdir()) == before
    without_ids = [type(entry)(entry.source, entry.type, entry.turns) for entry in entries]
    assert (photos, without_ids) == read_records(*paths)
    assert report.figures() == expected.figures() | {"file": str(files[0])}
    assert all(photo.path.is_file() for photo in photos.values())


def test_vqav2(images, tmp_path):
    photos, entries, report = read_standard("vqav2", vqa_files(tmp_path), images)
    one, two = (f"COCO_val2014_{number:012}.jpg" for number in (1, 2))
    assert shown(photos, entries) == [
        (10, [one], ["How many?"], [("2",) * 9 + ("3",)]),
        (12, [one], ["Is it red?"], [("yes",)]),
        (14, [one], ["How many?"], [("2",)]),  # the same words, another question
        (11, [two], ["什么颜色？"], [("红色",)]),
    ]
    assert [entry.type for entry in entries] == ["number", "other", "other", "other"]
    assert reasons(report) == {"photo not found": 1, "question without annotation": 1, "no question": 1}


def test_vqav2_questions_alone(images, tmp_path):
    """The questions of test-dev: each is asked, nothing is taken for an answer, and every id is in the result once."""
    file = vqa_files(tmp_path)[0]
    photos, entries, report = read_standard("vqav2", [file], images)
    assert reasons(report) == {"photo not found": 1, "no question": 1}
    assert [entry.id for entry in entries] == [10, 12, 14, 11, 15]
    assert {turn.answers for entry in entries for turn in entry.turns} == {()}
    assert {entry.type for entry in entries} == {"vqav2"}
    assert [photos[entry.images[0]].image_file[-5] for entry in entries] == ["1", "1", "1", "2", "3"]

    write_results("vqav2", tmp_path / "results.json", [(entry.id, "?", "yes") for entry in entries])
    asked = json.loads(file.read_bytes())["questions"]
    found = Counter(row["question_id"] for row in json.loads((tmp_path / "results.json").read_bytes()))
    assert found == Counter(row["question_id"] for row in asked if row["question_id"] not in (13, 16))


def test_a_question_id_of_two_questions_is_not_asked(images, tmp_path):
    questions = [{"question_id": 1, "image_id": 1, "question": text} for text in ("Why?", "How?")]
    questions.append({"question_id": 2, "image_id": 1, "question": "Where?"})
    file = write_json(tmp_path / "q.json", {"data_subtype": "val2014", "questions": questions})
    _, entries, report = read_standard("vqav2", [file], images)
    assert [entry.id for entry in entries] == [2]
    assert reasons(report) == {"question_id is given twice": 1, "question_id of two different questions": 1}


def test_annotations_of_other_questions_make_no_test_set(images, tmp_path):
    questions, annotations = vqa_files(tmp_path)
    others = [{"question_id": 99, "answers": [{"answer": "2"}]}]
    write_json(annotations, {"annotations": others})
    with pytest.raises(
        UserError, match=r"questions\.json: none of its 8 rows is usable, mostly: question without anno"
    ):
        read_standard("vqav2", [questions, annotations], images)


def test_captions_are_one_question_a_photo(images, tmp_path):
    photos, entries, report = read_standard("coco_captions", caption_file(tmp_path), images)
    found = shown(photos, entries)
    assert [(ID, files, answers) for ID, files, _, answers in found] == [
        (101, ["1.jpg"], [("A dog runs along the beach.", "A brown dog on the sand.")]),
        (102, ["2.jpg"], [("一只狗在跑", "一只狗")]),
        (103, ["3.jpg"], [("Two men climb a steep rock.",)]),
    ]
    asked = [entry.turns[0].question for entry in entries]
    assert asked[1] in CHINESE_QUESTIONS
    assert {asked[0], asked[2]} <= set(ENGLISH_QUESTIONS)
    assert reasons(report) == {"photo not found": 1}


def test_photos_without_captions(images, tmp_path):
    """A file of image information, as for the test set of COCO; it is nothing to train on."""
    content = json.loads(caption_file(tmp_path)[0].read_bytes())
    content["images"] += [{"id": 103, "file_name": "other.jpg"}]  # which of the two is photo 103?
    del content["annotations"]
    file = write_json(tmp_path / "info.json", content)
    photos, entries, report = read_standard("coco_captions", [file], images)
    assert [(entry.id, photos[entry.images[0]].image_file) for entry in entries] == [(101, "1.jpg"), (102, "2.jpg")]
    assert {entry.turns[0].answers for entry in entries} == {()}
    assert entries[0].turns[0].question in ENGLISH_QUESTIONS
    assert reasons(report) == {"photo id is given twice": 1, "photo without caption": 1, "photo not found": 1}

    source = {"name": "s", "format": "coco_captions", "annotations": str(file), "images": str(images)}
    assert process_sources(Data.model_validate({"sources": [source]}))[:2] == ({}, {})
    write_json(file, content | {"annotations": []})
    with pytest.raises(UserError, match=r"info\.json: none of its 5 rows is usable, mostly: photo without caption"):
        read_standard("coco_captions", [file], images)


def test_jsonl(images, tmp_path):
    photos, entries, report = read_standard("jsonl", lines_file(tmp_path), images)
    assert shown(photos, entries) == [
        (1, ["2.jpg"], ["What is it?"], [("a cat", "cat")]),
        (6, ["2.jpg"], ["Why?"], [("So.",)]),
        ("对话-1", ["1.jpg", "2.jpg"], ["它是什么？", "And this?"], [("猫",), ("A dog.",)]),
        (7, [], ["1+1?"], [("2",)]),
    ]
    assert [entry.type for entry in entries] == ["object", *[tmp_path.name] * 3]
    assert {entry.source for entry in entries} == {tmp_path.name}
    assert reasons(report) == {"line is not JSON": 1, "photo not found": 1, "no answer": 1}


ANSWERS = [(11, "什么颜色？", " 红色\n"), (10, "How many?", "Two.")]


@pytest.mark.parametrize(
    ("name", "answers", "expected"),
    [
        (
            "vqav2",
            ANSWERS,
            '[\n  {\n    "question_id": 11,\n    "answer": "红色"\n  },\n'
            '  {\n    "question_id": 10,\n    "answer": "Two."\n  }\n]\n',
        ),
        ("coco_captions", ANSWERS[:1], '[\n  {\n    "image_id": 11,\n    "caption": "红色"\n  }\n]\n'),
        (
            "jsonl",
            [*ANSWERS, ("对话-1", "1?", "one"), ("对话-1", "2?", "")],
            '{"id":11,"question":"什么颜色？","answer":"红色"}\n{"id":10,"question":"How many?","answer":"Two."}\n'
            '{"id":"对话-1","question":"1?","answer":"one"}\n{"id":"对话-1","question":"2?","answer":""}\n',
        ),
    ],
)
def test_result_files(name, answers, expected, tmp_path):
    file = tmp_path / "结果 results"
    write_results(name, file, iter(answers))
    assert file.read_bytes() == expected.encode()
    if name != "jsonl":
        with pytest.raises(AssertionError, match="one answer for each question or photo"):
            write_results(name, file, [answers[0], answers[0]])
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot write .*folder"):
        write_results(name, tmp_path / "folder", answers)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "结果 results"]
    assert file.read_bytes() == expected.encode()


def test_the_coco_scorer_reads_the_result_and_gives_the_same_cider(images, tmp_path):
    coco = pytest.importorskip("pycocotools.coco").COCO
    cider = pytest.importorskip("pycocoevalcap.cider.cider").Cider
    [file] = caption_file(tmp_path)
    _, entries, _ = read_standard("coco_captions", [file], images)
    answers = ["a dog on the beach", "一只狗", "two men on a rock"]
    references = [[english_words(text) for text in entry.turns[0].answers] for entry in entries]
    ours = caption_scores(list(map(english_words, answers)), references)["cider_d"]
    rows = [(entry.id, entry.turns[0].question, answer) for entry, answer in zip(entries, answers, strict=True)]
    write_results("coco_captions", tmp_path / "results.json", rows)

    truth = coco(str(file))
    results = truth.loadRes(str(tmp_path / "results.json"))
    assert set(results.getImgIds()) == {101, 102, 103}
    texts = [
        {ID: [" ".join(english_words(row["caption"])) for row in side.imgToAnns[ID]] for ID in results.getImgIds()}
        for side in (truth, results)
    ]
    assert ours == pytest.approx(cider().compute_score(*texts)[0], abs=1e-6)  # the tolerance of test_captions.py
    assert ours > 0.5


@pytest.mark.parametrize("name", FORMATS)
def test_wrong_files(name, images, tmp_path):
    files = FILES[name](tmp_path)
    with pytest.raises(UserError, match=f"--annotations: 3 files for --format {name}: name one file, or for vqav2 the"):
        read_standard(name, files[:1] * 3, images)
    with pytest.raises(UserError, match=r"--images: folder not found: .*val201\. Did you mean .*照片 val2014\?"):
        read_standard(name, files, tmp_path / "照片 val201")
    with pytest.raises(UserError, match=r"none\.json: file not found"):
        read_standard(name, [tmp_path / "none.json"], images)
    with pytest.raises(UserError, match=r"other\.json: .*: is 'format' right\?"):
        read_standard(name, [write_json(tmp_path / "other.json", [])], images)


@pytest.mark.parametrize("name", ["vqav2", "coco_captions"])
def test_no_photo_is_there(name, images, tmp_path):
    files = FILES[name](tmp_path)
    for photo in images.iterdir():
        photo.unlink()
    with pytest.raises(UserError, match=r"rows is usable, mostly: photo not found \(\d, for example .* or --images"):
        read_standard(name, files, images)
