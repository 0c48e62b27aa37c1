"""From the trainer's adapter to the rollout engine, and the proof that it arrived."""
