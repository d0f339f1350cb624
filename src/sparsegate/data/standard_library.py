"""A corpus that every Python installation carries: the sources of its standard library."""

import sysconfig
from pathlib import Path

# Tests and their data, generated tables, bundled third-party wheels, demos, and what only few installations
# have.
_LEFT_OUT = frozenset(
    {
        "test",
        "tests",
        "idle_test",
        "encodings",
        "ensurepip",
        "turtledemo",
        "site-packages",
        "__pycache__",
        "lib-dynload",
    }
)


def standard_library_files() -> list[Path]:
    """The ``.py`` files of the running interpreter's standard library, sorted.

    Left out: tests, the generated tables of `encodings` and ``_sysconfigdata*``, the topics of `pydoc_data`,
    demos, installed packages, and empty files. FileNotFoundError if the installation has no sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        file for file in root.rglob("*.py") if _is_source(file.relative_to(root)) and file.stat().st_size
    )
    if not files:
        raise FileNotFoundError(
            f"{root}: no sources of the standard library; install Python with them, or use other text"
        )
    return files


def _is_source(file: Path) -> bool:
    generated = file.name.startswith("_sysconfigdata") or file.parts[0] in ("pydoc_data", "lib2to3")
    return not generated and _LEFT_OUT.isdisjoint(file.parts)
