"""Rows by shape: what the rows of one conversation say of those of all others that the template renders alike."""
