"""The recipes, packaged as ``anomalib_csflow.recipes``: ``anomalib-csflow recipe NAME`` prints the path of one."""
