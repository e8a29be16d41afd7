import torch

torch.set_num_threads(1)  # small tensors: threads only wait for each other, and workers are forked
