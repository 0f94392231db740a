"""The picture of a terminal in the documentation: runs the real commands and draws what they print.

    python scripts/terminal_svg.py [--out docs/terminal.svg]

It plans, quantizes and evaluates examples/tiny-llama in small (16 calibration windows, 8 evaluation
windows) and records standard output with its colours. Progress bars and notes go to standard error
and are not in the picture. Nothing is edited: another machine, or another version, gives another
picture. Takes one to two minutes on two cores. The model is in out/terminal afterwards.

The SVG names the fonts of the reader's system and loads nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = 120
MODEL, RESULT = "examples/tiny-llama", "out/terminal"
COMMANDS = (
    f"llmquant plan {MODEL} --recipe gptq-w4g128",
    f"llmquant quantize {MODEL} -o {RESULT} --recipe gptq-w4g128 \\\n"
    f"    --calibration file:{MODEL}/calibration.txt --nsamples 16 --seqlen 512",
    f"llmquant eval {RESULT} --reference {MODEL} --text file:{MODEL}/heldout.txt \\\n"
    "    --window 512 --max-windows 8 --no-cost",
)


def printed(command: str) -> str:
    """Standard output of a command line that begins with ``llmquant``, with ANSI colours."""
    _, *arguments = shlex.split(command.replace("\\\n", " "))
    environment = os.environ | {"FORCE_COLOR": "1", "COLUMNS": str(COLUMNS)}
    run = [sys.executable, "-m", "llmquant", *arguments]
    done = subprocess.run(
        run, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{command}\nended with {done.returncode}:\n{done.stderr}")
    return done.stdout


def drawn(outputs: list[tuple[str, str]]) -> str:
    """The SVG of commands and what they printed."""
    with Path(os.devnull).open("w") as nowhere:
        console = Console(
            record=True, width=COLUMNS, file=nowhere, color_system="truecolor", force_terminal=True
        )
        for command, output in outputs:
            console.print(Text("$ ", style="bold green").append(command, style="bold white"))
            console.print(Text.from_ansi(output.rstrip("\n")), soft_wrap=True)
            console.print()
        picture = console.export_svg(title="llmquant", unique_id="terminal")
    # Rich's template fetches Fira Code from a CDN; the reader's own monospace will do.
    return re.sub(r"\s*@font-face \{.*?\}", "", picture, flags=re.DOTALL)


def main() -> None:
    """Run the commands in turn, then write the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "terminal.svg")
    out: Path = parser.parse_args().out
    shutil.rmtree(ROOT / RESULT, ignore_errors=True)
    picture = drawn([(command, printed(command)) for command in COMMANDS])
    out.write_text(
        "\n".join(line.rstrip() for line in picture.splitlines()) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
