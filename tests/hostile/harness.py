"""Runs many snippets in one child process and tells which raised what, and which killed it.

A snippet that ends the child by a signal is reported as such; a fresh child goes on with the next.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_S = 120  # for one child; no snippet does real work

PRELUDE = """
import json, sys
import mlx.core as mx, numpy as np
mx.set_default_device(mx.cpu)
import mlx_lowbit as lb
from mlx_lowbit import formats, ops
rng = np.random.default_rng(0)
"""

LOOP = """
for line in sys.stdin:
    name, code = json.loads(line)
    print(json.dumps([name, "started", ""]), flush=True)
    try:
        exec(code, dict(globals()))
        verdict = [name, "returned", ""]
    except Exception as error:
        verdict = [name, type(error).__name__, str(error)]
    print(json.dumps(verdict), flush=True)
"""


@dataclass(frozen=True)
class Outcome:
    """`kind` is "returned", the exception's class name, or the signal's name."""

    kind: str
    message: str = ""


def run(
    snippets: dict[str, str], setup: str = "", environment: dict[str, str] | None = None
) -> dict[str, Outcome]:
    """Name to outcome of every snippet, each executed with `setup`'s names."""
    outcomes: dict[str, Outcome] = {}
    while missing := [name for name in snippets if name not in outcomes]:
        child = subprocess.run(
            [sys.executable, "-c", PRELUDE + setup + LOOP],
            input="".join(json.dumps([name, snippets[name]]) + "\n" for name in missing),
            capture_output=True, text=True, timeout=TIMEOUT_S, cwd=Path(__file__).parent,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
        verdicts = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("[")]
        outcomes |= {
            name: Outcome(kind, text) for name, kind, text in verdicts if kind != "started"
        }
        started = [name for name, kind, _ in verdicts if kind == "started" and name not in outcomes]
        if started:
            code = child.returncode
            outcomes[started[0]] = Outcome(
                signal.Signals(-code).name if code < 0 else f"exit {code}", child.stderr[-400:]
            )
        elif not verdicts:
            raise RuntimeError(f"the child did not start: {child.stderr[-2000:]}")
    return outcomes
