"""Processes that work together: two of them over gloo, and one alone."""

import os
from pathlib import Path

import pytest
import torch

from opensan.distributed import barrier, gather_objects, is_main, on_main, process_group, sum_over_ranks
from opensan.errors import UserError
from tests.ranks import run_ranks


def test_two_processes_share_sums_objects_and_the_main_ones_work(tmp_path: Path):
    def work() -> None:
        with process_group("cpu") as group:
            mine = torch.tensor([1, 10], dtype=torch.int64) * (group.rank + 1)
            assert sum_over_ranks(mine).tolist() == [3, 30]
            assert mine.tolist() == [group.rank + 1, 10 * (group.rank + 1)]
            assert gather_objects(f"rank {group.rank}") == ["rank 0", "rank 1"]
            assert on_main(lambda: os.getpid()) == gather_objects(os.getpid())[0]
            assert is_main() == (group.rank == 0)
            with process_group("cpu") as same:
                assert same == group
            barrier()
            with pytest.raises(ValueError, match="only rank 0 knows"):
                on_main(refuse)
        (tmp_path / f"done-{group.rank}").touch()

    def refuse() -> None:
        raise UserError("only rank 0 knows")

    run_ranks(work)
    assert {path.name for path in tmp_path.iterdir()} == {"done-0", "done-1"}


def test_a_single_process_is_a_group_of_its_own():
    with process_group("cpu") as group:
        assert (group.rank, group.world_size, group.device) == (0, 1, torch.device("cpu"))
        value = torch.ones(2)
        assert sum_over_ranks(value) is value
        assert gather_objects(3) == [3] and on_main(lambda: 4) == 4 and is_main()
    assert not torch.distributed.is_initialized()
