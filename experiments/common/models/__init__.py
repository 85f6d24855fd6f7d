"""Networks, and their parts."""
