"""Writes the package in the layout of Hugging Face's kernel hub: a universal kernel, Triton alone, nothing to compile.

    python kernels/hub_layout.py OUT    # OUT/build.toml, OUT/torch-ext/..., OUT/build/torch-universal/...

A hub kernel is loaded from any folder under any name, and several versions of it in one process. So imports become
relative, and the operators' namespace gets the digest of the sources. `kernels.get_local_kernel(OUT, "laver_kernels")`
loads what this writes; transformers takes a hub kernel's functions by its repository's name.
"""

import argparse
import hashlib
import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = "laver_kernels"
IMPORT = re.compile(rf"^(\s*)from {PACKAGE}(\.[\w.]+)? import ", re.MULTILINE)
LAYOUTS = (f"torch-ext/{PACKAGE}", f"build/torch-universal/{PACKAGE}")


def relocatable(source: str, depth: int, namespace: str) -> str:
    """A module's source with relative imports; `depth` are the packages between it and the top one."""

    def relative(found: re.Match) -> str:
        return f"{found[1]}from {'.' * (depth + 1)}{(found[2] or '')[1:]} import "

    return IMPORT.sub(relative, source).replace(f'"{PACKAGE}::', f'"{namespace}::')


def write(folder: Path) -> None:
    """The layout in `folder`, replacing what stands there of it."""
    modules = sorted((HERE / PACKAGE).rglob("*.py"))
    digest = hashlib.sha256(b"".join(module.read_bytes() for module in modules)).hexdigest()[:12]
    for layout in LAYOUTS:
        shutil.rmtree(folder / layout, ignore_errors=True)
        for module in modules:
            place = module.relative_to(HERE / PACKAGE)
            target = folder / layout / place
            target.parent.mkdir(parents=True, exist_ok=True)
            text = relocatable(module.read_text(), len(place.parts) - 1, f"{PACKAGE}_{digest}")
            target.write_text(text)
        shutil.copy(HERE / PACKAGE / "py.typed", folder / layout)
    for name in ("build.toml", "README.md", "API.md"):
        shutil.copy(HERE / name, folder / name)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the layout is written")
    arguments = parser.parse_args(argv)
    write(arguments.folder)
    print(f"wrote {', '.join(str(arguments.folder / layout) for layout in LAYOUTS)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
