"""Environment variables for libraries and child processes, set before those libraries are imported.

Importing any of penult's packages imports this module first. Variables that the user has set stay.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
from pathlib import Path

log = logging.getLogger("penult.store")

# From 1.29 on ONNX Runtime reports to its vendor: on import it looks up a host, and writes a device id and a database of
# events into the home folder. The variable accepts 1, true, yes, on or y; the function that switches events off comes too late.
NO_REPORTS = "ORT_DISABLE_TELEMETRY"
if "onnxruntime" in sys.modules and NO_REPORTS not in os.environ:
    log.warning(
        "onnxruntime was imported before penult. From release 1.29 on it reports to its vendor, and this process can no longer "
        "switch that off: set %s=1 in the environment, or import penult's packages first",
        NO_REPORTS,
    )
os.environ.setdefault(NO_REPORTS, "1")

# A file may name a filter, and HDF5 would load the shared library that implements it. "::" switches that off.
os.environ.setdefault("HDF5_PLUGIN_PRELOAD", "::")

# OpenBLAS has a thread for each core, and each spins for 2**26 ticks (25 ms) after it starts and after every product, on cores
# that others could use: importing NumPy took 0.06 core-seconds more on two cores, and a second on 64. 2**16 ticks are 25 us.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "16")


def cache_folder() -> Path:
    """penult's only folder in the home folder: ``PENULT_CACHE``, or else ``penult`` in ``XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        RuntimeError: there is no home folder.
    """
    if chosen := os.environ.get("PENULT_CACHE"):
        return Path(chosen)
    caches = os.environ.get("XDG_CACHE_HOME")
    if not caches and os.environ.get("HOME") == "":  # Python would take the root folder for it
        message = "HOME is empty"
        raise RuntimeError(message)
    return Path(caches or Path.home() / ".cache") / "penult"


def redirect_matplotlib() -> None:
    """Make matplotlib keep its list of fonts in `cache_folder`; for a process of penult's own, before matplotlib is imported.

    Plots use only the font that comes with matplotlib, so fontconfig, which keeps files in the home folder too, is not needed.
    A matplotlib that the user has configured is left as it is.
    """
    with contextlib.suppress(RuntimeError):  # no home folder, so nothing is written there
        folders = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config", "matplotlib"), Path.home() / ".matplotlib"
        configured = any(os.access(folder / "matplotlibrc", os.R_OK) for folder in (Path(), *folders))
        if configured or os.environ.get("MATPLOTLIBRC") or os.environ.get("MPLCONFIGDIR"):
            return
        os.environ["MPLCONFIGDIR"] = str(cache_folder() / "matplotlib")
        os.environ.setdefault("MPL_IGNORE_SYSTEM_FONTS", "1")
    # If it cannot write there, it uses a temporary folder and warns that this is slow, which costs a tenth of a second.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)


def end_with_parent(parent: int) -> None:
    """End this process when the thread of ``parent`` that started it ends, even by SIGKILL; without that on macOS.

    Else a child that writes, or that a hostile file hangs, would outlive a run that was killed.
    """
    import ctypes

    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it was killed before that
        os._exit(128 + signal.SIGKILL)


def python(code: str, *arguments: object) -> list[str]:
    """A command that runs ``code`` in a new Python process; ``sys.argv[1:]`` there are the arguments, as text.

    No module in its working directory or beside a script can shadow one of penult's.
    """
    start = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    return [sys.executable, "-P", "-c", start + code, json.dumps(sys.path), *map(str, arguments)]
