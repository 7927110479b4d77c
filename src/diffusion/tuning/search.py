"""The search: an Optuna study whose trials are ordinary, shorter trainings, done by worker processes.

space.py says what is searched, store.py where the study is kept, study.py who has which trial,
worker.py and trial.py how one is done, objective.py what it is judged by,
report.py what is written down.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess

import torch

from diffusion import paths
from diffusion.code_digest import code_digests
from diffusion.config import Params, flat
from diffusion.data.dataset import Dataset
from diffusion.errors import StopRequest, UserError
from diffusion.locks import only_trainer
from diffusion.metrics.features import EfficientNetLite0
from diffusion.metrics.reference import Reference
from diffusion.runtime import resolve_device
from diffusion.tracking import runs
from diffusion.tracking.tracker import Tracker
from diffusion.tuning import objective
from diffusion.tuning.report import Ledger, draw_figures
from diffusion.tuning.space import present, recipe
from diffusion.tuning.store import answering, is_outage, shown, storage_url
from diffusion.tuning.study import SharedStudy
from diffusion.tuning.trial import REPORTS, Objective, Trainings
from diffusion.tuning.worker import POLL_SECONDS, Job, work, worker

MAX_DEATHS = 20  # of workers, since a trial was finished
LEDGER_SECONDS = 3.0  # between two looks at the study, which take the workers' cores


def tune(params: Params) -> None:
    """Search learning rate and schedules, or what else `tune.space` names; see `search`.

    Raises:
        UserError: the space, the data, the reference or the store are not as they must be, or another trainer is at
            work.
        KeyboardInterrupt: it was asked to stop.
    """
    url = storage_url(params.tune)
    resolve_device(params.train.device)  # else every trial would find out
    reference = objective.load_reference(params, EfficientNetLite0(precision=params.evaluate.precision))
    search(study_name(params, Dataset.load().identity, reference), params, url, Trainings)


def search(name: str, params: Params, url: str, prepare: Callable[[Params], Objective]) -> None:
    """Do trials until the study has `tune.trials` of all sittings, workers and machines; keep tuning/ up to date.

    `prepare` is called once in each worker and gives what does a trial and returns its value; it must be picklable.

    Raises:
        UserError: the store does not answer, a worker failed, or another trainer is at work here.
        KeyboardInterrupt: it was asked to stop (Ctrl-C, SIGTERM); the trials at work were saved.
    """
    with only_trainer(paths.RUNS / name), StopRequest("make tune") as stop, answering():
        shared = SharedStudy(name, params, url)
        if present(params, shared.space) is None:
            where = "outside tune.space, or between its steps"
            print(f"tune: what params.yaml has lies {where}: the study does not begin with it", file=sys.stderr)
        tracker, run_id = _study_run(shared)
        os.environ.pop("MLFLOW_RUN_ID", None)  # by it `mlflow run` meant the study's run, not the trials'
        tracker.params(flat(params.tune.model_copy(update={"storage": shown(url)}), "tune"))
        job, ledger = Job(name, params, url, run_id, prepare), Ledger(shared, tracker)
        with runs.closing_status(tracker, "tune"):
            ledger.write()  # another study's may lie there
            try:
                (_alone if params.tune.workers == 1 else _together)(job, ledger, stop)
            finally:
                ledger.update()
                ledger.write()
                draw_figures(shared)
                tracker.artifact(paths.TUNING, "tuning")
            if not shared.finished:
                done = f"stopped after {len(ledger.done())} of {params.tune.trials} trials"
                raise KeyboardInterrupt(f"{done}; `make tune` goes on from there")
        hint = "`make tune-apply` takes over the best" if shared.best() else "none was complete, trials.csv says why"
        print(f"{params.tune.trials} trials are done: see {paths.TUNING}/; {hint}")


def _study_run(shared: SharedStudy) -> tuple[Tracker, str | None]:
    """The study's run, and its id if MLflow answers or did: the same for all machines, whoever is first."""
    name = shared.name
    with shared.alone():
        known = shared.study.user_attrs.get("mlflow_run_id")
        tracker = runs.open_run(shared.params.tracking, name=f"tune-{name}", run_folder=paths.RUNS / name, run_id=known)
        if tracker.run_id and not known:
            shared.study.set_user_attr("mlflow_run_id", tracker.run_id)
        return tracker, tracker.run_id or known


def study_name(params: Params, data: str, reference: Reference) -> str:
    """16 hex digits that name all a study's values depend on, code included.

    How they are searched for (trials, workers, sampler, pruner, storage, seed) may change from sitting to sitting.
    """
    identity = {
        "tune": {key: getattr(params.tune, key) for key in ("images_per_trial", "sample_images", "space")},
        "recipe": recipe(params),
        "data": data,
        "reference": reference.key,
        "reports": REPORTS,
        "code": code_digests("tuning/objective.py", "tuning/space.py"),
    }
    return sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _alone(job: Job, ledger: Ledger, stop: StopRequest) -> None:
    """This process is the worker."""
    work(job, 0, lambda: stop.asked, after=ledger.update)


def _together(job: Job, ledger: Ledger, stop: StopRequest) -> None:
    """Start `tune.workers` processes and wait for them; those that are killed are replaced."""
    workers = [_start(job, number) for number in range(job.params.tune.workers)]
    deaths, done, due = 0, 0, 0.0
    told = False
    try:
        while True:
            time.sleep(POLL_SECONDS / 4)
            if time.monotonic() >= due:
                done, before = look(ledger) or done, done
                deaths = 0 if done > before else deaths
                due = time.monotonic() + LEDGER_SECONDS
            if stop.asked and not told:
                told = True
                _terminate(workers)
            for number, process in enumerate(workers):
                if stop.asked or process.exitcode is None or (process.exitcode == 0 and ledger.shared.finished):
                    continue
                if process.exitcode > 0:
                    raise UserError(f"worker {number} failed, see above; `make tune` goes on when that is put right")
                deaths += 1
                if deaths > MAX_DEATHS:
                    raise UserError(f"{deaths} workers were killed one after the other: is there memory enough?")
                how = f"was killed (signal {-process.exitcode})" if process.exitcode else "was asked to stop"
                print(f"worker {number} {how}; another takes its place", flush=True)
                workers[number] = _start(job, number)
            if not any(process.is_alive() for process in workers):
                break
    finally:
        _terminate(workers)  # if this is the second signal, they stop at once
        for process in workers:
            process.join()


def look(ledger: Ledger) -> int:
    """Bring the ledger up to date; the trials that are done, 0 if the store is away: its workers may not notice."""
    try:
        ledger.update()
        return len(ledger.done())
    except Exception as error:
        if not is_outage(error):
            raise
        return 0


def _start(job: Job, number: int) -> BaseProcess:
    """A worker process with its share of the cores; it does not see this terminal's Ctrl-C, which is ours to answer."""
    process = multiprocessing.get_context("spawn").Process(target=worker, args=(job, number, os.getpid()))
    threads = max(1, torch.get_num_threads() // job.params.tune.workers)
    cores = {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    with _inherited(cores | own_gpu(number, resolve_device(job.params.train.device))):
        process.start()
    return process


def own_gpu(number: int, device: torch.device) -> dict[str, str]:
    """CUDA's variable that shows worker `number` one GPU, each worker the next; empty for another `device`."""
    if device.type != "cuda":
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    return {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]}


@contextmanager
def _inherited(variables: dict[str, str]) -> Iterator[None]:
    """Environment and held-back Ctrl-C of a process that is started inside the block; this one's comes at its end."""
    resource_tracker.ensure_running()  # when multiprocessing starts it, it lets Ctrl-C through
    before = {key: os.environ.get(key) for key in variables}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    os.environ.update(variables)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _terminate(workers: list[BaseProcess]) -> None:
    for process in workers:
        if process.is_alive():
            process.terminate()
