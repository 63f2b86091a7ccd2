"""Process groups, launch discovery, mcore on CPU, ZeRO under mcore's schedules."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed reads it when it is imported, and warns without it
