"""The one version number, which stands in pyproject.toml, and whether another package has taken this one's name."""

import os
import warnings
from importlib import metadata
from pathlib import Path

DISTRIBUTION = "llmcomp-exact"
__version__ = metadata.version(DISTRIBUTION)


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
