"""How the tests of several processes start them: all cases of `process_cases.py` by one launch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from paths import REPO_ROOT
from tests.training.runs import weights

LIMIT_SECONDS = 240  # for all runs of a launch; a deadlock would last for half an hour
SCRIPT = Path(__file__).with_name("process_cases.py")
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node={}"
# what it starts for several GPUs; for several processes on the CPU it needs MPI
ACCELERATE = (
    "-m accelerate.commands.accelerate_cli launch --config_file configs/accelerate/one_machine.yaml "
    "--main_process_port 0 --num_processes {}"
)


def launch(cases, processes, folder, launcher=TORCHRUN):
    """Run the cases; the results by case, one of each process, and what was printed on stderr."""
    folder.mkdir()
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [
        sys.executable,
        *launcher.format(processes).split(),
        str(SCRIPT),
        str(folder / "cases.json"),
        str(folder),
    ]
    environment = os.environ | {"PYTHONPATH": str(REPO_ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=REPO_ROOT, env=environment, stderr=subprocess.PIPE, text=True) as launched:
        try:
            _, told = launched.communicate(timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            launched.terminate()  # the launcher hands it on; if it were killed, it would leave its processes behind
            raise
    results = {}
    for case in cases:
        files = [folder / f"{case['name']}-{rank}.json" for rank in range(processes)]
        results[case["name"]] = [json.loads(file.read_text()) if file.exists() else None for file in files]
    return results, told


def same_weights(results, whole, resumed, processes):
    expected, actual = (weights(Path(results[name][0]["folder"])) for name in (whole, resumed))
    for name in expected:
        if processes == 2:
            assert torch.equal(actual[name], expected[name])
        else:  # DDP forms other buckets in the first step after a start, and three terms have more than one order
            assert (actual[name] - expected[name]).norm() <= 1e-5 * expected[name].norm()
