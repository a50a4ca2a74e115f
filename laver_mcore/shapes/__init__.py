"""What the model is, from the recipe alone: every weight's name, shape and place; no torch, no Megatron."""
