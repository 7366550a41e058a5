"""What tests stand on, ours and our users': tiny models of every family."""

from splitlearn.testing.tiny import tiny_config, tiny_model, tiny_whole

__all__ = ["tiny_config", "tiny_model", "tiny_whole"]
