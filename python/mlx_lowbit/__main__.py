"""``python -m mlx_lowbit COMMAND``: the same as the script ``mlx_lowbit.COMMAND``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = ("convert", "demo", "describe", "doctor", "generate", "transcribe")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the first argument names; returns its exit status."""
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if name not in COMMANDS:
        asked = name in ("-h", "--help")
        print(
            f"usage: python -m mlx_lowbit COMMAND [OPTION]...   (COMMAND: {', '.join(COMMANDS)})",
            file=sys.stdout if asked else sys.stderr,
        )
        return 0 if asked else 2
    return importlib.import_module(f"mlx_lowbit.{name}").main(rest)


if __name__ == "__main__":
    raise SystemExit(main())
