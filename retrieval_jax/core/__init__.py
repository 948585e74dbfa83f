"""Errors, paths, storage, progress, gin configuration and the workspace: what every other package stands on.

Only code that would be useful to a project about something else belongs here. Nothing here knows of passages,
models or devices, and nothing here imports JAX or another package of this project.
"""
