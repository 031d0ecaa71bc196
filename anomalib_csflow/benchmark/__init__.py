"""Our detectors beside anomalib's own models, on real images, in one table."""
