"""Another project: its own model, its own training loop, and a checkpoint of localglobal_jax."""
