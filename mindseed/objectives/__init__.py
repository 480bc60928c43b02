"""One file per algorithm; a new one is a file here and a line in this table."""
from mindseed.objectives.sft import SFT

OBJECTIVES = {"sft": SFT}
