"""Kills processes that enrol and delete under load, again and again, and looks whether anything acknowledged was lost.

Run as: python tests/soak/store_crash.py --rounds 50 --processes 2

Each round starts processes on one store; each enrols subjects of three templates from three threads and deletes every
fourth, telling this process what was acknowledged. Then they are killed (SIGKILL) at a random moment. What must hold
afterwards: every acknowledged subject is there with the very vectors, none with fewer than three; no acknowledged
deletion has come back; audit chain, keys, counters and index are whole (SqliteStore.verify).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pkd.serving.galleries.crypto import MasterKey
from pkd.serving.galleries.sqlite.store import SqliteStore
from pkd.serving.galleries.store import Enrolled, Enrolment, NewTemplate, Space

DIM, THREADS, TEMPLATES = 64, 3, 3
SPACE = Space("space@sha256:0", DIM)
MASTER = MasterKey(bytes(32))


def main() -> int:
    """Run the rounds and print what was seen as JSON; 1 where something was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=int(os.environ.get("PKD_SOAK_ROUNDS", "50")))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "FIRST"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        work(Path(args.child[0]), int(args.child[1]))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        seen = crash(Path(folder), args.rounds, args.processes, args.seed)
    print(json.dumps(seen, indent=2))
    return 1 if seen["wrong"] else 0


def crash(folder: Path, rounds: int, processes: int, seed: int) -> dict[str, object]:
    """All rounds on one store in ``folder``; ``wrong`` lists what should not be."""
    chance, enrolled, deleted, unsure, wrong = random.Random(seed), set[int](), set[int](), set[int](), list[str]()
    with closing(SqliteStore(folder, MASTER)) as store:
        store.create("staff", SPACE, None, "soak")
    for number in range(rounds):
        running = []
        for process in range(processes):
            first = (number * processes + process + 1) * 10**6
            command = [sys.executable, __file__, "--child", str(folder), str(first)]
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        for child in running:
            assert child.stdout
            assert child.stdout.readline() == b"ready\n"
        time.sleep(chance.uniform(0.05, 0.5))
        for child in running:
            child.send_signal(signal.SIGKILL)
        for child in running:
            said, _ = child.communicate()
            for line in said.decode().splitlines(keepends=True):
                if line.endswith("\n"):  # the last one may be cut off
                    what, subject = line.split()
                    {"enrolled": enrolled, "deleting": unsure, "deleted": deleted}[what].add(int(subject))
        wrong += [f"round {number}: {line}" for line in lost(folder, enrolled, deleted, unsure)]
    return {
        "rounds": rounds,
        "kills": rounds * processes,
        "enrolled": len(enrolled),
        "deleted": len(deleted),
        "wrong": wrong,
    }


def lost(folder: Path, enrolled: set[int], deleted: set[int], unsure: set[int]) -> list[str]:
    """List what is not as it was acknowledged. ``unsure``: a deletion was begun."""
    there = set()
    with closing(SqliteStore(folder, MASTER)) as store:
        wrong = store.verify().wrong
        for subject in store.export("staff"):
            there.add(int(subject.id))
            held = np.stack([one.vector for one in subject.templates if one.vector is not None])
            if held.shape != (TEMPLATES, DIM) or not np.array_equal(held, vectors(int(subject.id))):
                wrong.append(f"subject {subject.id} is not as it was enrolled")
    wrong += [f"subject {subject} was enrolled and is lost" for subject in sorted(enrolled - unsure - there)]
    wrong += [f"subject {subject} was deleted and is back" for subject in sorted(deleted & there)]
    return wrong


def work(folder: Path, first: int) -> None:
    """Enrol and delete without end, telling what was acknowledged."""
    store = SqliteStore(folder, MASTER)

    def enrol(thread: int) -> None:
        for number in range(first + thread, first + 10**6, THREADS):
            templates = [NewTemplate(f"encoder@sha256:{i}", SPACE.id, row) for i, row in enumerate(vectors(number))]
            (answer,) = store.enrol("staff", [Enrolment(str(number), templates)], "soak")
            assert isinstance(answer, Enrolled)
            say("enrolled", number)
            if number % 4 == 0:
                say("deleting", number)
                store.delete_subject("staff", str(number), "soak")
                say("deleted", number)

    threads = [threading.Thread(target=enrol, args=(i,)) for i in range(THREADS)]
    os.write(1, b"ready\n")
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def say(what: str, number: int) -> None:
    """One line in one write, which a kill cannot take back."""
    os.write(1, f"{what} {number}\n".encode())


def vectors(number: int) -> NDArray[np.float32]:
    """Return the subject's templates, exact in float16."""
    rows = np.random.default_rng(number).standard_normal((TEMPLATES, DIM))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float16).astype(np.float32)


if __name__ == "__main__":
    raise SystemExit(main())
