"""What a run knows about itself beside its losses: held-out loss, held-out answers, the best checkpoint."""
