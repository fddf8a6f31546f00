"""From sets of pairs to a file of states, one set at a time.

What is made lies in `OUT.unfinished/` beside the target, a file of the same kind for each set, until all of it is put
together. So a run that is killed loses at most the user it was at; and one with more users or more sets goes on from a
finished file.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from diffpref.cache.fingerprint import fingerprint
from diffpref.scoring.folders import UNFINISHED
from diffpref.scoring.unfinished import locked
from diffpref.synpic.files import sweep
from diffpref.users.vlm.describer import Describer
from diffpref.users.vlm.pairs import Asked, Chunk, row_digest, shown, some
from diffpref.users.vlm.states import Entry, Pair, States, write_states

MUST_AGREE = ("id", "pairs", "seed")  # of the facts; the others only explain an id
Set = tuple[str, int]  # user, and number of a set of theirs


class Made:
    """What is made so far. A context: one process has it.

    Args:
        out: The file it will be.
        facts: How it is made. What is there must be made alike.
        fresh: Whatever is there is not looked at.

    Raises:
        ValueError: What is there was made in another way, is damaged, or another process is at it.
    """

    def __init__(self, out: Path, facts: dict[str, Any], fresh: bool = False):
        self.out, self.facts, self.new = out, facts, 0
        self.folder = out.with_name(out.name + UNFINISHED)
        self.entries: dict[Set, Entry] = {}
        self.files: dict[Set, tuple[Path, int]] = {}
        self.lock = locked(self.folder)
        try:
            self.begin(fresh)
        except BaseException:
            self.close()
            raise

    def begin(self, fresh: bool) -> None:
        """Look at what is there."""
        sweep(self.out)
        if fresh:
            self.clear()
        for path in [self.out] * (self.out.exists() and not fresh) + self.parts():
            there = States(path)
            self.agree(there)
            for place, entry in enumerate(there.entries):
                self.note(entry, path, place)

    def agree(self, there: States) -> None:
        """Raise ValueError for a file that was made in another way."""
        other = [name for name in self.facts if there.facts.get(name) != self.facts[name]]
        if set(other) & set(MUST_AGREE):
            said = ", ".join(f"{name} {there.facts.get(name)}" for name in other if name != "id" or len(other) == 1)
            raise ValueError(f"{there.path} was made in another way ({said}); --overwrite begins anew")

    def note(self, entry: Entry, path: Path, place: int) -> None:
        """Where an entry lies; one that was there for the same set is forgotten."""
        self.entries[entry.user, entry.number] = entry
        self.files[entry.user, entry.number] = path, place

    def has(self, chunk: Chunk, digests: Sequence[str]) -> bool:
        """Whether there are states of these very pairs."""
        entry = self.entries.get((chunk.user, chunk.number))
        return entry is not None and entry.digests == tuple(digests)

    def add(self, entry: Entry, states: Tensor) -> None:
        """Write one more, [L,U]."""
        path = self.folder / f"{fingerprint(entry.user, entry.number)}.safetensors"
        write_states(path, self.facts, [entry], [states])
        self.note(entry, path, 0)
        self.new += 1

    def finish(self, asked: Sequence[Set]) -> None:
        """All in one file, sorted by user. Of the users that were asked for now, sets of an earlier run that share a
        pair with one of now are left out: a user's sets have no pair in common."""
        if self.parts():
            kept = sorted(self.apart(asked))
            write_states(self.out, self.facts, [self.entries[one] for one in kept], list(self.states(kept)))
        self.clear()

    def apart(self, asked: Sequence[Set]) -> Iterator[Set]:
        """The sets that were asked for, and those that share no pair with them."""
        taken = {(user, digest) for user, n in asked if (user, n) in self.entries for digest in self.digests(user, n)}
        for user, number in self.entries:
            others = {(user, digest) for digest in self.digests(user, number)}
            if (user, number) in asked or not others & taken:
                yield user, number

    def digests(self, user: str, number: int) -> tuple[str, ...]:
        """Of the pairs of a set."""
        return self.entries[user, number].digests

    def states(self, sets: Sequence[Set]) -> Iterator[Tensor]:
        """Of each, [L,U]; a file is open only while it is read."""
        whole = States(self.out) if any(self.files[one][0] == self.out for one in sets) else None
        for one in sets:
            path, place = self.files[one]
            yield (whole if whole and path == self.out else States(path)).state(place)

    def parts(self) -> list[Path]:
        """The files in the folder."""
        return sorted(self.folder.glob("[0-9a-f]*.safetensors"))

    def clear(self) -> None:
        """Nothing is left in the folder, nor of what a killed process was writing."""
        for path in [*self.parts(), *self.folder.glob(".*.tmp")]:
            path.unlink()

    def close(self) -> None:
        """Let another process have it; an empty folder goes."""
        if not any(self.folder.iterdir()):
            self.folder.rmdir()
        os.close(self.lock)

    def __enter__(self) -> "Made":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind and (kept := len(self.parts())):
            print(f"{kept} sets are kept in {self.folder}; the same command goes on from there")
        self.close()


@dataclass
class Outcome:
    """there: sets that were made before.  faults: why sets were not made."""

    there: int = 0
    faults: list[str] = field(default_factory=list)


def describe_all(asked: Asked, describer: Describer, made: Made, data: str) -> Outcome:
    """Show each set to the model and keep what it makes of it. A set that cannot be shown is named, and left out."""
    outcome = Outcome()
    with tqdm(asked.chunks, "describing", unit="set") as bar:
        for chunk in bar:
            try:
                outcome.there += not describe(asked, chunk, describer, made, data)
            except Unshowable as error:
                outcome.faults.append(f"{chunk.user}: {error}")
                bar.write(f"left out: {outcome.faults[-1]}")
    return outcome


class Unshowable(ValueError):
    """A set of pairs that the model cannot be shown."""


def describe(asked: Asked, chunk: Chunk, describer: Describer, made: Made, data: str) -> bool:
    """One set; whether it was not there yet. Raises Unshowable for a broken picture, and for more than the model
    reads."""
    try:
        digests = asked.read(chunk, row_digest)
        if made.has(chunk, digests):
            return False
        pairs = asked.read(chunk, shown)
        inputs = describer.inputs(pairs)
    except (ValueError, OSError) as error:
        raise Unshowable(str(error)) from error
    answer = describer(inputs)
    told = [Pair(*one) for one in zip(chunk.rows, [pair.caption for pair in pairs], digests, strict=True)]
    made.add(Entry(chunk.user, chunk.number, data, tuple(told), answer.text), answer.states)
    return True


def summary(made: Made, outcome: Outcome) -> list[str]:
    """What a run came to, in lines. Raises ValueError where nothing is there."""
    if not made.entries:
        raise ValueError(f"no set of pairs could be shown: {some(outcome.faults)}")
    there = States(made.out)
    shape = f"{len(there.entries)} sets of {len(there.users)} users, states {there.length} x {there.width}"
    left = [f"left out: {len(outcome.faults)} sets that cannot be shown: {some(outcome.faults)}"]
    done = [f"described {made.new} sets, {outcome.there} were there", f"written to {made.out}: {shape}, of {there.id}"]
    return left * bool(outcome.faults) + done
