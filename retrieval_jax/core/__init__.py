"""Errors, paths, storage, progress, gin configuration and the workspace: what every other package stands on.

Only code that would be useful to a project about something else belongs here, but for the workspace, which
knows where everything lies. Nothing here imports JAX or another package of this project.
"""
