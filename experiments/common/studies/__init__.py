"""What belongs to single experiments: their cells, tables and pictures."""
