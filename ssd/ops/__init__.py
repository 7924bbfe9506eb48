"""The operators of the training step: each a file with its PyTorch and Triton implementations."""
