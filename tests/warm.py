"""What a run does before its first step, once, for the processes of tests/spawn.py that are forked from this one."""
import os

import filelock                                           # noqa: F401
import numpy.ma                                           # noqa: F401
import rich._emoji_codes                                  # noqa: F401
import torch
import torch._dynamo                                      # noqa: F401  torch's optimisers ask for it

from mindseed.base.config import parse
from mindseed.base.hardware import peak
from mindseed.recipes import rl, train

os.fsync = lambda descriptor: None                         # as in conftest.py
for recipe in (train, rl):
    parse(recipe.Options, [])
peak("cpu", torch.float32)
