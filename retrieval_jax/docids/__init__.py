"""The kinds of docids, the clusterings that some are made by, and the table of docids on disk."""
