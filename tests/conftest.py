"""Settings of every test run."""

import torch

# The nets are tiny: one thread is faster than several that wait for each other, and results do not depend on the machine.
torch.set_num_threads(1)
