"""A cluster of Slurm on this machine: its controller and nodes as processes, in a folder of their own.

Jobs whose node fails are not queued again, but where they ask for it: Slurm lets those wait for two minutes.

Debian has it in `slurmctld`, `slurmd` and `slurm-client`.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from sweeps import alive, wait_until

INSTALLED = all(map(shutil.which, ("slurmctld", "slurmd", "sbatch")))
_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/controller.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_min_interval=10000
KillWait=2
SlurmdTimeout=10
ReturnToService=2
JobRequeue=0
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
_NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=1000\n"


class SlurmCluster:
    """configuration: the file that SLURM_CONF names for all commands of Slurm.  nodes: their names."""

    def __init__(self, folder: Path, nodes: tuple[str, ...] = ("one", "two")) -> None:
        self.nodes = nodes
        self.configuration = folder / "slurm.conf"
        self._folder = folder
        host, ports = socket.gethostname().partition(".")[0], _free_ports(1 + len(nodes))
        text = _CONFIGURATION.format(host=host, user=getpass.getuser(), port=ports[0], folder=folder)
        for name, port in zip(nodes, ports[1:], strict=True):
            text += _NODE.format(name=name, host=host, port=port)
        self.configuration.write_text(text)

    def start_controller(self) -> None:
        self.call("slurmctld", "-i")
        while "UP" not in self.call("scontrol", "ping", check=False):
            time.sleep(0.05)

    def start_node(self, name: str) -> None:
        self.call("slurmd", "-N", name)

    def wait_for_nodes(self) -> None:
        """Until all nodes take jobs."""
        ready = ("sinfo", "--noheader", "--Node", "--responding", "--states=idle,mixed,allocated")
        while len(self.call(*ready).splitlines()) < len(self.nodes):
            time.sleep(0.05)

    def stop(self) -> None:
        """Cancel all jobs, and end the nodes and the controller."""
        self.call("scancel", f"--user={getpass.getuser()}", check=False)
        while self.call("squeue", "--noheader", check=False):
            time.sleep(0.1)
        for name in self.nodes:
            self._kill(f"{name}.pid")
        self._kill("controller.pid")

    def kill_controller(self) -> None:
        self._kill("controller.pid")

    def kill_node(self, name: str) -> None:
        """Kill what runs on a node, as if its machine had lost its power: Slurm's daemons, jobs and their children."""
        self._kill(f"{name}.pid")
        jobs = [process for process in psutil.process_iter() if self._is_of(process, name)]
        parents = set[psutil.Process]()
        for process in jobs:
            with suppress(psutil.NoSuchProcess):
                parents |= {parent for parent in process.parents() if parent.name() == "slurmstepd"}
        for process in (*parents, *jobs):  # in this order: nobody tells the controller how a job ended
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _is_of(self, process: psutil.Process, name: str) -> bool:
        """Whether a process belongs to a job on this node of this cluster."""
        with suppress(psutil.Error, OSError):
            environment = process.environ()
            return environment.get("SLURMD_NODENAME") == name and environment.get("SLURM_CONF") == str(
                self.configuration
            )
        return False

    def _kill(self, pid_file: str) -> None:
        with suppress(FileNotFoundError, psutil.NoSuchProcess):
            pid = int((self._folder / pid_file).read_text())
            psutil.Process(pid).kill()
            wait_until(lambda: not alive(pid))

    def call(self, *command: str, check: bool = True) -> str:
        """What a command of Slurm prints."""
        environment = os.environ | {"SLURM_CONF": str(self.configuration)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
        return done.stdout


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[SlurmCluster]:
    """A cluster of two nodes with two CPUs each, for as long as the block runs; SLURM_CONF names it there."""
    (folder / "state").mkdir(parents=True)
    cluster, before = SlurmCluster(folder), os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(cluster.configuration)
    try:
        cluster.start_controller()
        for name in cluster.nodes:
            cluster.start_node(name)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.stop()
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before


def _free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
