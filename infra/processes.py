"""The processes of a run: who is who, what they share, how they are told to stop, and how a script
ends.

Without torchrun there is one process, and every function here does the obvious thing.
"""

import faulthandler
import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from infra.config import memory_advice
from infra.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    UNWRITABLE,
    BadInput,
    OutOfMemory,
    RunStopped,
    first_sentences,
    is_out_of_memory,
)

SMALL_MODEL = 2_000_000  # parameters
NOT_DETERMINISTIC = "does not have a deterministic implementation"  # as torch says it


def command_line(main, config_class=None) -> None:
    """Run a script's `main()`; what goes wrong in a foreseen way ends in one line on stderr and an
    exit code.

    `config_class`: whose knobs say what makes a stage need less memory.
    """
    # Which torch takes first on H100 and H200. It can give NaN gradients where rows are padded
    # (pytorch issue 196678), and plans anew for every length, which in decoding is every token.
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        _say_what_went_wrong(main, config_class)
    except BaseException as error:
        if not dist.is_initialized():
            raise
        _leave_at_once(error)
    # Only at a good end: after a failure on one rank the others may never come to it
    if dist.is_initialized():
        dist.destroy_process_group()


def _leave_at_once(error: BaseException) -> None:
    """End this rank without taking its process group down: on GPUs that waits for collectives that
    no other rank may ever join. The others see the connection close, and torchrun ends them.
    """
    code = EXIT_FAILED
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    else:
        sys.excepthook(type(error), error, error.__traceback__)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _say_what_went_wrong(main, config_class) -> None:
    try:
        main()
    except BadInput as error:
        _end(f"error: {error}", EXIT_BAD_INPUT)
    except OutOfMemory as stop:
        advice = memory_advice(config_class, stop.stage) if config_class else "give it less"
        advice += "; resume=true goes on from the newest checkpoint"
        _end(f"stopped: out of memory in stage {stop.stage} ({stop}): {advice}", EXIT_FAILED)
    except RunStopped as stop:
        _end(f"stopped: {stop}", stop.code)
    except (MemoryError, RuntimeError) as error:
        if NOT_DETERMINISTIC in str(error):
            _end(f"stopped: {first_sentences(error)}: set model.deterministic=false", EXIT_FAILED)
        if not is_out_of_memory(error):  # in no stage of a run
            raise
        _end(
            f"stopped: {first_sentences(error)}: take fewer --samples or --max-new-tokens",
            EXIT_FAILED,
        )
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        _end(
            f"stopped: cannot write: {error}; mend that, then start it again (train.py: "
            "resume=true)",
            EXIT_FAILED,
        )


def _end(message: str, code: int) -> None:
    print(f"[rank {rank()}] {message}" if rank() else message, file=sys.stderr, flush=True)
    sys.exit(code)


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def print0(*words, file=None) -> None:
    """print, once for all ranks."""
    if rank() == 0:
        print(*words, file=file, flush=True)


def start_processes(timeout_minutes: float, deterministic: bool = False) -> torch.device:
    """Join torchrun's processes, if it started this one -> this rank's device: its GPU if there is
    one, else the CPU.

    On a GPU even a single process forms a group of one, so that FSDP keeps master weights and
    compute type apart. `deterministic`: kernels there add in the same order every time.
    """
    if deterministic:
        # cuBLAS reads it when it starts, which is after this
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Memory that is not written is not read: it need not be filled
        torch.utils.deterministic.fill_uninitialized_memory = False
    on_gpu, local = torch.cuda.is_available(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if on_gpu and local > torch.cuda.device_count():
        raise BadInput(
            f"{local} processes were started here for {torch.cuda.device_count()} GPU(s): one "
            "each, no more"
        )
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if on_gpu
        else torch.device("cpu")
    )
    if on_gpu:
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    if on_gpu or not alone:
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(
            backend,
            timeout=timedelta(minutes=timeout_minutes, seconds=30),
            # Communicators are made on it at once, so that one that cannot be made fails here
            device_id=device if on_gpu else None,
            **alone,
        )
    return device


def choose_threads(num_parameters: int) -> None:
    """One thread for a small model on a CPU, unless OMP_NUM_THREADS says otherwise.

    Its matrices are too small to share: on an idle machine a second thread gains little, and where
    another process takes a core the threads spin at their barriers (100 quickstart steps measured:
    37 s with one thread, 154 with two).
    """
    if num_parameters < SMALL_MODEL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def restart_watchdog(timeout_minutes: float) -> None:
    """From now, unless called again in time, have every rank print where it stands: a hang must
    explain itself.

    It only prints. A run hung in a collective ends when that collective has waited for
    timeout_minutes and 30 seconds.
    """
    faulthandler.dump_traceback_later(timeout_minutes * 60)


def map_over_ranks(work, items: list) -> list:
    """`work(items)`, a list of results, divided among the ranks by contiguous slices; every rank
    gets them all.
    """
    if world_size() == 1:
        return work(items)
    bounds = [len(items) * r // world_size() for r in range(world_size() + 1)]
    mine = items[bounds[rank()] : bounds[rank() + 1]]
    parts: list = [None] * world_size()
    dist.all_gather_object(parts, work(mine) if mine else [])
    return [result for part in parts for result in part]


def all_reduce(tensor: torch.Tensor, op=dist.ReduceOp.SUM) -> torch.Tensor:
    """`tensor`, reduced over all ranks in place."""
    if world_size() > 1:
        dist.all_reduce(tensor, op)
    return tensor


def on_first_rank(work):
    """`work()` on rank 0 alone, while the others wait -> its result on every rank, or its error
    on every rank.
    """
    result, error = None, None
    if rank() == 0:
        try:
            result = work()
        except (BadInput, RunStopped, OSError) as caught:
            error = caught
    if world_size() > 1:
        outcome = [result, error]
        dist.broadcast_object_list(outcome)
        result, error = outcome
    if error is not None:
        raise error
    return result


_signals: list[float] = []  # when they came


def catch_signals() -> None:
    """From now SIGTERM and Ctrl-C ask the run to stop at the next safe place; a second one ends
    it at once.
    """

    def note(number, _frame):
        # Within 2 s it is torchrun, which passes on what the terminal has sent already
        if _signals and time.monotonic() - _signals[0] > 2:
            os._exit(128 + number)
        _signals.append(time.monotonic())
        if rank() == 0:  # not print: the signal may have come in the middle of one
            os.write(
                2, f"{signal.Signals(number).name}: stopping at the next safe place\n".encode()
            )

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)


def stop_requested() -> bool:
    """Whether any rank was asked to stop; all ranks call it together and agree."""
    return bool(all_reduce(torch.tensor(len(_signals))))
