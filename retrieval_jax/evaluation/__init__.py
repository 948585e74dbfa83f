"""Runs, measures and the report.

Nothing here knows how a run came about: it may be another tool's.
"""
