"""The door: everything a user types comes in here."""

from __future__ import annotations

import sys


def main() -> None:
    # What stands in the working directory is a stranger's: never a module of ours. `python -m devns` puts it first.
    sys.path[:] = [entry for entry in sys.path if entry not in ("", ".")]
    from devns import cli

    cli.main()


if __name__ == "__main__":
    main()
