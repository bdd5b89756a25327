"""A line on stderr: pass, batch, examples a second, time left. Redrawn on a terminal, now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Optional

MODES = ("auto", "plain", "none")


class Progress:
    """`steps`: batches of one pass, where that is known."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.terminal = mode == "auto" and sys.stderr.isatty()
        self.passes = 1
        self.steps: Optional[int] = None
        self.began = self.shown = time.monotonic()
        self.steps_done = 0

    def begin(self, passes: int, steps: Optional[int]) -> None:
        self.passes, self.steps = passes, steps
        self.began = self.shown = time.monotonic()
        self.steps_done = 0

    def step(self, at_pass: int, step: int, examples: int) -> None:
        self.steps_done += 1
        if self.mode == "none":
            return
        now = time.monotonic()
        if now - self.shown < (0.2 if self.terminal else 10.0):
            return
        self.shown = now
        elapsed = now - self.began
        of = "" if self.steps is None else f"/{self.steps}"
        left = ""
        if self.steps is not None:
            remaining = self.steps * self.passes - self.steps_done
            left = f", {remaining * elapsed / self.steps_done:.0f} s left"
        self._show(f"pass {at_pass + 1}/{self.passes}, batch {step}{of}, {examples} examples, {elapsed:.0f} s{left}")

    def say(self, text: str) -> None:
        if self.mode != "none":
            self._clear()
            print(f"mats-stream-collect: {text}", file=sys.stderr)

    def _show(self, text: str) -> None:
        if self.terminal:
            sys.stderr.write("\r\x1b[K" + text)
            sys.stderr.flush()
        else:
            print(f"mats-stream-collect: {text}", file=sys.stderr)

    def _clear(self) -> None:
        if self.terminal:
            sys.stderr.write("\r\x1b[K")

    def end(self) -> None:
        self._clear()
