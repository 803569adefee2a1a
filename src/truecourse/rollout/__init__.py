"""Sampling: who sampled what, with which weights."""
