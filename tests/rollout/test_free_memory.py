"""How much memory there is to have."""

import torch

from posttrain.rollout.cache import cgroup_room, free_memory


def group(folder, limit, current, files):
    """The files of a control group."""
    folder.mkdir(exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{current}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {files}\nactive_file 1\n")


def test_the_limits_of_control_groups(tmp_path):
    """The least of what the group and those above it leave, cached files not counted."""
    group(tmp_path / "a", 1000, 700, 99)
    group(tmp_path / "a" / "b", "max", 600, 0)
    assert cgroup_room(tmp_path, "a/b", 10**6) == 1000 - 700 + 100
    assert cgroup_room(tmp_path, "a/b", 300) == 300
    group(tmp_path / "a" / "b", 250, 600, 400)
    assert cgroup_room(tmp_path, "a/b", 10**6) == 250 - 600 + 401
    group(tmp_path / "a" / "b", 250, 600, 0)
    assert cgroup_room(tmp_path, "a/b", 10**6) == 0
    assert cgroup_room(tmp_path, "", 7) == 7


def test_there_is_some():
    assert free_memory(torch.device("cpu")) > 1 << 20
