"""Rows of the training data are asked with the prompt that training gives them."""

import json
import shutil

import pytest

from answering.answer import Answerer
from answering.question_file import answer_file
from answering.request import Reply
from dataset.image_caption_dataset import entry_messages
from dataset.raw import process_coco
from dataset.records import read_records
from model.checkpoint import load_checkpoint

ROWS = [
    {"image": "0.png", "question": "Which?", "answer": "A"},
    {"image": ["0.png", "1.png"], "question": "Is <image> like <image>?", "answer": "B"},
    {"image": ["0.png", "1.png"], "question": "Same?", "answer": "B"},
    {"turns": [{"question": "Hi", "answer": "C"}, {"question": "This?", "answer": "D", "images": ["1.png", "1.png"]}]},
    {"image": "1.png", "turns": [{"question": "1?", "answer": "E"}, {"question": "<image> 2?", "answer": "F"}]},
    {"image": "2.png", "conversations": [
        {"from": "human", "value": "1?"}, {"from": "gpt", "value": "G"},
        {"from": "human", "value": "2?"}, {"from": "gpt", "value": "H"}]},
    {"image": "1.png", "box": [0, 0, 9, 9], "question": "It?", "answer": "I"},
    {"image": "1.png", "turns": [{"question": "1?", "answer": "J"},
                                 {"question": "And it?", "answer": "K", "box": [0.5, 0.0, 1.0, 1.0]}]},
    {"turns": [{"question": "1?", "answer": "L", "image": "2.png"},
               {"question": "It?", "answer": "M", "box": [0, 0, 9, 9]},
               {"question": "3?", "answer": "N", "image": "1.png", "box": [1, 1, 9, 9]}]},
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_a_row_of_the_training_data_gets_its_prompt(tiny_checkpoint, tmp_path, monkeypatch, row):
    root = tiny_checkpoint.parent.parent
    answerer = Answerer(load_checkpoint(tiny_checkpoint, overrides={"model_root": str(root)}))
    chat, asked = answerer.model.processor.chat, []
    reply = Reply("yes", "stop", 1, 1)
    monkeypatch.setattr(answerer, "answer_many", lambda requests: asked.extend(requests) or iter([reply]))
    (tmp_path / "in.jsonl").write_text(json.dumps(row))
    shutil.copytree(root / "photos", tmp_path, dirs_exist_ok=True)
    assert answer_file(answerer, tmp_path / "in.jsonl", tmp_path / "out.jsonl") == (1, 0)

    image_map, captions = process_coco([row], tmp_path, 0)
    (tmp_path / "map.json").write_text(json.dumps(image_map))
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    known, [entry] = read_records(tmp_path / "map.json", tmp_path / "captions.json")
    trained = entry_messages(entry, chat, [turn.answers[0] for turn in entry.turns][:-1])
    [(photos, messages)] = asked
    assert chat.render(messages) == chat.render(trained)
    assert photos == [known[ID].picture for ID in entry.images]
