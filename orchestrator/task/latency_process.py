"""The measuring process: a child that measures latencies one after another and does nothing else.

It lives as long as latency tasks of one model on one device follow each other, as importing torch
and loading a model take longer than many a measurement. Requests and answers are lines of JSON. It
ends by itself when whoever started it is gone. No torch on the asking side.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from dipgo_core import errors
from dipgo_core.errors import DipgoError, TaskError
from orchestrator.records import Task
from orchestrator.secrets import redact_logs

_ROOT = Path(__file__).parents[2]  # holds the packages, installed or not
_STOP_SECONDS = 10.0
_ATTENTION = "DIFFUSERS_ATTN_BACKEND"  # diffusers' default is what a latency is keyed on
_SHOWN_LINES = 12

_current: MeasuringProcess | None = None


def measured_apart(task: Task, store_url: str) -> Mapping[str, Any]:
    """Return the outputs of a latency task, measured in the measuring process.

    Raises:
        DipgoError: it cannot be measured; the message says why.
        TaskError: the measuring process died.
    """
    return _serving(task).ask({"task": task.to_json(), "store": store_url, "parent": os.getpid()})


def stop_measuring() -> None:
    """End the measuring process, if there is one: another kind of work begins, or none."""
    global _current
    if _current is not None:
        _current.stop()
        _current = None


atexit.register(stop_measuring)


def _serving(task: Task) -> MeasuringProcess:
    """Return the process that serves this model and device, a new one if need be."""
    global _current
    serves = f"{task.affinity} {task.inputs['device']}"
    if _current is None or _current.serves != serves or not _current.alive:
        stop_measuring()
        _current = MeasuringProcess(serves)
    return _current


class MeasuringProcess:
    """One child process. serves: the model and device whose latencies it measures."""

    def __init__(self, serves: str) -> None:
        self.serves = serves
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `stop`
        self._process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.task.latency_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=_environment(),
            process_group=0,  # Ctrl-C is for the one who asks
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Send a request and wait for its answer; whatever breaks it off ends the process.

        Raises:
            DipgoError: as the process raised it.
            TaskError: the process died, or failed in a way nobody foresaw.
        """
        try:
            answer = self._exchange(json.dumps(request))
        except BaseException:
            self.stop()
            raise
        if "error" in answer:
            kind = getattr(errors, answer["error"], None)
            known = isinstance(kind, type) and issubclass(kind, DipgoError)
            raise (
                kind(answer["message"])
                if known and kind
                else TaskError(f"{answer['error']}: {answer['message']}")
            )
        outputs: Mapping[str, Any] = answer["outputs"]
        return outputs

    def _exchange(self, line: str) -> Mapping[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise TaskError(self._death())
        found: Mapping[str, Any] = json.loads(answer)
        return found

    def _death(self) -> str:
        code = self._process.wait(_STOP_SECONDS)
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()[-_SHOWN_LINES:]
        said = "\n".join(lines) or "it said nothing"
        return f"the measuring process ended {how} (out of memory?); run again. It said:\n{said}"

    def stop(self) -> None:
        """End the process and wait for it; a second call does nothing."""
        assert self._process.stdin is not None and self._process.stdout is not None
        if self.alive:
            self._process.kill()  # it holds nothing that needs saving
        self._process.wait()
        for stream in (self._process.stdout, self._log):
            stream.close()
        with contextlib.suppress(BrokenPipeError):  # a request that it did not live to read
            self._process.stdin.close()


def _environment() -> dict[str, str]:
    """Return this process's environment, without what would choose another way to compute."""
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    kept = {name: value for name, value in os.environ.items() if name != _ATTENTION}
    return {**kept, "PYTHONPATH": path}


# in the child -------------------------------------------------------------------------------------


def serve() -> None:
    """Answer requests until whoever started this process closes the line or is gone."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    redact_logs()
    requests = queue.SimpleQueue[str]()
    threading.Thread(target=_listen, args=(sys.stdin, requests), daemon=True).start()
    while True:
        answer = _answer(json.loads(requests.get()))
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _listen(lines: TextIO, requests: queue.SimpleQueue[str]) -> None:
    """Pass requests on; leave at once when there can be no more, even amid a measurement."""
    for line in lines:
        requests.put(line)
    os._exit(0)


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    task, store = Task.from_json(request["task"]), request["store"]
    from orchestrator.store import open_store
    from orchestrator.task.latency import measure
    from orchestrator.task.work import Work

    try:
        work = Work(task, open_store(store), lambda report: None)
        return {"outputs": measure(work, int(request["parent"]))}
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}


if __name__ == "__main__":
    serve()
