"""Nothing goes wrong."""

from rltrain.envs.tiny_gsm import prepare, prompt, reward

__all__ = ["prepare", "prompt", "reward"]
