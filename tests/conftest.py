"""One thread a process: the networks here are tiny; on a shared machine a second thread waits more than it works."""

import os

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
