"""What a trained model's states and attention look like: measures, reading a model, a report to look at."""
