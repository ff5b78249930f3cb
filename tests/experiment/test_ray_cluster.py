"""A sweep on a real Ray cluster of three nodes on 127.0.0.1, of which one is killed, as is the driver."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_sweeps import some_data
from test_workers import PATHS, Logged, begun, table_bytes, wait_for

from llmcomp import results
from llmcomp.errors import Error
from llmcomp.experiment.sweep import sweep

# Else Ray takes 127.0.0.1 for the address that other machines see, where nothing listens; read when it is imported.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
ray = pytest.importorskip("ray")

from llmcomp.experiment.ray_cluster import Need, RayCluster  # noqa: E402

pytestmark = pytest.mark.slow
LOCAL = "127.0.0.1"
SIZES, STEPS, CHUNKS = "13k,28k,77k", (128, 512, 2048), 1


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A head that computes nothing, and three nodes of one processor; workers start in a folder of their own."""
    from ray.cluster_utils import Cluster

    here, folder = Path.cwd(), tmp_path_factory.mktemp("workers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), *PATHS]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        os.chdir(folder)
        node = {"node_ip_address": LOCAL, "include_dashboard": False, "object_store_memory": 100 << 20}
        found = Cluster(initialize_head=True, head_node_args={**node, "num_cpus": 0})
        try:
            found.workers = [found.add_node(**node, num_cpus=1, memory=4 << 30) for _ in range(3)]
            found.folder = folder
            yield found
        finally:
            os.chdir(here)
            found.shutdown()


def processes_of(node: Any) -> list[int]:
    """The raylet of a node and all that it started."""
    found = [
        process.process.pid for kind, all_of in node.all_processes.items() for process in all_of if kind == "raylet"
    ]
    for pid in found:
        for path in Path("/proc").glob(f"{pid}/task/*/children"):
            found += map(int, path.read_text().split())
    return found


DRIVER = """
import sys
from pathlib import Path
from test_workers import Logged
from llmcomp.experiment.ray_cluster import RayCluster
from llmcomp.experiment.sweep import sweep
rows = sweep("pico", {steps!r}, ["text", "image", "speech"], "out", RayCluster({address!r}), sizes={sizes!r},
             n_chunks={chunks!r}, scorer=Logged(Path({log!r}), 0.1), verify=True, unit=None)
assert rows.attrs["failed"] == [], rows.attrs["failed"]
"""


def test_a_node_and_the_driver_are_killed(cluster: Any, tmp_path: Path) -> None:
    log, folder = tmp_path / "log", tmp_path / "driver"
    folder.mkdir()
    grid: dict[str, Any] = {"sizes": SIZES, "n_chunks": CHUNKS, "verify": True, "progress": False}
    samples = ["text", "image", "speech"]
    expected = sweep("pico", STEPS, samples, tmp_path / "one", scorer=Logged(tmp_path / "log-of-one"), **grid)
    n_cells = len(begun(tmp_path / "log-of-one"))
    assert (expected.attrs["failed"], n_cells) == ([], 3 * 3 * 3)

    names = {"steps": STEPS, "sizes": SIZES, "chunks": CHUNKS, "log": str(log), "address": cluster.address}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(DRIVER).format(**names)]
    how: dict[str, Any] = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}

    first = subprocess.Popen(command, **how)
    wait_for(lambda: len(list((folder / "out").glob("*.parquet"))) >= 4 or first.poll() is not None, 400)
    assert first.poll() is None, first.communicate()[1].decode()
    first.send_signal(signal.SIGKILL)
    first.communicate()

    n_finished = len(list((folder / "out").glob("*.parquet")))
    second = subprocess.Popen(command, **how)
    wait_for(lambda: len(list((folder / "out").glob("*.parquet"))) >= n_finished + 4 or second.poll() is not None, 400)
    assert second.poll() is None, second.communicate()[1].decode()
    for pid in processes_of(cluster.workers[0]):
        os.kill(pid, signal.SIGKILL)
    _, said = second.communicate(timeout=500)
    assert second.returncode == 0, said.decode()
    assert "1 workers died" in said.decode()

    assert table_bytes(results.read_rows(folder / "out")) == table_bytes(expected)
    # An actor that dies loses the cell that it is at, and one whose rows are not written yet or that it began after.
    times = begun(log)
    assert sum(times.values()) - n_cells <= 2 * 3 + 2
    assert max(times.values()) <= 3
    # Only the driver saw its folder of results.
    assert list(cluster.folder.iterdir()) == []


def test_tokens_and_data_go_through_the_object_store(cluster: Any, suite: Path, tmp_path: Path) -> None:
    alone = sweep(suite, (1, 2, 3), some_data(), tmp_path / "one", protocol=("lossless", "published"), progress=False)
    grid: dict[str, Any] = {"protocol": ("lossless", "published"), "progress": False, "baselines": False}
    rows = sweep(suite, (1, 2, 3), some_data(), tmp_path / "ray", RayCluster(cluster.address), **grid)
    assert rows.attrs["failed"] == []
    assert table_bytes(rows) == table_bytes(alone)


def test_a_cell_that_kills_its_workers_fails_alone(cluster: Any, suite: Path, tmp_path: Path) -> None:
    scorer = Logged(tmp_path / "log", kills=2)
    rows = sweep(
        suite, (1, 2, 3), some_data(), tmp_path / "out", RayCluster(cluster.address), scorer=scorer, progress=False
    )
    assert {entry["step"] for entry in rows.attrs["failed"]} == {2}
    assert {entry["reason"] for entry in rows.attrs["failed"]} == {"3 workers died while they computed it"}
    assert set(rows["step"]) == {1, 3}
    assert max(begun(tmp_path / "log").values()) <= 3


def test_a_model_that_cannot_be_loaded_fails_alone(cluster: Any, suite: Path, tmp_path: Path) -> None:
    from hub_server import write_checkpoint

    broken = write_checkpoint(tmp_path / "broken", 1)
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[:-100])
    rows = sweep([suite, broken], None, some_data(), tmp_path / "out", RayCluster(cluster.address), progress=False)
    assert {failure["model"] for failure in rows.attrs["failed"]} == {"broken"}
    assert "model.safetensors" in rows.attrs["failed"][0]["reason"]
    assert set(rows["model"]) == {"tiny"}


def test_a_cluster_that_is_not_there(suite: Path, tmp_path: Path) -> None:
    with pytest.raises(Error, match="cannot reach the Ray cluster"):
        sweep(suite, 1, some_data(), tmp_path / "out", RayCluster("127.0.0.1:1"), progress=False)


@pytest.mark.parametrize(("options", "words"), [({"cpus": 0}, "cpus is 0"), ({"gpus": -0.5}, "gpus is -0.5")])
def test_wrong_requests(options: dict[str, Any], words: str) -> None:
    with pytest.raises(Error, match=words):
        RayCluster(**options)


def test_what_an_actor_needs() -> None:
    assert Need(2, 1.0, 1 << 30).suffices(Need(1, 0.25, 1 << 30))
    assert not Need(2, 0.0, 1 << 30).suffices(Need(1, 0.25, 1 << 29))
    assert str(Need(2, 0.5, 2 * 10**9)) == "2 CPU, 0.5 GPU, 2.0 GB of memory"
