"""The console script `ssd`: `ssd train ..` is `python -m ssd.train ..`."""

from __future__ import annotations

import runpy
import sys

import ssd

COMMANDS = ("train", "sweep", "reproduce", "peers", "embed", "compare")
USAGE = f"usage: ssd {{{','.join(COMMANDS)}}} [options]; ssd COMMAND --help tells more"


def main() -> int:
    """Runs the command that the first argument names."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "--version"):
        print(ssd.__version__ if name == "--version" else USAGE)
        return 0
    if name not in COMMANDS:
        print(f"error: {name} is no command; {USAGE}", file=sys.stderr)
        return 2
    sys.argv = [f"ssd {name}", *rest]
    ssd.guard_imports(f"ssd.{name}")
    runpy.run_module(f"ssd.{name}", run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
