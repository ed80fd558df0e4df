"""C++ for what a decoding step spends its time with: one file an operation, with the operators in Python."""
