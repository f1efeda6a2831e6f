"""A SLURM cluster of one node on this machine, for tests: installed, started, read and stopped.

Debian's packages, run as root without systemd, cgroups or an accounting database. The GPU is a
stand-in: the scheduler hands it out, it computes nothing. The scheduler's own records are read from
its completion log and from ``scontrol``, never from Snakemake.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("slurm-wlm", "slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "sinfo")
ETC = Path("/etc/slurm")
OURS = "# Written by KVGuard's tests"

CONTROLLER = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort=26817
SlurmdPort=26818
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobcomp.log
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=2
MinJobAge=3600
DefMemPerCPU=100
NodeName=localhost NodeAddr=127.0.0.1 CPUs=2 Boards=1 SocketsPerBoard=1 CoresPerSocket=2 \
ThreadsPerCore=1 RealMemory=16000 Gres=gpu:1 State=UNKNOWN
PartitionName=cpu Nodes=localhost Default=YES MaxTime=600 DefaultTime=10 State=UP
PartitionName=gpu Nodes=localhost Default=NO MaxTime=600 DefaultTime=10 State=UP
"""

GPUS = "AutoDetect=off\nName=gpu Count=1 File=/dev/null\n"


class Unavailable(Exception):
    """There can be no cluster on this machine; the message says why."""


class Record(NamedTuple):
    """What the scheduler wrote down when a job ended."""

    job: str
    name: str
    comment: str
    state: str
    memory_mb: int
    gpus: int
    limit_minutes: int
    array: str | None


class OneNode:
    """The running cluster.

    Args:
        folder: an absolute path for its state and logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self) -> None:
        """Write the configuration, start the three daemons, wait until the node is idle.

        Raises:
            Unavailable: a daemon does not start here; none is left running.
        """
        _watch(self.folder)
        try:
            self._start()
        except (RuntimeError, TimeoutError, OSError) as error:
            self.stop()
            logs = (self.folder / "log").glob("*.log")
            said = [line for log in logs for line in log.read_text().splitlines()[-3:]]
            raise Unavailable("\n".join([f"SLURM does not start: {error}", *said])) from error

    def _start(self) -> None:
        for part in ("run", "state", "spool", "log"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        key = self.folder / "run/munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        ETC.mkdir(exist_ok=True)
        (ETC / "slurm.conf").write_text(OURS + CONTROLLER.format(folder=self.folder))
        (ETC / "gres.conf").write_text(GPUS)
        run = self.folder / "run"
        _call(
            "munged",
            f"--key-file={key}",
            f"--socket={run}/munge.socket",
            f"--pid-file={run}/munged.pid",
            f"--log-file={self.folder}/log/munged.log",
            f"--seed-file={run}/munged.seed",
        )
        _call("slurmctld", "-c")
        _call("slurmd")
        wait_until(lambda: _call("sinfo", "-h", "-p", "cpu", "-o", "%T").strip() == "idle", 60)

    def stop(self) -> None:
        """End every job and the daemons, remove the configuration."""
        end_cluster(self.folder)

    def queue(self) -> dict[str, str]:
        """State of each job that has not ended, by its number: PENDING, RUNNING, COMPLETING."""
        lines = _call("squeue", "-h", "-r", "-o", "%i %T").splitlines()
        return dict(line.split() for line in lines)

    def describe(self, job: str) -> dict[str, str]:
        """What ``scontrol`` says about one job, also after its end; of an array, about one task."""
        for line in _call("scontrol", "--oneliner", "show", "job", job).splitlines():
            entry = dict(part.split("=", 1) for part in line.split() if "=" in part)
            if entry["JobId"] == job:
                return entry
        raise KeyError(job)

    def records(self) -> list[Record]:
        """Every job that has ended, in the order in which the scheduler wrote them down."""
        log = self.folder / "log/jobcomp.log"
        found = []
        for line in log.read_text().splitlines() if log.exists() else []:
            entry = dict(part.split("=", 1) for part in line.split() if "=" in part)
            shown = self.describe(entry["JobId"])
            resources = dict(part.split("=", 1) for part in entry["Tres"].split(","))
            task = shown.get("ArrayTaskId")
            found.append(
                Record(
                    job=entry["JobId"],
                    name=entry["Name"],
                    comment=shown.get("Comment", ""),
                    state=entry["JobState"],
                    memory_mb=_megabytes(resources["mem"]),
                    gpus=int(shown.get("TresPerJob", "gres:gpu:0").removeprefix("gres:gpu:")),
                    limit_minutes=int(entry["TimeLimit"]),
                    array=f"{shown['ArrayJobId']}_{task}" if task else None,
                )
            )
        return found


def install() -> None:
    """Make sure that the cluster's programs are there.

    Raises:
        Unavailable: they are not and cannot be installed, or the machine has a cluster of its own.
    """
    config = ETC / "slurm.conf"
    if config.exists() and not config.read_text().startswith(OURS):
        raise Unavailable(f"{config} is not of these tests: this machine belongs to a cluster")
    if os.geteuid() != 0:
        raise Unavailable("a SLURM of one node needs root, for its daemons and /etc/slurm")
    if all(map(shutil.which, PROGRAMS)):
        return
    if shutil.which("apt-get") is None:
        raise Unavailable(f"no apt-get to install {', '.join(PACKAGES)}")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(
            ["apt-get", *command], env=environment, capture_output=True, text=True
        )
    if done.returncode != 0:
        raise Unavailable(f"apt-get cannot install {', '.join(PACKAGES)}: {done.stderr.strip()}")


def stop_leftover() -> None:
    """End the cluster of an earlier test run that was killed before it could."""
    config = ETC / "slurm.conf"
    if config.exists() and config.read_text().startswith(OURS):
        (spool,) = (
            line.split("=", 1)[1]
            for line in config.read_text().splitlines()
            if line.startswith("SlurmdSpoolDir")
        )
        end_cluster(Path(spool).parent)


def end_cluster(folder: Path) -> None:
    """End jobs and daemons, whatever state they are in, and remove the configuration."""
    if (folder / "run/slurmctld.pid").exists():
        for signals in ([], ["--signal", "KILL", "--full"]):
            subprocess.run(["scancel", "--user", "root", *signals], capture_output=True)
            done = subprocess.run(["squeue", "-h"], capture_output=True, text=True)
            end = time.monotonic() + 20
            while done.stdout.strip() and time.monotonic() < end:
                time.sleep(0.5)
                done = subprocess.run(["squeue", "-h"], capture_output=True, text=True)
    _end_daemons(folder)
    _end_orphans()
    for name in ("slurm.conf", "gres.conf"):
        (ETC / name).unlink(missing_ok=True)


def _end_orphans() -> None:
    """End processes of jobs that the scheduler has forgotten: a cancelled step may hang."""
    configuration = f"SLURM_CONF={ETC / 'slurm.conf'}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            variables = (process / "environ").read_bytes().split(b"\0")
            if configuration in variables and any(
                v.startswith(b"SLURM_JOB_ID=") for v in variables
            ):
                os.kill(int(process.name), signal.SIGKILL)


def _watch(folder: Path) -> None:
    """Start a process that ends the cluster when this one is gone, however it ended."""
    subprocess.Popen(
        [sys.executable, __file__, str(os.getpid()), str(folder)],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def wait_until(condition: Callable[[], object], seconds: float, what: str = "") -> None:
    """Return as soon as the condition is true; TimeoutError when it does not become so."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(what or f"nothing happened within {seconds:.0f} s")
        time.sleep(0.5)


def _end_daemons(folder: Path) -> None:
    for program in ("slurmd", "slurmctld", "munged"):
        file = folder / "run" / f"{program}.pid"
        if not file.exists():
            continue
        pid = int(file.read_text())
        running = Path(f"/proc/{pid}/cmdline")

        def gone(running: Path = running, program: str = program) -> bool:
            try:
                return program.encode() not in running.read_bytes()  # empty once it has ended
            except (FileNotFoundError, ProcessLookupError):
                return True

        for number in (signal.SIGTERM, signal.SIGKILL):
            if not gone():
                os.kill(pid, number)
                with suppress(TimeoutError):
                    wait_until(gone, 30)


def _call(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return done.stdout


def _megabytes(text: str) -> int:
    number, unit = float(text[:-1]), text[-1]
    return round(number * {"K": 1 / 1024, "M": 1, "G": 1024}[unit])


if __name__ == "__main__":
    tests, cluster = Path(f"/proc/{sys.argv[1]}"), Path(sys.argv[2])
    while tests.exists() and cluster.exists():
        time.sleep(2)
    if cluster.exists():
        end_cluster(cluster)
        shutil.rmtree(cluster, ignore_errors=True)
