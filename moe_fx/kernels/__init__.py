"""Ops of our own behind ``torch.library``, each with its plain PyTorch reference."""
