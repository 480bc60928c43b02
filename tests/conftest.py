"""What every test shares: one thread, so that runs are comparable and two test runs do not fight over two cores."""
from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")               # before torch is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")                # no test may use the network
os.environ.setdefault("COLUMNS", "120")                     # tables and help of the same width everywhere

os.fsync = lambda descriptor: None                          # tests kill processes, not machines: the disk can wait

import pytest                                               # noqa: E402
import torch                                                # noqa: E402


@pytest.fixture(autouse=True)
def fixed_randomness():
    """Every test starts from the same global random state, whatever ran before it."""
    torch.manual_seed(0)
