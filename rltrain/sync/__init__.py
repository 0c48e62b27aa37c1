"""Syncs copy trained weights into the rollout engine; a check confirms that they arrived."""
