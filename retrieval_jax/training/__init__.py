"""The trainer: its loop, step, optimisers and evaluators, and what watches over a run."""
