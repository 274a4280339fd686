"""LMCache's second level with LMCache's own classes. Skipped where there is no LMCache."""

import json
import re
import select
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, Daemon, wait_for

# What others deprecate while they are imported is not ours.
warnings.simplefilter("default")
torch = pytest.importorskip("torch", reason="torch is not installed: the LMCache adapter is not tested here")
pytest.importorskip("lmcache", reason="LMCache is not installed: its adapter is not tested here")

from lmcache.cli.commands.bench.l2_adapter_bench.data import make_memory_objects  # noqa: E402
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey  # noqa: E402
from lmcache.v1.distributed.l2_adapters.plugin_l2_adapter import (  # noqa: E402
    PluginL2AdapterConfig,
    _create_plugin_adapter,
)
from terrace_kv.lmcache import TerraceL2  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")
BYTES = 64 << 10
LAYOUT = {0: MemoryLayoutDesc(shapes=[torch.Size([BYTES])], dtypes=[torch.uint8])}


def adapter(socket: Path, **params: Any) -> TerraceL2:
    """As LMCache makes it, from its configuration."""
    config = PluginL2AdapterConfig.from_dict(
        {
            "type": "plugin",
            "module_path": "terrace_kv.lmcache",
            "class_name": "TerraceL2",
            "adapter_params": {"socket": str(socket), **params},
        }
    )
    made = _create_plugin_adapter(config)
    assert isinstance(made, TerraceL2)
    return made


@pytest.fixture
def level(daemon: Daemon) -> Any:
    made = adapter(daemon.socket)
    yield made
    made.close()


def names(count: int, start: int = 0, **more: Any) -> list[ObjectKey]:
    fields = {"model_name": "model", "kv_rank": 0, **more}
    return [ObjectKey(chunk_hash=index.to_bytes(32, "big"), **fields) for index in range(start, start + count)]


def objects(count: int, fill: int = 0) -> list[Any]:
    """Objects whose bytes differ from each other, or all zeros for 0."""
    made = make_memory_objects(torch.zeros(count * BYTES, dtype=torch.uint8), count, BYTES, 0)
    for index, item in enumerate(made):
        item.raw_data.fill_((fill + index) % 251 if fill else 0)
    return made


def signalled(fd: int) -> None:
    assert select.select([fd], [], [], PATIENCE)[0], "the event never came"


def store(level: TerraceL2, keys: list[ObjectKey], values: list[Any]) -> bool:
    task = level.submit_store_task(keys, values)
    signalled(level.get_store_event_fd())
    done: dict[int, Any] = {}
    wait_for(lambda: done.update(level.pop_completed_store_tasks()) or task in done, "the store task")
    return bool(done[task].is_successful())


def lookup(level: TerraceL2, keys: list[ObjectKey], layouts: Any = None) -> list[int]:
    task = level.submit_lookup_and_lock_task(keys, LAYOUT if layouts is None else layouts)
    signalled(level.get_lookup_and_lock_event_fd())
    found: list[Any] = []
    wait_for(lambda: found.append(level.query_lookup_and_lock_result(task)) or found[-1] is not None, "the lookup")
    assert level.query_lookup_and_lock_result(task) is None, "a result is told once"
    return sorted(found[-1].get_indices_list())


def load(level: TerraceL2, keys: list[ObjectKey], values: list[Any]) -> list[int]:
    task = level.submit_load_task(keys, values)
    signalled(level.get_load_event_fd())
    found: list[Any] = []
    wait_for(lambda: found.append(level.query_load_result(task)) or found[-1] is not None, "the load")
    return sorted(found[-1].get_indices_list())


def same(one: list[Any], two: list[Any]) -> bool:
    return all(torch.equal(a.raw_data, b.raw_data) for a, b in zip(one, two, strict=True))


def test_store_lookup_load_unlock(level: TerraceL2, daemon: Daemon) -> None:
    """Bytes come back under another key, a gap is a hit, or a lock outlives its unlock."""
    values = objects(8, fill=7)
    assert len({level.get_store_event_fd(), level.get_lookup_and_lock_event_fd(), level.get_load_event_fd()}) == 3
    assert store(level, names(8), values)
    assert level.get_usage().total_bytes_used == 8 * BYTES
    asked = [*names(4), *names(1, start=900), *names(4, start=4)]
    there = [0, 1, 2, 3, 5, 6, 7, 8]
    assert lookup(level, asked) == there
    assert daemon.pinned() >= 8
    empty = objects(9)
    assert load(level, asked, empty) == there
    assert same([empty[index] for index in there], values)
    level.submit_unlock(asked)
    level.submit_unlock(asked)
    daemon.expect_leases(0)
    assert load(level, names(8), objects(8)) == list(range(8)), "a lock is not needed to load"


def test_a_large_load_and_an_empty_one(level: TerraceL2) -> None:
    """Many keys, or none: every task must end, once."""
    values = objects(23, fill=7)
    assert store(level, names(23), values)
    empty = objects(23)
    assert load(level, names(23), empty) == list(range(23))
    assert same(empty, values)
    assert load(level, [], []) == []


def test_two_locks_need_two_unlocks(level: TerraceL2, daemon: Daemon) -> None:
    """The first unlock of two frees what the second still needs."""
    store(level, names(2), objects(2, fill=7))
    assert lookup(level, names(2)) == lookup(level, names(2)) == [0, 1]
    level.submit_unlock(names(2))
    assert level.report_status()["locked_object_count"] == 2
    assert daemon.pinned() >= 2
    level.submit_unlock(names(2))
    daemon.expect_leases(0)


@pytest.mark.parametrize(
    "change", [{"kv_rank": 1}, {"model_name": "other"}, {"cache_salt": "x"}, {"object_group_id": 1}]
)
def test_other_keys_are_other_objects(level: TerraceL2, change: dict[str, Any]) -> None:
    """One field of the key differs, and the object of another user, rank or model is served."""
    store(level, names(3), objects(3, fill=7))
    assert lookup(level, names(3, **change)) == []
    assert load(level, names(3, **change), objects(3)) == []


def test_a_second_server_and_another_tenant(level: TerraceL2, daemon: Daemon) -> None:
    """A new server finds what the first stored, as soon as it is told what objects look like; a stranger does not."""
    values = objects(3, fill=7)
    store(level, names(3), values)
    second, stranger = adapter(daemon.socket), adapter(daemon.socket, tenant="stranger")
    other = {0: MemoryLayoutDesc(shapes=[torch.Size([BYTES])], dtypes=[torch.int8])}
    assert lookup(second, names(3), other) == [], "another type"
    assert lookup(second, names(3)) == [0, 1, 2]
    empty = objects(3)
    assert load(second, names(3), empty) == [0, 1, 2]
    assert same(empty, values)
    assert lookup(stranger, names(3)) == []
    second.close()
    stranger.close()


def test_the_daemon_dies_under_locks(level: TerraceL2, daemon: Daemon) -> None:
    """It is killed while objects are locked: tasks end, as failures, and unlocking does not fail."""
    store(level, names(3), objects(3, fill=7))
    assert lookup(level, names(3)) == [0, 1, 2]
    daemon.process.kill()
    daemon.process.wait()
    wait_for(lambda: load(level, names(3), objects(3)) == [], "loads to be misses")
    assert not store(level, names(3, start=50), objects(3, fill=9))
    assert lookup(level, names(3)) == []
    level.submit_unlock(names(3))
    assert level.report_status()["is_healthy"] is False


def described(daemon: Daemon) -> str:
    return json.dumps(
        {
            "type": "plugin",
            "module_path": "terrace_kv.lmcache",
            "class_name": "TerraceL2",
            "adapter_params": {"socket": str(daemon.socket)},
        }
    )


def run_lmcache(module: str, *arguments: str) -> str:
    """A program of LMCache's own; what it printed."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_lmcaches_own_bench_verifies(daemon: Daemon) -> None:
    """``lmcache bench l2`` compares what it loads with what it stored: lookups must hit, and all bytes be right."""
    options = ["--num-keys", "8", "--data-size-kb", "256", "--rounds", "2", "--lookup-max-hit-rate", "1"]
    options += ["--no-skip-verify", "--l2-adapter", described(daemon)]
    printed = run_lmcache("lmcache.cli.main", "bench", "l2", *options)
    assert "All 8 keys data verified OK." in printed
    for operation in ("Lookup", "Load"):
        found = re.findall(rf"\[{operation}\] Round \d: .* (?:found|loaded)=(\d+)/8", printed)
        assert found == ["8"] * 3, printed
    daemon.expect_leases(0)


def test_lmcaches_own_check_of_adapters(daemon: Daemon) -> None:
    """LMCache's check of an adapter ends well whatever it found, so that its counts must be read."""
    options = ["--mode", "test_l2_adapter", "--num-keys", "6", "--obj-size", "16384"]
    printed = run_lmcache("lmcache.v1.basic_check", *options, "--l2-adapter", described(daemon))
    for line in ("6/6 correctly absent", "Batch store OK", "6/6 found", "(loaded): 6/6", "(content): 6/6"):
        assert line in printed, printed
    assert "Failed" not in printed
