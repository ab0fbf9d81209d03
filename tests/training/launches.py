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
    "-m accelerate.commands.accelerate_cli launch --config_file configs/accelerate/{} "
    "--main_process_port {} --num_processes {{}}"
)


def launch(cases, processes, folder, *launchers):
    """Run the cases; the results by case, one of each process, and what was printed on stderr.

    Several launchers are several machines; without any, torchrun starts all processes.
    """
    folder.mkdir()
    (folder / "cases.json").write_text(json.dumps(cases))
    script = [str(SCRIPT), str(folder / "cases.json"), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(REPO_ROOT), "OMP_NUM_THREADS": "1"}
    with (folder / "stderr.txt").open("w+") as stderr:
        machines = [
            subprocess.Popen(
                [sys.executable, *launcher.format(processes).split(), *script],
                cwd=REPO_ROOT,
                env=environment,
                stderr=stderr,
            )
            for launcher in launchers or (TORCHRUN,)
        ]
        try:
            for launched in machines:
                launched.wait(LIMIT_SECONDS)
        finally:
            for launched in machines:
                launched.terminate()  # it hands it on; if it were killed, it would leave its processes behind
                launched.wait()
        stderr.seek(0)
        told = stderr.read()
    results = {}
    for case in cases:
        files = [folder / f"{case['name']}-{rank}.json" for rank in range(processes)]
        results[case["name"]] = [json.loads(file.read_text()) if file.exists() else None for file in files]
    return results, told


def same_weights(results, whole, resumed, processes):
    expected, actual = (weights(Path(results[name][0]["folder"])) for name in (whole, resumed))
    assert expected.keys() == actual.keys() != set()
    for name in expected:
        if processes == 2:
            assert torch.equal(actual[name], expected[name])
        else:  # DDP forms other buckets in the first step after a start, and three terms have more than one order
            assert (actual[name] - expected[name]).norm() <= 1e-5 * expected[name].norm()
