"""Images: found, verified, read, decoded, varied, shuffled, and put into batches."""
