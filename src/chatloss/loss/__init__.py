"""Losses return sums and never divide: `step` holds the denominators of the whole optimiser step."""
