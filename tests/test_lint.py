"""Lint, format and types, as tests: one command, one report. Their settings are in pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def test_ruff_finds_nothing() -> None:
    run("ruff", "check", "--no-cache", "--output-format=concise", "--quiet")


def test_ruff_would_format_nothing() -> None:
    run("ruff", "format", "--no-cache", "--check", "--diff", "--quiet")


def test_mypy_finds_nothing() -> None:
    run("mypy", "--no-error-summary")


def test_the_ci_script_is_one_that_bash_can_read() -> None:
    report(["bash", "-n", ".ci/run"])


def run(module: str, *arguments: str) -> None:
    report([sys.executable, "-m", module, *arguments])


def report(command: list[str]) -> None:
    result = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0:
        pytest.fail(f"{' '.join(command)}\n{result.stdout}", pytrace=False)
