"""The one version number, which stands in pyproject.toml, and whether another package has taken this one's name."""

import os
import warnings
from importlib import metadata
from pathlib import Path

DISTRIBUTION = "llmcomp-exact"


def find_version(package: Path) -> str:
    """The version of the package in the folder `package`: of the source tree that it lies in, else as installed.

    The source tree first, because another version may be installed beside it.
    """
    project = package.parent / "pyproject.toml"
    if project.is_file():
        lines = project.read_text(encoding="utf-8").splitlines()
        if f'name = "{DISTRIBUTION}"' in lines:
            return next(line for line in lines if line.startswith("version = ")).split('"')[1]
    return metadata.version(DISTRIBUTION)


__version__ = find_version(Path(__file__).parent)


def other_distribution(site: str | os.PathLike[str]) -> str | None:
    """Name and version of the other distribution that installs a package `llmcomp` into the folder `site`, or None.

    The package index has an unrelated library of that name; whichever of the two is installed last overwrites files of
    the first.
    """
    with os.scandir(site) as entries:
        for entry in entries:
            if entry.name.startswith("llmcomp-") and entry.name.endswith(".dist-info"):
                return entry.name.removesuffix(".dist-info").replace("-", " ")
    return None


if _other := other_distribution(Path(__file__).parents[1]):
    warnings.warn(
        f"{_other} is installed beside {DISTRIBUTION} {__version__}, and both bring a package `llmcomp`: "
        f"pip uninstall -y llmcomp {DISTRIBUTION} && pip install {DISTRIBUTION}",
        stacklevel=2,
    )
