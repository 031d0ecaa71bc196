"""The rooms that know anomalib: the shared main path, then one file per paper."""
