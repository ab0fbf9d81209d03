"""The scripts at the true geometry: eight demo photos learned by heart, real photos where there are any."""

import json
import os
import subprocess
import sys

import pytest

from config import load_config
from demo.make_data import make_data
from paths import REPO_ROOT
from process_image import main as process_image
from training.loop import Trainer


@pytest.mark.nightly  # three minutes; `make demo` has thresholds of its own
def test_eight_demo_photos_are_learned_by_heart(tmp_path):
    make_data(tmp_path, photos=8, seed=11, per_type=1)
    overrides = [
        f"data.sources.0.annotations={tmp_path}/ai_challenger/annotations.json",
        f"data.sources.0.images={tmp_path}/ai_challenger/photos",
        f"data.sources.1.annotations={tmp_path}/llava/annotations.json",
        f"data.sources.1.images={tmp_path}/llava/photos",
        f"data.image_map={tmp_path}/image_map.json",
        f"data.captions={tmp_path}/captions.json",
        f"data.feature_cache={tmp_path}/features",
        f"train.output_dir={tmp_path}/run",
        "data.val_fraction=0",
        "train.workers=0",
        "train.micro_batch=8",
        "train.accumulation=1",
        "train.max_steps=80",
        "train.log_steps=10",
    ]
    process_image(["--config", "configs/demo.yaml", *overrides])
    captions = json.loads((tmp_path / "captions.json").read_text(encoding="utf-8"))
    for ID, entries in captions.items():  # one of five captions cannot be foreseen; dialogues would take longer
        captions[ID] = [entry | {"a": entry["a"][:1]} for entry in entries if "a" in entry]
    (tmp_path / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
    trainer = Trainer(load_config("configs/demo.yaml", overrides))
    assert trainer.model.processor.chat.plan.crop_tokens == 728
    trainer.run()
    assert trainer.last_figures["loss"] < 0.05


def test_real_photos_in_both_formats(samples_folder, tmp_path):
    """Sense is not expected of the answers; flow and counts are."""
    coco, ali = samples_folder / "coco", samples_folder / "ai_challenger"
    images = {"complex": coco / "train2017", "detail": coco / "train2017"}
    annotations = {"complex": coco / "complex_reasoning_77k.json", "detail": coco / "detail_23k.json"}
    sources = [
        f"{{name: {name}, format: llava, annotations: '{annotations[name]}', images: '{images[name]}'}}"
        for name in images
    ]
    sources.append(
        f"{{name: ali, format: ai_challenger, annotations: '{ali}/caption_train_annotations_20170902.json', "
        f"images: '{ali}/caption_train_images_20170902'}}"
    )
    overrides = [
        f"data.sources=[{', '.join(sources)}]",
        f"data.image_map={tmp_path}/image_map.json",
        f"data.captions={tmp_path}/captions.json",
        "data.check_images=open",
        "data.cache_features=false",
        f"train.output_dir={tmp_path}/run",
        "train.max_steps=10",
        "train.micro_batch=2",
        "train.accumulation=1",
        "train.workers=1",
        "train.log_steps=1",
        "train.eval_samples=2",
    ]
    process_image(["--config", "configs/demo.yaml", *overrides])
    report = json.loads((tmp_path / "process_report.json").read_text(encoding="utf-8"))
    raw_rows = [len(json.loads(path.read_text(encoding="utf-8"))) for path in annotations.values()]
    assert [source["kept"] for source in report[:2]] == raw_rows
    assert all(source["dropped"] == {} for source in report)
    photos = json.loads((tmp_path / "image_map.json").read_text(encoding="utf-8"))
    assert sorted(photo["ID"] for photo in photos.values()) == list(range(len(photos)))

    trainer = Trainer(load_config("configs/demo.yaml", overrides))
    folder = trainer.run()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 10
    photo = next((coco / "train2017").iterdir())
    command = [sys.executable, "predict.py", "--checkpoint", folder, "--image", photo, "--question", "What is this?"]
    done = subprocess.run(
        [*map(str, command), "generate.max_new_tokens=8"],
        cwd=REPO_ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.nightly
def test_interrupted_run_goes_on(tmp_path):
    """Ctrl-C in a process of its own leaves a checkpoint, and --resume auto finishes the run."""
    import signal
    import time

    make_data(tmp_path, photos=8, seed=11, per_type=1)
    sources = "[{name: q, format: llava, annotations: '%s/llava/annotations.json', images: '%s/llava/photos'}]"
    overrides = [
        f"data.sources={sources % (tmp_path, tmp_path)}",
        f"data.image_map={tmp_path}/image_map.json",
        f"data.captions={tmp_path}/captions.json",
        f"data.feature_cache={tmp_path}/features",
        f"train.output_dir={tmp_path}/run",
        "data.val_fraction=0",
        "train.micro_batch=2",
        "train.accumulation=1",
        "train.max_steps=30",
        "train.log_steps=1",
    ]
    process_image(["--config", "configs/demo.yaml", *overrides])
    command = [sys.executable, "train.py", "--config", "configs/demo.yaml", *overrides]
    process = subprocess.Popen(command, cwd=REPO_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output = process.communicate()[0]
    assert process.returncode == 130, output
    assert "continue with --resume auto" in output
    done = subprocess.run([*command, "--resume", "auto"], cwd=REPO_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 31))
