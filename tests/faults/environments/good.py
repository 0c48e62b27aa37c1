"""Environment without a fault."""

from rltrain.envs.tiny_gsm import reward

__all__ = ["reward"]
