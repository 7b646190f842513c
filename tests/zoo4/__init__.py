"""The Mixture-of-Experts families of transformers 4.57, tiny and with random weights."""
