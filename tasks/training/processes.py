"""Training in several processes of this machine: torchrun starts them, and each of them runs this module."""

import logging
import os
import re
import socket
import subprocess
import sys
import threading
import traceback
from collections import defaultdict, deque
from pathlib import Path

import torch
from torch.distributed import init_process_group

from configs.errors import BadInput, Stopped
from configs.schema import Recipe
from tasks.models.reference import device_of
from tasks.running.progress import logger

LAST_WORDS = 20  # lines of each process that an error shows
MARK = "potstill| "  # what a line of ours begins with, among all that libraries print


def check_processes(recipe: Recipe) -> None:
    """Refuse more processes than there are GPUs, where training goes to GPUs."""
    wanted, device = recipe.train.processes, device_of(recipe.student)
    if device.type == "cuda" and wanted > torch.cuda.device_count():
        raise BadInput(
            f"train.processes = {wanted} needs as many GPUs, this machine has {torch.cuda.device_count()}; "
            "set it to at most that, or student.device = 'cpu'"
        )


def launch(job: str, folder: Path, processes: int) -> None:
    """`tasks.training.trainer.train` on `job` (JSON) in so many processes, whose log lines become ours.

    Raises BadInput or Stopped where one of them does, and RuntimeError with what each said last where one fails.
    """
    (folder / "job.json").write_text(job)
    # torchrun's own meeting point is a port on every interface of the machine; a file is one that nobody else can reach.
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={folder}/torchrun", "--rdzv-conf=store_type=file"]
    torchrun = ["torch.distributed.run", *meeting, f"--nproc-per-node={processes}", "--tee=3", f"--log-dir={folder}/logs"]
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    environment = {
        "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // processes)),
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    last_words: dict[str, deque[str]] = defaultdict(lambda: deque(maxlen=LAST_WORDS))
    with subprocess.Popen(
        [sys.executable, "-m", *torchrun, "-m", "tasks.training.processes", str(folder)],
        stdin=subprocess.PIPE,  # never written to: its end tells the processes that this one is gone
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment | os.environ,
    ) as running:
        assert running.stdout is not None
        for line in running.stdout:
            rank, text = re.fullmatch(r"(?:\[\D*(\d+)\]:)?(.*)", line.rstrip("\n"), re.DOTALL).groups()  # type: ignore[union-attr]
            if text.startswith(MARK):
                logger.info(text.removeprefix(MARK))
            else:
                last_words["torchrun" if rank is None else f"process {rank}"].append(text)
    for kind in (BadInput, Stopped):
        if (said := folder / kind.__name__).exists():
            raise kind(said.read_text())
    if running.returncode:
        if len(last_words) > 1:
            del last_words["torchrun"]  # it only says which of them failed
        words = "\n".join(f"{who}:\n  " + "\n  ".join(lines) for who, lines in sorted(last_words.items()))
        raise RuntimeError(f"training in {processes} processes failed; what was said last:\n{words}")


def main(folder: Path) -> None:
    """One of the processes. Ends it without destructors: torch's wait for gloo's threads with the GIL that those may need."""
    from tasks.training.trainer import JOB, train

    threading.Thread(target=_end_with_the_flow, daemon=True).start()
    rank, processes, status = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), 0
    if rank == 0:
        logger.addHandler(handler := logging.StreamHandler())
        handler.setFormatter(logging.Formatter(f"{MARK}%(message)s"))
    try:
        init_process_group(init_method=f"file://{folder}/processes", rank=rank, world_size=processes)
        train(JOB.validate_json((folder / "job.json").read_text()), folder)
    except (BadInput, Stopped) as error:
        (folder / type(error).__name__).write_text(str(error))
        status = 2
    except Exception:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _end_with_the_flow() -> None:
    """A killed flow leaves no process behind that goes on training for nobody."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
