"""The script on a tiny checkpoint: files, interruption, comparison, and what is refused before the model is loaded."""

import json

import pytest
from PIL import Image

import eval_vqa
from answering.answer import Answerer
from errors import UserError
from model.checkpoint import load_checkpoint

TIMES = {"seconds", "finished", "command"}


@pytest.fixture
def score(tiny_checkpoint, tmp_path):
    """`score(*options)`: run the script on the tiny checkpoint and its data; returns `metrics.json`."""
    folder = tiny_checkpoint.parent.parent
    data = [f"data.{name}={folder / name}.json" for name in ("image_map", "captions")]

    def run(*options, output="out"):
        settings = [f"model_root={folder}", "generate.max_new_tokens=3", *data]
        files = ["--checkpoint", tiny_checkpoint, "--output", tmp_path / output]
        eval_vqa.main([str(option) for option in [*files, *settings, *options]])
        metrics = json.loads((tmp_path / output / "metrics.json").read_text(encoding="utf-8"))
        return {key: value for key, value in metrics.items() if key not in TIMES}

    return run


def stop_in(monkeypatch, calls):
    """Let the engine end with Ctrl-C at call `calls`, before a batch of one question each."""
    answer_many, left = Answerer.answer_many, [calls]

    def interrupted(self, requests):
        for request in requests:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            yield from answer_many(self, [request])

    monkeypatch.setattr(Answerer, "answer_many", interrupted)


def test_all_of_it_and_again_after_an_interruption(score, tmp_path, monkeypatch, capsys):
    everything = ["--split", "all", "--hard", "blur", "light", "--gallery", tmp_path / "g.png"]
    whole = score(*everything)
    output = capsys.readouterr().out
    assert "looks at the photo" in output.splitlines()[0]
    assert max(map(len, output.splitlines()[1:-2])) <= 100
    assert {name: passed["overall"]["questions"] for name, passed in whole["passes"].items()} == dict.fromkeys(
        ["trained", "blind", "text", "untrained", "majority"], 25
    )
    assert set(whole["passes"]["trained"]["by_type"]) == {"tiny", "number"}
    assert {kind: len(points) for kind, points in whole["hard"].items()} == {"blur": 6, "light": 6}
    assert whole["majority"]["number"]["origin"] == "scored"  # with "all" no training part is left
    assert whole["photos"] == 6
    assert (tmp_path / "g.png").is_file()

    with monkeypatch.context() as patch:
        stop_in(patch, 60)
        with pytest.raises(KeyboardInterrupt):
            score(*everything, output="killed")
    assert not (tmp_path / "killed" / "metrics.json").exists()
    assert score(*everything, output="killed") == whole
    page = (tmp_path / "killed" / "report.html").read_text(encoding="utf-8")
    assert "Hard photos" in page
    assert "data:image/jpeg;base64," in page


def test_val_takes_majority_answers_of_the_training_part(score):
    metrics = score("--baselines", "majority")
    assert list(metrics["passes"]) == ["trained", "majority"]
    assert {common["origin"] for common in metrics["majority"].values()} == {"train"}
    assert metrics["visual_gain"] is None
    assert list(score("--baselines", output="alone")["passes"]) == ["trained"]


def test_other_settings_begin_anew(score, capsys):
    few = ["--split", "all", "--baselines", "--limit", "2"]
    score(*few)
    capsys.readouterr()
    score(*few, "generate.max_new_tokens=2")
    lines = capsys.readouterr().out.splitlines()
    assert "looks at the photo" in lines[0]
    assert "made with other settings (generate) and is now predictions.old-1.jsonl" in lines[1]
    score(*few, "--limit", "1", "generate.max_new_tokens=2")
    note = "made with other settings (limit, questions, photos) and is now predictions.old-2.jsonl"
    assert note in capsys.readouterr().out


def test_two_evaluations_side_by_side(score, tmp_path, capsys):
    score("--baselines")
    lines = (tmp_path / "out" / "predictions.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    elsewhere = lines[0].replace("float32 on cpu", "float32 on cuda")  # then the user is told that rounding may differ
    (tmp_path / "out" / "predictions.jsonl").write_text("".join([elsewhere, *lines[1:]]), encoding="utf-8")
    capsys.readouterr()
    metrics = score("--baselines", "--compare", tmp_path / "out", output="again")
    assert metrics["compared"]["difference"] == {"score": 0.0, "low": 0.0, "high": 0.0}
    assert metrics["compared"]["test"] == "McNemar's test"
    assert metrics["compared"]["p"] == 1.0
    output = capsys.readouterr().out
    assert "looks at the photo" in output.splitlines()[0]
    assert "--compare: computed in float32 on cuda there" in output
    assert "compared with checkpoint-2: accuracy +0.000" in output
    with pytest.raises(UserError, match=r"asked other questions \(--split val there and all here\)"):
        score("--baselines", "--split", "all", "--compare", tmp_path / "out", output="other")


def test_a_server_is_judged_before_what_it_lacks_is_said(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    """A model stands in for the server; `tests/serving` has a real one."""
    folder = tiny_checkpoint.parent.parent
    data = {f"data.{name}": str(folder / f"{name}.json") for name in ("image_map", "captions")}
    model = load_checkpoint(tiny_checkpoint, overrides={"model_root": folder, **data, "generate.max_new_tokens": 3})
    monkeypatch.setattr("evaluation.run.connect", lambda *_: (model, model.config))
    settings = {"checkpoint": "remote", "split": "val", "generate": {}, "computed": "by a server"}
    monkeypatch.setattr("evaluation.run.describe", lambda *_: settings)
    eval_vqa.main(["--server", "http://x", "--output", str(tmp_path / "out"), "--baselines", "majority"])
    lines = capsys.readouterr().out.splitlines()
    assert "looks at the photo" in lines[0]
    assert lines[1].startswith("no loss and no baseline 'untrained'")


def test_a_baseline_with_the_trained_weights_after_it_leaves_the_model_as_it_was(score, tiny_checkpoint, monkeypatch):
    models = []
    monkeypatch.setattr(
        "evaluation.run.load_checkpoint", lambda *a, **k: models.append(load_checkpoint(*a, **k)) or models[0]
    )
    score("--baselines", "untrained")
    fresh = load_checkpoint(tiny_checkpoint, overrides={"model_root": tiny_checkpoint.parent.parent})
    trained = models[0].feature_proj.state_dict()
    assert all((weight == trained[name]).all() for name, weight in fresh.feature_proj.state_dict().items())


def test_mistakes_are_said_before_the_model_is_loaded(score, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.run.load_checkpoint", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "file").touch()
    wrong = {
        "nothing to evaluate.*val_fraction": ["data.val_fraction=0"],
        "--limit must be at least 1 photo, found -3": ["--limit", "-3"],
        "--output: .*file is not a folder": ["--output", tmp_path / "file"],
        "--output: .* is a checkpoint, name a folder in it": ["--output", tiny_checkpoint],
        "the folder of --gallery does not exist": ["--gallery", tmp_path / "no" / "g.png"],
        "--gallery: .* must end in one of": ["--gallery", tmp_path / "g.doc"],
        "--baselines: unknown name 'blnd': valid are blind, text": ["--baselines", "text", "blnd"],
        "--hard: unknown name 'fog': valid are blur, noise": ["--hard", "fog"],
        "--compare: .*no has neither": ["--compare", tmp_path / "no"],
    }
    for message, options in wrong.items():
        with pytest.raises(UserError, match=message):
            score(*options)
    for message, files in {
        "keeps no absolute paths.*data.image_map=FILE data.captions=FILE": ["data.image_map=a", "data.captions=b"],
        "'data.captions': file not found": [f"data.image_map={tmp_path / 'file'}", "data.captions=b.json"],
    }.items():
        with pytest.raises(UserError, match=message):
            eval_vqa.main(["--checkpoint", str(tiny_checkpoint), *files])


@pytest.fixture
def standard_files(tmp_path):
    """VQA v2's two files and a jsonl file about three photos, one of which is missing."""
    (tmp_path / "images").mkdir()
    for ID, colour in ((3, "red"), (8, "blue")):
        Image.new("RGB", (50, 50), colour).save(tmp_path / "images" / f"COCO_val2014_{ID:012d}.jpg")
    asked = [(31, 3, "Which colour?"), (80, 8, "Is it red?"), (32, 3, "How many?"), (90, 9, "Where?")]
    questions = [{"question_id": ID, "image_id": photo, "question": text} for ID, photo, text in asked]
    answers = [
        {"question_id": ID, "image_id": photo, "question_type": "what", "answer_type": "other",
         "answers": [{"answer": "red", "answer_confidence": "yes", "answer_id": number} for number in range(1, 11)]}
        for ID, photo, _ in asked
    ]  # fmt: skip
    facts = {"data_subtype": "val2014", "data_type": "mscoco"}
    (tmp_path / "questions.json").write_text(json.dumps({"questions": questions, **facts}))
    (tmp_path / "annotations.json").write_text(json.dumps({"annotations": answers, **facts}))
    rows = [{"id": f"r{ID}", "image": f"COCO_val2014_{photo:012d}.jpg", "question": text, "answer": "红色"}
            for ID, photo, text in asked]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path


def test_standard_files_are_scored_and_their_result_file_written(score, standard_files, capsys):
    folder = standard_files
    files = ["--annotations", folder / "questions.json", folder / "annotations.json", "--images", folder / "images"]
    results = folder / "results.json"
    metrics = score("--format", "vqav2", *files, "--results", results, "--baselines", "text")
    assert metrics["passes"]["trained"]["overall"]["questions"] == 3
    lines = capsys.readouterr().out.splitlines()
    assert "looks at the photo" in lines[0]
    assert "photo not found" in "".join(lines[1:])  # the row of the missing one
    assert any(line.startswith("3 answers for a leaderboard or scorer") for line in lines[1:])
    rows = json.loads(results.read_text(encoding="utf-8"))
    assert [row["question_id"] for row in rows] == [31, 32, 80]
    lines = (folder / "out" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    trained = [line for line in map(json.loads, lines) if line["pass"] == "trained"]
    answers = {line["question"]: line["answer"].strip() for line in trained}
    assert [answers[text] for text in ("Which colour?", "How many?", "Is it red?")] == [row["answer"] for row in rows]
    (folder / "daquar").mkdir()
    rows = (folder / "rows.jsonl").rename(folder / "daquar" / "test.jsonl")
    jsonl = ["--annotations", rows, "--images", folder / "images"]
    metrics = score("--format", "jsonl", *jsonl, "--limit", "1", "--baselines", output="jsonl")
    assert metrics["photos"] == 1
    # the folder of the file is the source, by which DAQUAR's own scores are given
    assert metrics["passes"]["trained"]["overall"]["daquar"]["accuracy"] in (0, 1)


def test_a_test_set_gets_answers_but_no_scores(score, standard_files, tmp_path):
    folder = standard_files
    files = ["--format", "vqav2", "--annotations", folder / "questions.json", "--images", folder / "images"]
    results = folder / "results.json"
    with pytest.raises(UserError, match="has no answers to score against: .* or --results FILE"):
        score(*files)
    with pytest.raises(FileNotFoundError, match=r"metrics\.json"):
        score(*files, "--results", results)
    assert [row["question_id"] for row in json.loads(results.read_text(encoding="utf-8"))] == [31, 32, 80]
    assert len((tmp_path / "out" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()) == 4
    for option in (["--gallery", tmp_path / "all.png"], ["--hard", "blur"]):
        with pytest.raises(UserError, match=f"{option[0]} needs the right answers, which these questions lack"):
            score(*files, "--results", results, *option)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images", "images"], "belong to --format"),
        (["--format", "jsonl", "--split", "all"], "--split is of the run's own questions"),
        (["--format", "vqav2", "--images", "images"], "--format vqav2 needs --annotations FILE and --images DIR"),
        (["--format", "jsonl", "--annotations", "rows.jsonl", "--images", "no"], "--images: folder not found"),
        (
            ["--format", "jsonl", "--annotations", "rows.jsonl", "--images", "images", "--results", "rows.jsonl"],
            "is the file of --annotations",
        ),
    ],
)
def test_mistakes_with_standard_files(score, standard_files, monkeypatch, options, message):
    monkeypatch.chdir(standard_files)
    monkeypatch.setattr("evaluation.run.load_checkpoint", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match=message):
        score(*options)


@pytest.mark.parametrize("options", [["--no-blind"], ["--baselines", "blind", "--no-blind"]])
def test_a_former_option_is_unknown(options, capsys):
    with pytest.raises(SystemExit):
        eval_vqa.read_arguments(["--checkpoint", "c", *options])
    assert "unrecognized arguments: --no-blind" in capsys.readouterr().err


def test_config_values_may_follow_names():
    args = eval_vqa.read_arguments(
        ["model_root=a", "--checkpoint", "c", "--baselines", "text", "data.seed=1", "--hard", "data.captions=x"]
    )
    assert args.baselines == ["text"]
    assert args.hard == ["blur", "noise", "occlusion", "jpeg", "light", "rotation"]
    assert sorted(args.overrides) == ["data.captions=x", "data.seed=1", "model_root=a"]
    args = eval_vqa.read_arguments(["--checkpoint", "c"])
    assert (args.baselines, args.hard) == (["blind", "text", "untrained", "majority"], [])
