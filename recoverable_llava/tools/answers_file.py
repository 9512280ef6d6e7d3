"""The file of a batch: one line of JSON per picture, which a stopped run goes on with and no two runs write at once.

Every line says what made it, so that answers of another model or of other settings are never taken for these:

    {"image": "a.png", "question": "…", "answer": "…", …, "picture": "1f3a…", "made_by": {"model": "…", …}}
"""

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from recoverable_llava.tools.asking import read_config


SAMPLE = 1 << 20  # bytes at each end of a file that its fingerprint reads


def fingerprint(paths: Iterable[Path]) -> str:
    """A short digest of files by name, size and both ends: enough to tell versions of a file of any size apart."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLE))
            file.seek(max(size - SAMPLE, 0))
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:16]


def checkpoint_version(repo: str) -> str:
    """What tells a checkpoint from another of the same name: a Hub repo's commit, or a fingerprint of a folder."""
    if not Path(repo).is_dir():
        return read_config(repo)._commit_hash
    kinds = (".json", ".jinja", ".safetensors")
    return fingerprint(sorted(path for path in Path(repo).rglob("*") if path.suffix in kinds and path.is_file()))


class AnswersFile:
    """The answers to one question by one model, as a context: opened, and locked, until the block ends.

    Args:
        path: the file; it and its folder are made where they are missing.
        question: what is asked about every picture. Lines with other questions are left alone.
        made_by: what else decides the answers. "model", the name of the checkpoint, is written but not compared, as
            folders move; its "version" is.

    Raises:
        ValueError: on entering, if another run has the file, it holds something else, or answers to this question that
            something else made.
    """

    def __init__(self, path: Path, question: str, made_by: dict[str, Any]):
        self.path, self.question, self.made_by = path, question, made_by
        self._fingerprints: dict[str, str] = {}  # of the pictures that are answered
        self._open = ExitStack()

    def __enter__(self) -> "AnswersFile":
        with self._open:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock()
            self._read()
            self._lines = self._open.enter_context(self.path.open("a", encoding="utf-8"))
            self._open = self._open.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def __len__(self) -> int:
        return len(self._fingerprints)

    def has(self, name: str, picture: Path) -> bool:
        """Whether the picture has its answer.

        Raises:
            ValueError: if the answer is about another picture of that name.
        """
        if name not in self._fingerprints:
            return False
        if self._fingerprints[name] != fingerprint([picture]):
            raise ValueError(
                f"--output {str(self.path)!r} has an answer about {name!r} as it was before, or from another folder: "
                "name another file."
            )
        return True

    def add(self, name: str, picture: Path, **answer: Any) -> None:
        """Writes a line, whole."""
        line = {"image": name, "question": self.question, **answer}
        line |= {"picture": fingerprint([picture]), "made_by": self.made_by}
        try:
            self._lines.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._lines.flush()
        except OSError as error:  # such as a full disk; it does not name the file
            raise ValueError(f"--output {str(self.path)!r} cannot be written to: {error.strerror}.") from error
        self._fingerprints[name] = line["picture"]

    def _lock(self) -> None:
        path = self.path.resolve()
        lock = path.with_name(f".{path.name}.lock")
        try:
            self._open.enter_context(FileLock(lock, timeout=0))
        except Timeout:
            raise ValueError(
                f"--output {str(self.path)!r} is being written by another run: wait until it is done, or name another "
                "file."
            ) from None
        self._open.callback(self._leave_no_trace, lock)

    def _leave_no_trace(self, lock: Path) -> None:
        """Removes an empty file, and the lock while it is still held: whoever comes later makes a new one."""
        with suppress(OSError):
            if self.path.stat().st_size == 0:
                self.path.unlink()
        with suppress(OSError):  # another system's locks cannot be removed while they are held
            lock.unlink()

    def _read(self) -> None:
        """Takes over the lines of this question; a last line cut off by a stop is removed."""
        if not self.path.exists():
            return
        if not self.path.is_file():
            raise ValueError(f"--output {str(self.path)!r} is no file: name another.")
        content = self.path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in complete.splitlines()]
            mine = [line for line in lines if line["question"] == self.question]
            answered = {line["image"]: line["picture"] for line in mine}
            makers = [line["made_by"] for line in mine]
            differing = [difference for maker in makers if (difference := self._difference(maker))]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f"--output {str(self.path)!r} was not written by this command: name another file."
            ) from None
        if differing:
            raise ValueError(
                f"--output {str(self.path)!r} has answers to this question that were made otherwise ({differing[0]}): "
                "repeat the call that made them, or name another file."
            )
        self._fingerprints = answered
        if complete != content:
            os.truncate(self.path, len(complete))

    def _difference(self, maker: dict[str, Any]) -> str:
        """What differs in who made a line, such as `preset was "paper", is null`; nothing where nothing does."""
        names = [name for name in {**maker, **self.made_by} if name != "model"]
        return ", ".join(
            f"{name} was {json.dumps(maker.get(name))}, is {json.dumps(self.made_by.get(name))}"
            for name in names
            if maker.get(name) != self.made_by.get(name)
        )
