"""The processor and the commit of the code, which the reports of both frameworks name."""

import platform
import subprocess
from pathlib import Path


def processor() -> str:
    """Name of the processor as the operating system gives it; "cpu" if it gives none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "cpu"


def revision() -> str:
    """The commit of the code, with "+" if tracked files have changed; "unknown" outside git."""

    def git(*arguments):
        command = ["git", *arguments]
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # a package may lie in another repository
        return git("describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
