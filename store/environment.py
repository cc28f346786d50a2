"""What libraries and child processes are told before they start: libraries read it when they are imported, or never.

Importing any package of ours imports this module first. What the user has set stays.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from pathlib import Path

log = logging.getLogger("penult.store")

# From 1.29 on ONNX Runtime reports to its vendor: as soon as it is imported it looks a host up, and writes a device id and a
# database of events into the home folder. It takes 1, true, yes, on or y; its function that switches events off comes too late.
NO_REPORTS = "ORT_DISABLE_TELEMETRY"
if "onnxruntime" in sys.modules and NO_REPORTS not in os.environ:
    log.warning(
        "onnxruntime was imported before penult. From its release 1.29 on it reports to its vendor, and in this process that "
        "cannot be switched off any more: set %s=1 in the environment, or import penult's packages first",
        NO_REPORTS,
    )
os.environ.setdefault(NO_REPORTS, "1")

# A file may name a filter, and HDF5 would load the shared library that implements it. "::" switches that off.
os.environ.setdefault("HDF5_PLUGIN_PRELOAD", "::")


def cache_folder() -> Path:
    """Our one folder below the home folder: ``PENULT_CACHE``, or else ``penult`` in ``XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        RuntimeError: there is no home folder.
    """
    chosen = os.environ.get("PENULT_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "penult"


def redirect_matplotlib() -> None:
    """In a process of our own, before matplotlib is imported: its list of fonts goes into our folder, not into two of its own.

    Our plots need no font but the one that it brings, so it need not ask fontconfig, which keeps files in the home folder too.
    A matplotlib that its user has configured is left as it is.
    """
    with contextlib.suppress(RuntimeError):  # no home folder, so nothing is written there
        folders = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config", "matplotlib"), Path.home() / ".matplotlib"
        configured = any(os.access(folder / "matplotlibrc", os.R_OK) for folder in (Path(), *folders))
        if configured or os.environ.get("MATPLOTLIBRC") or os.environ.get("MPLCONFIGDIR"):
            return
        os.environ["MPLCONFIGDIR"] = str(cache_folder() / "matplotlib")
        os.environ.setdefault("MPL_IGNORE_SYSTEM_FONTS", "1")
    # Where it cannot write it takes a temporary folder and warns that it is slow: without the list, by a tenth of a second.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)


def python(code: str, *arguments: object) -> list[str]:
    """A command that runs ``code`` in a Python of its own; ``sys.argv[1:]`` there are the arguments, as text.

    Nothing in the folder that it is started in, and no module beside a script, can take the place of one of ours.
    """
    start = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    return [sys.executable, "-P", "-c", start + code, json.dumps(sys.path), *map(str, arguments)]
