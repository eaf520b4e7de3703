"""Settings of every test run."""

import torch

# The nets are tiny: one thread is faster than several that wait for each other, and results are the same everywhere.
torch.set_num_threads(1)
