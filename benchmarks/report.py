"""What a benchmark ends with: its figures on the screen and, if asked for, in a file."""

import json
from pathlib import Path
from typing import Any


def write_report(report: Any, output: Path | None) -> None:
    """Print `report` as JSON, and write it to `output`, whose folder is made."""
    text = json.dumps(report, indent=2, ensure_ascii=False)
    print(text)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n", encoding="utf-8")
