"""init: the first .devns.toml of a project."""

from __future__ import annotations

import os

from devns import template
from devns.errors import TemplateError
from devns.workflow import Bench

_FILE = """\
extends = "{extends}"

[root]
packages = []
"""


def init(extends: str, bench: Bench) -> str:
    """Write the smallest useful project file in the working directory and return its path. Nothing is overwritten."""
    template.load(extends, bench.host)
    path = os.path.join(bench.host.cwd, template.FILE)
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(_FILE.format(extends=extends))
    except FileExistsError:
        raise TemplateError(f"{path}: is there already", hint="edit it, or remove it first") from None
    except OSError as error:
        raise TemplateError(f"{path}: cannot be written: {(error.strerror or '').lower()}") from None
    return path
