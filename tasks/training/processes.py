"""Training in several processes on this machine. torchrun starts them, and each of them runs this module."""

import logging
import os
import re
import socket
import subprocess
import sys
import traceback
from collections import defaultdict, deque
from pathlib import Path

import torch
from torch.distributed import init_process_group

from configs.errors import BadInput, Damaged, Stopped
from configs.schema import Recipe
from tasks.models.reference import device_of
from tasks.running.attached import SCRIPT as ATTACHED
from tasks.running.attached import end_attached, start_attached
from tasks.running.memory import Halved
from tasks.running.progress import logger

LAST_WORDS = 20  # lines of each process's output that an error quotes
ENDS = (BadInput, Stopped, Damaged, Halved)  # of a process, which the one that started it raises again
MARK = "potstill| "  # prefix that tells our log lines from what libraries print


def check_processes(recipe: Recipe) -> None:
    """Refuse more processes than GPUs, where training is on GPUs."""
    wanted, device = recipe.train.processes, device_of(recipe.student)
    if device.type == "cuda" and wanted > torch.cuda.device_count():
        raise BadInput(
            f"train.processes = {wanted} needs as many GPUs, this machine has {torch.cuda.device_count()}; "
            "set it to at most that, or student.device = 'cpu'"
        )


def launch(job: str, folder: Path, processes: int) -> None:
    """Run `tasks.training.trainer.train` on `job` (JSON) in `processes` processes, and log their lines here.

    Raises BadInput, Stopped, Damaged or Halved where one of them does, and RuntimeError with the last output of each where one
    fails. After Halved, which says that memory ran out, it can be called again with the same folder.
    """
    for left in ("processes", "torchrun", *(kind.__name__ for kind in ENDS)):
        (folder / left).unlink(missing_ok=True)
    (folder / "job.json").write_text(job)
    # By default torchrun's processes meet at a port on every interface of the machine. Nobody else can reach a file.
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={folder}/torchrun", "--rdzv-conf=store_type=file"]
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    environment = {
        "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // processes)),
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    last_words: dict[str, deque[str]] = defaultdict(lambda: deque(maxlen=LAST_WORDS))
    running = start_attached(
        *("torch.distributed.run", *meeting, f"--nproc-per-node={processes}", "--tee=3", f"--log-dir={folder}/logs"),
        *(ATTACHED, "tasks.training.processes", str(folder)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment | os.environ,
    )
    try:
        assert running.stdout is not None
        for line in running.stdout:
            rank, text = re.fullmatch(r"(?:\[\D*(\d+)\]:)?(.*)", line.rstrip("\n"), re.DOTALL).groups()  # type: ignore[union-attr]
            if text.startswith(MARK):
                logger.info(text.removeprefix(MARK))
            else:
                last_words["torchrun" if rank is None else f"process {rank}"].append(text)
        running.wait()
    finally:
        end_attached(running)
    for kind in ENDS:
        if (message := folder / kind.__name__).exists():
            raise kind(message.read_text())
    if running.returncode:
        if len(last_words) > 1:
            del last_words["torchrun"]  # it only names the process that failed
        words = "\n".join(f"{who}:\n  " + "\n  ".join(lines) for who, lines in sorted(last_words.items()))
        raise RuntimeError(f"training in {processes} processes failed; their last output:\n{words}")


def main(folder: Path) -> None:
    """Run one process. It ends without destructors: torch's wait for gloo's threads, and hold a GIL they may need."""
    from tasks.training.trainer import JOB, train

    rank, processes, status = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), 0
    if rank == 0:
        logger.addHandler(handler := logging.StreamHandler())
        handler.setFormatter(logging.Formatter(f"{MARK}%(message)s"))
    try:
        init_process_group(init_method=f"file://{folder}/processes", rank=rank, world_size=processes)
        train(JOB.validate_json((folder / "job.json").read_text()), folder)
    except ENDS as error:
        (folder / type(error).__name__).write_text(error.args[0])
        status = 2
    except Exception:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
