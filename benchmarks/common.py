"""What all result scripts share: a heading with date, machine and commit, and writing JSON and Markdown."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from consilience import __version__
from consilience.core.params import write_bytes, write_json

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Date, machine, commit and versions."""
    try:
        git = ["git", "-C", str(Path(__file__).parent)]
        commit = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "--", "../src"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        commit, dirty = "unknown", ""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "commit": commit + (" with uncommitted changes" if dirty else ""),
        "torch": torch.__version__,
        "consilience": __version__,
    }


def save(name: str, about: str | None, facts: Mapping[str, Any], table: str) -> None:
    """Write results/<name>.json and .md, and print the table."""
    heading = machine()
    write_json(RESULTS / f"{name}.json", {**heading, **facts})
    top = "\n".join(f"- {k}: {v}" for k, v in heading.items())
    write_bytes(RESULTS / f"{name}.md", f"# {name}\n\n{(about or '').strip()}\n\n{top}\n\n{table}\n".encode())
    print(table)
