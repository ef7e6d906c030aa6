"""The audit of rows that another tool prepared: ids with labels or a mask."""
