"""Command lines of Python in processes that have the slow imports behind them.

A process that starts anew imports torch, diffusers and transformers for seconds, and a test of the command is over in
one. Here a server imports them once, and every command is a fork of it: with arguments, environment, streams and exit
code of its own, its script run as the interpreter runs it. A few tests start interpreter and launchers for real.
"""

import multiprocessing
import multiprocessing.connection
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["diffpref.trainer", "tiny_runs"])


def call(line: list[str], **environment: str) -> subprocess.CompletedProcess:
    """Run `python script …` or `python -m module …` to its end, from the repository's root."""
    return wait(line, [start(line, environment)])


def torchrun(processes: int, line: list[str], **environment: str) -> subprocess.CompletedProcess:
    """The same in processes that find each other, as torchrun starts them; the first that fails ends the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return wait(line, [start(line, environment | place | rank) for rank in ranks])


Started = tuple[multiprocessing.Process, tempfile._TemporaryFileWrapper, tempfile._TemporaryFileWrapper]


def start(line: list[str], environment: dict[str, str]) -> Started:
    """A fork that runs it, and the files of what it says."""
    out, error = tempfile.NamedTemporaryFile("w+"), tempfile.NamedTemporaryFile("w+")
    process = CONTEXT.Process(target=interpret, args=(line, os.environ | environment, out.name, error.name))
    process.start()
    return process, out, error


def wait(line: list[str], started: list[Started]) -> subprocess.CompletedProcess:
    """All of them, to the end."""
    processes = [process for process, _, _ in started]
    while any(process.is_alive() for process in processes):
        multiprocessing.connection.wait([process.sentinel for process in processes if process.is_alive()])
        if any(process.exitcode for process in processes):
            for process in processes:
                process.terminate()
    code = next((process.exitcode for process in processes if process.exitcode), 0)
    said = ("".join(files[which].read() for files in started) for which in (1, 2))
    return subprocess.CompletedProcess(line, code, *said)


def interpret(line: list[str], environment: dict[str, str], out: str, error: str) -> None:
    """In the fork: what `python` does with a command line."""
    for path, descriptor in ((out, 1), (error, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    multiprocessing.set_start_method("fork", force=True)  # of the loader's workers, as in a process of its own
    _, first, *rest = line
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")
