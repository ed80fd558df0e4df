"""What comes with the package: the model builtin:tiny and the data set builtin:dates."""
