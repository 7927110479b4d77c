"""`make sync`: send MLflow what it lacks of every journal below runs/, as after an outage or on a plane."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffusion.tracking.journal import Event, Sitting, mark_sent, remember, remembered, unsent
from diffusion.tracking.mlflow_store import enter, has_run, is_alive
from diffusion.tracking.mlflow_tracker import MlflowTracker
from diffusion.tracking.mlflow_writer import Register, RunWriter


def sync(path: Path, client: Any, register: Register) -> str:
    """Send MLflow what it lacks of a journal: in words what was done, or why it was not.

    Sittings that wrote to no run share the run of the others, or a new one. `register` writes models.
    """
    sittings = unsent(path)
    if not sittings:
        return "up to date"
    last = sittings[-1]
    if is_alive(last.opened.data["tags"]) and not any(event.kind == "close" for event in last.events):
        return "in use: its process sends it"
    shared, sent, refused = _shared_run(sittings, path, client), 0, 0
    for run_id in dict.fromkeys(sitting.run_id or shared for sitting in sittings):
        if not has_run(client, run_id):
            return f"not sent: this store has no run {run_id} (is MLFLOW_TRACKING_URI set?)"
        mirror = MlflowTracker(RunWriter(client, run_id, register), path, patient=True)
        _replay([sitting for sitting in sittings if (sitting.run_id or shared) == run_id], mirror)
        mirror.finish()
        if mirror.pending:
            return f"stopped: {mirror.pending} events wait for MLflow"
        sent, refused = sent + mirror.sent, refused + mirror.refused
    if not sent:
        return "not sent: MLflow refuses every event"
    mark_sent(path, last.events[-1].seq if last.events else last.opened.seq)
    count = sum(len(sitting.events) for sitting in sittings) - refused
    return f"sent {count} events" + (f", {refused} were refused" if refused else "")


def _replay(sittings: Iterable[Sitting], mirror: MlflowTracker) -> None:
    for sitting in sittings:
        if not sitting.run_id:  # nobody has told MLflow
            mirror.record(Event("tags", sitting.opened.data["tags"], sitting.opened.time), replayed=True)
        for event in sitting.events:
            mirror.record(event, replayed=True)
        if not any(event.kind == "close" for event in sitting.events):
            end = [sitting.opened, *sitting.events][-1].time
            mirror.record(Event("close", {"status": "KILLED", "message": ""}, end))


def _shared_run(sittings: list[Sitting], path: Path, client: Any) -> str:
    """The run of the sittings that wrote to none, made if there is none; empty if all have one."""
    homeless = [sitting.opened.data for sitting in sittings if not sitting.run_id]
    if not homeless:
        return ""
    found = remembered(path)
    if not found:
        first = homeless[0]
        found = enter(client, first["experiment"], first["asked_run_id"], first["name"], first["tags"])
        remember(path, found)
    return found
