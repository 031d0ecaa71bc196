"""Measuring: what is to be measured, each run in processes of its own, and anomalib's models to compare with."""
