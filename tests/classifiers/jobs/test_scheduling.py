"""The recipes of docs/scheduling.md, as far as they run without their schedulers."""

from __future__ import annotations

import configparser
import os
import re
import signal
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).resolve().parents[3]
TEXT = (REPO / "docs/scheduling.md").read_text()


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", TEXT, re.DOTALL)


WRAPPER, SLURM = blocks("sh")


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (3, 0), (65, 65), (75, 0), (78, 78), (143, 143)])
def test_the_wrapper_treats_every_code_as_the_table_says(tmp_path: Path, code: int, expected: int) -> None:
    fake = script(tmp_path / "penult", f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\nexit {code}\n')
    wrapper = script(tmp_path / "penult-job", WRAPPER.replace("/srv/penult/.venv/bin/penult", str(fake)))
    # as cron does it: a bare environment, no terminal, the home folder
    done = subprocess.run(
        [wrapper, "/srv/photos/nightly.toml"], env={"PATH": "/usr/bin:/bin"}, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode == expected
    arguments = (tmp_path / "arguments").read_text().split()
    assert arguments == [
        "-q",
        "run",
        "/srv/photos/nightly.toml",
        "--log-json",
        "/srv/photos/nightly.log.jsonl",
        "--metrics",
        "/srv/photos/nightly.prom",
    ]


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (3, 0), (65, 65), (75, 0)])
def test_the_slurm_script_passes_codes_on(tmp_path: Path, code: int, expected: int) -> None:
    fake = script(tmp_path / "penult", f"#!/bin/sh\nexit {code}\n")
    job = script(tmp_path / "job.sh", SLURM.replace("/srv/penult/.venv/bin/penult", str(fake)))
    assert subprocess.run(["bash", job], check=False).returncode == expected


def test_the_slurm_script_passes_sigterm_on_and_queues_itself_again(tmp_path: Path) -> None:
    asked = tmp_path / "requeued"
    # the signal is blocked and waited for, so it cannot come too early
    fake = script(
        tmp_path / "penult",
        f"#!{sys.executable}\nimport signal, sys\nsignal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n"
        "print('ready', flush=True)\nsignal.sigwait([signal.SIGTERM])\nsys.exit(143)\n",
    )
    script(tmp_path / "scontrol", f'#!/bin/sh\necho "$@" > {asked}\n')
    job = script(tmp_path / "job.sh", SLURM.replace("/srv/penult/.venv/bin/penult", str(fake)))
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "42"}
    with subprocess.Popen(["bash", job], env=environment, stdout=subprocess.PIPE, start_new_session=True) as child:
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == b"ready\n"
            child.send_signal(signal.SIGTERM)
            assert child.wait(timeout=60) == 0
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
    assert asked.read_text().split() == ["requeue", "42"]


def test_the_units_parse_and_accept_the_right_codes() -> None:
    service, timer = blocks("ini")
    parsed = configparser.ConfigParser(strict=True)
    parsed.optionxform = str  # type: ignore[assignment,method-assign]
    parsed.read_string(service)
    assert parsed["Service"]["SuccessExitStatus"].split() == ["3", "75"]
    assert float(parsed["Service"]["TimeoutStopSec"]) > 20
    parsed.read_string(timer)
    assert parsed["Timer"]["OnCalendar"]


def test_the_cron_job_never_repeats_what_cannot_pass() -> None:
    (text,) = blocks("yaml")
    job = yaml.safe_load(text)["spec"]["jobTemplate"]["spec"]
    assert set(job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]).isdisjoint({0, 3, 75, 130, 143})
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # a podFailurePolicy needs it


def test_the_dag_compiles() -> None:
    (text,) = blocks("python")
    compile(text, "dag.py", "exec")
