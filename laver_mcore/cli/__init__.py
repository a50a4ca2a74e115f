"""What a person types: a training run from beginning to end, `--dry-run`, and manners at the terminal."""
