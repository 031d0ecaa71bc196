"""What every detector shares in anomalib: read detector.py and model.py first."""
