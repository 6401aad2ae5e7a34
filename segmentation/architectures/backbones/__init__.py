"""Feature extractors, one file per paper."""
