"""The passes, from an exported graph to a lowered one. Installed as ``moe_fx.passes``."""
