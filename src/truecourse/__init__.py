"""Align language models, and show with measurements whether the run can be trusted.

`import truecourse` is light: torch and transformers load when a run starts.
"""
