"""`make tune`: an Optuna study whose trials are ordinary, shorter trainings, done by worker processes.

space.py says what is searched, storage.py where the study is kept, study.py how a trial survives its worker,
worker.py and trial.py how one is done, objective.py what it is scored by, report.py what is written down.
"""

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256

import torch
from optuna import Study
from optuna.trial import TrialState

from diffusion import paths
from diffusion.code_digest import code_digests
from diffusion.config import Params, flat
from diffusion.data.dataset import Dataset
from diffusion.errors import StopRequest, UserError, masked
from diffusion.locks import only_trainer
from diffusion.metrics.features import EfficientNetLite0
from diffusion.metrics.reference import Reference
from diffusion.runtime import resolve_device
from diffusion.tracking import runs
from diffusion.tracking.tracker import Tracker
from diffusion.tuning import objective, storage
from diffusion.tuning.report import Ledger, plot_figures
from diffusion.tuning.space import present, read_space, recipe
from diffusion.tuning.storage import answering, is_outage, storage_url
from diffusion.tuning.study import COUNTED, best, enqueue_first, finished, open_study, retry_lost, trials
from diffusion.tuning.trial import REPORTS, Objective, Trainings
from diffusion.tuning.worker import Job, Worker

POLL_SECONDS = 0.25
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
    """Do trials until the study has `tune.trials` of all workers and machines; keep tuning/ up to date.

    `prepare` is called once in each worker and gives what does a trial and returns its value; it must be picklable.

    Raises:
        UserError: the store does not answer, a worker failed, or another trainer is at work here.
        KeyboardInterrupt: it was asked to stop (Ctrl-C, SIGTERM); the trials at work were saved.
    """
    with only_trainer(paths.RUNS / name), StopRequest("make tune") as stop, answering():
        study = open_study(name, params, url)
        if present(params, read_space(params)) is None:
            where = "outside tune.space, or between its steps"
            print(f"tune: what params.yaml has lies {where}: the study does not begin with it", file=sys.stderr)
        enqueue_first(study, params)
        tracker, run_id = _study_run(study, params)
        os.environ.pop("MLFLOW_RUN_ID", None)  # by it `mlflow run` meant the study's run, not the trials'
        tracker.params(flat(params.tune.model_copy(update={"storage": masked(url)}), "tune"))
        job, ledger = Job(name, params, url, run_id, prepare), Ledger(study, params, tracker)
        with runs.closing_status(tracker, "tune"):
            ledger.write()  # another study's may lie there
            try:
                if params.tune.workers == 1:
                    work_here(job, ledger, stop)
                else:
                    work_in_processes(job, ledger, stop)
                wait_for_others(study, stop)
            finally:
                ledger.update()
                ledger.write()
                plot_figures(study)
                tracker.artifact(paths.TUNING, "tuning")
            if not finished(study, params):
                done = f"stopped after {len(trials(study, *COUNTED))} of {params.tune.trials} trials"
                raise KeyboardInterrupt(f"{done}; `make tune` goes on from there")
        hint = "`make tune-apply` takes over the best" if best(study) else "none was complete, trials.csv says why"
        print(f"{len(trials(study, *COUNTED))} trials are done: see {paths.TUNING}/; {hint}")


def _study_run(study: Study, params: Params) -> tuple[Tracker, str | None]:
    """The study's run, and its id if MLflow answers or did: the first machine's. Two that begin at once have two."""
    name, known = study.study_name, study.user_attrs.get("mlflow_run_id")
    tracker = runs.open_run(params.tracking, name=f"tune-{name}", run_folder=paths.RUNS / name, run_id=known)
    if tracker.run_id and not known:
        study.set_user_attr("mlflow_run_id", tracker.run_id)
    return tracker, tracker.run_id or known


def study_name(params: Params, data: str, reference: Reference) -> str:
    """16 hex digits that name all a study's values depend on, code included.

    How they are searched for (trials, workers, sampler, pruner, storage, seed) may change from run to run.
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


def work_here(job: Job, ledger: Ledger, stop: StopRequest) -> None:
    """This process is the only worker."""
    retry_lost(ledger.study)
    if not finished(ledger.study, job.params):
        Worker(job, 0, lambda: stop.asked).work(after=ledger.update)


def work_in_processes(job: Job, ledger: Ledger, stop: StopRequest) -> None:
    """Start `tune.workers` processes and wait for them; those that are killed are replaced."""
    if finished(ledger.study, job.params):
        return
    workers = [_start(job, number) for number in range(job.params.tune.workers)]
    deaths, done, due = 0, 0, 0.0
    told = False
    try:
        while any(process.poll() is None for process in workers):
            time.sleep(POLL_SECONDS)
            if time.monotonic() >= due:
                done, before = look(ledger) or done, done
                deaths = 0 if done > before else deaths
                due = time.monotonic() + LEDGER_SECONDS
            if stop.asked and not told:
                told = True
                _terminate(workers)
            for number, process in enumerate(workers):
                if (
                    stop.asked
                    or process.poll() is None
                    or (process.returncode == 0 and finished(ledger.study, job.params))
                ):
                    continue
                if process.returncode > 0:
                    raise UserError(f"worker {number} failed, see above; `make tune` goes on when that is put right")
                deaths += 1
                if deaths > MAX_DEATHS:
                    raise UserError(f"{deaths} workers were killed one after the other: is there memory enough?")
                how = f"was killed (signal {-process.returncode})" if process.returncode else "was asked to stop"
                print(f"worker {number} {how}; another takes its place", flush=True)
                workers[number] = _start(job, number)
    finally:
        _terminate(workers)  # if this is the second signal, they stop at once
        for process in workers:
            process.wait()


def wait_for_others(study: Study, stop: StopRequest) -> None:
    """Until those RUNNING are finished by other machines, or marked FAIL for want of heartbeats, and no longer."""
    end = time.monotonic() + storage.GRACE_SECONDS + 2 * storage.HEARTBEAT_SECONDS
    told = False
    while not stop.asked:
        retry_lost(study)
        running = len(trials(study, TrialState.RUNNING))
        if not running:
            return
        if time.monotonic() > end:
            print(f"{running} trials are still at work on other machines, which will finish them", flush=True)
            return
        if not told:
            told = True
            print(f"waiting for {running} trials of other machines or of killed workers", flush=True)
        time.sleep(POLL_SECONDS)


def look(ledger: Ledger) -> int:
    """Bring the ledger up to date; the trials that are done, 0 if the store is away: its workers may not notice."""
    try:
        retry_lost(ledger.study)
        ledger.update()
        return len(trials(ledger.study, *COUNTED))
    except Exception as error:
        if not is_outage(error):
            raise
        return 0


def _start(job: Job, number: int) -> "subprocess.Popen[bytes]":
    """A worker process with its share of the cores, in a session of its own: Ctrl-C is this process's to answer."""
    threads = str(max(1, torch.get_num_threads() // job.params.tune.workers))
    environment = {
        **os.environ,
        **own_gpu(number, resolve_device(job.params.train.device)),
        "OMP_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-m", "diffusion.tuning.worker"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True)
    assert process.stdin
    with suppress(BrokenPipeError), process.stdin as pipe:  # its exit status tells
        pipe.write(pickle.dumps((job, number, os.getpid())))
    return process


def own_gpu(number: int, device: torch.device) -> dict[str, str]:
    """CUDA's variable that shows worker `number` one GPU, each worker the next; empty for another `device`."""
    if device.type != "cuda":
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    return {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]}


def _terminate(workers: list["subprocess.Popen[bytes]"]) -> None:
    for process in workers:
        if process.poll() is None:
            process.terminate()
