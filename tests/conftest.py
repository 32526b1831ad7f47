"""One thread: the tensors of the tests are tiny, and threads cost more than they give."""

import torch

torch.set_num_threads(1)
