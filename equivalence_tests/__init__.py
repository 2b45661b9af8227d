"""The proof that `flax_resnet` equals PyTorch, and the tools that measure both."""
