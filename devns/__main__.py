"""The door: everything a user types comes in here."""

# No import before `main` has looked at sys.path, not even of __future__: only what Python itself has loaded by now.
import os
import sys


def main() -> None:
    sys.path[:] = _own_path(sys.path)
    try:
        from devns import cli

        cli.main()
    except KeyboardInterrupt:
        sys.exit(130)


def _own_path(path: list[str]) -> list[str]:
    """`path` without the working directory: a module that stands there is a stranger's, however the entry is written.

    An empty entry of PYTHONPATH, and `python -m` without -P, name it by its absolute path. Where devns itself was
    imported from is kept.
    """
    ours = os.path.realpath(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    try:
        strange = os.path.realpath(os.curdir)
    except OSError:  # removed while we stood in it: nothing can be imported from there
        strange = ""
    real = {entry: os.path.realpath(entry) for entry in path if os.path.isabs(entry)}
    return [entry for entry in path if entry in real and (real[entry] == ours or real[entry] != strange)]


if __name__ == "__main__":
    main()
