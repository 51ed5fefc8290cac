"""Memory, time and size of a report on a generated label set: ``PYTHONPATH=tests python tests/benchmarks/report.py N``.

Two runs of N rows each are generated first (about 2 kB a row on disk, not counted), so that the comparison is in it.
"""

from __future__ import annotations

import contextlib
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from generated_labels import write_run

from pipelines.cli import main as afa


def report(folder: str) -> None:
    """Report, alone in its process; prints JSON."""
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    page = Path(folder) / "report.html"
    with contextlib.redirect_stdout(io.StringIO()):
        status = afa(["report", f"{folder}/labels", "--output", str(page)])
    facts = {
        "status": status,
        "report_s": round(time.monotonic() - started, 1),
        "page_mb": round(page.stat().st_size / 1e6, 2),
        "start_mib": before_kib // 1024,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    print(json.dumps(facts))


def main(rows: int) -> None:
    """Generate, then measure in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        for created, name in ((1e9, "run-00000001"), (1e9 + 5e5, "run-00000002")):
            write_run(Path(folder) / "labels", name, rows, created=created)
        answer = subprocess.run([sys.executable, __file__, folder], capture_output=True, text=True, check=True)
        print(json.dumps({"rows": rows, **json.loads(answer.stdout)}))


if __name__ == "__main__":
    argument = sys.argv[1] if len(sys.argv) > 1 else "1000000"
    if argument.isdecimal():
        main(int(argument))
    else:
        report(argument)
