"""The definitions that numbers are compared under: one small file each, with its version and its source."""
