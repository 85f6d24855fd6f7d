"""What the experiments share: data, models, training, results, pictures."""
