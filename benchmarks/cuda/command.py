"""What the commands here have in common: their options, and the files that they write."""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.files import write_json

from . import peers

MEASURED = ["affine4_g64", "affine3_g64", "affine8_g64", "mxfp8", "nvfp4"]


def parser(doc: str) -> argparse.ArgumentParser:
    """With ``--library``, ``--formats`` and ``--json``; ``doc``: the module's, whose first line
    says what the command does."""
    options = argparse.ArgumentParser(description=doc.partition("\n")[0])
    options.add_argument("--library", type=Path, required=True)
    options.add_argument("--formats", nargs="+", default=MEASURED)
    options.add_argument("--json", type=Path, help="also write the rows there")
    return options


def write(path: Path | None, rows: list[dict[str, Any]], method: str) -> None:
    """``rows``, and what they were measured with and how; nothing without a ``path``."""
    if path is None:
        return
    about = {
        "device": torch.cuda.get_device_name(0),
        "date": datetime.date.today().isoformat(),
        "versions": peers.versions(),
        "cuda": torch.version.cuda,
        "method": method,
    }
    write_json(path, {"about": about, "rows": rows})
