"""What a run does before its first step, once, for the processes of tests/spawn.py that are forked from this one."""
import os

os.environ["OMP_NUM_THREADS"] = "1"                       # before torch: a pool of threads does not survive a fork

import filelock                                           # noqa: E402, F401
import numpy.ma                                           # noqa: E402, F401
import rich._emoji_codes                                  # noqa: E402, F401
import torch                                              # noqa: E402
import torch._dynamo                                      # noqa: E402, F401  torch's optimisers ask for it

from mindseed.base.config import parse                    # noqa: E402
from mindseed.base.hardware import peak                   # noqa: E402
from mindseed.recipes import rl, train                    # noqa: E402

os.fsync = lambda descriptor: None                         # as in conftest.py
for recipe in (train, rl):
    parse(recipe.Options, [])
peak("cpu", torch.float32)
